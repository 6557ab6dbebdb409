"""Weight formats beside the libraries that made them known: torchao and aqlm on the same numbers."""

import pytest
import torch

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats.aqlm import AQLM
from paperworks.compress.formats.uniform import Int8, Uniform
from paperworks.kernels.bit_packing import unpack_codes

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
