"""Weight formats beside the libraries that made them known: torchao, optimum-quanto and aqlm on the same numbers."""

import pytest
import torch

from paperworks.compress.aqlm import AQLM
from paperworks.compress.packing import unpack_codes
from paperworks.compress.statistics import Statistics
from paperworks.compress.uniform import Int8, Uniform

pytestmark = pytest.mark.parity

SHAPE = (48, 128)


def weights(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_eight_bits_a_row_equal_torchao():
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    weight, block = weights(), (1, SHAPE[1])
    scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, torch.int8, -127, 127)
    codes = quantize_affine(weight, block, scale, zero, torch.int8, -127, 127)
    form = Int8(scale_dtype="float32")
    ours = form.encode(weight)
    # theirs divides by half the span of codes, (127 - -127) / 2, ours by 127: the last bit of the division may differ
    torch.testing.assert_close(ours["scales"], scale.flatten().float(), rtol=2e-7, atol=0)
    assert torch.equal(ours["codes"], codes)
    theirs = dequantize_affine(codes, block, scale, zero, torch.int8, -127, 127)
    torch.testing.assert_close(form.decode(ours, SHAPE), theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_equal_torchao(bits, symmetric):
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    weight, block, top = weights(1), (1, 32), 2 ** (bits - 1) - 1
    kind, low, high = (MappingType.SYMMETRIC, -top, top) if symmetric else (MappingType.ASYMMETRIC, 0, 2**bits - 1)
    target = torch.int8 if symmetric else torch.uint8
    scale, zero = choose_qparams_affine(weight, kind, block, target, low, high, eps=1e-12)
    codes = quantize_affine(weight, block, scale, zero, target, low, high)
    form = Uniform(bits=bits, group=32, symmetric=symmetric, scale_dtype="float32")
    ours = form.encode(weight)
    torch.testing.assert_close(ours["scales"].view(scale.shape), scale.float(), rtol=2e-7, atol=0)
    assert torch.equal(unpack_codes(ours["codes"], bits, SHAPE[1]).int() + (low if symmetric else 0), codes.int())


def test_eight_bits_a_row_equal_quanto():
    from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight

    weight = weights(2)
    scale = AbsmaxOptimizer()(weight, qint8, 0)
    theirs = quantize_weight(weight, qint8, 0, scale, optimized=False)
    form = Int8(scale_dtype="float32")
    ours = form.encode(weight)
    torch.testing.assert_close(ours["scales"][:, None], scale, rtol=2e-7, atol=0)
    assert torch.equal(ours["codes"], theirs._data)
    torch.testing.assert_close(form.decode(ours, SHAPE), theirs.dequantize(), rtol=3e-7, atol=0)


def test_four_bits_in_groups_decode_as_quanto_decodes_them():
    """Its zero points need not be whole; given ours, its codes and its numbers are ours."""
    from optimum.quanto import qint4, quantize_weight

    weight, form = weights(3), Uniform(bits=4, group=32, scale_dtype="float32")
    ours = form.encode(weight)
    zero = unpack_codes(ours["zeros"][None], 4, len(ours["scales"]))[0].to(torch.int8)
    theirs = quantize_weight(weight, qint4, 0, ours["scales"][:, None], zero[:, None], group_size=32, optimized=False)
    torch.testing.assert_close(form.decode(ours, SHAPE), theirs.dequantize(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "form", [AQLM(bits=6, epochs=1, steps=2), AQLM(codebooks=1, bits=9, epochs=1, steps=2)], ids=str
)
def test_additive_codes_decode_as_aqlm_decodes_them(form):
    from aqlm.utils import _dequantize_weight

    weight = weights(4)
    stored = form.encode(weight, Statistics.of(torch.randn(256, SHAPE[1]), ["second_moment"]))
    codes = form.unpack(stored["codes"], SHAPE).long()
    books = stored["codebooks"].float()[:, :, None, :]  # its output groups of one row
    scales = stored["scales"].float()[:, None, None, None]
    torch.testing.assert_close(form.decode(stored, SHAPE), _dequantize_weight(codes, books, scales), rtol=0, atol=1e-6)
