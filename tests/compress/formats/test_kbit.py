"""k-bit data types: their values, what they take, and bitsandbytes' maps."""

import pytest
import torch

from paperworks.compress.format import stored_bits
from paperworks.compress.formats.blockwise import dynamic_code
from paperworks.compress.formats.kbit import KBit, codebook, quantiles

WEIGHT = torch.randn(48, 100, generator=torch.Generator().manual_seed(0))
KINDS = ["int", "float", "dynamic", "quantile"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("block", [64, 1000, None])
def test_what_is_stored_is_what_is_claimed_and_every_weight_gets_the_nearest_value(kind, bits, block):
    format = KBit(bits=bits, kind=kind, block=block)
    stored = format.encode(WEIGHT)
    assert stored_bits(stored, (48, 100)) == pytest.approx(format.bits_per_weight((48, 100)))
    decoded = format.decode(stored, (48, 100))
    values = stored["codebook"].float() if kind == "quantile" else codebook(kind, bits)
    scales = stored["scales"].float().repeat_interleave(block or WEIGHT.numel())[: WEIGHT.numel()].view(48, 100)
    best = (scales[..., None] * values - WEIGHT[..., None]).abs().amin(-1)
    assert torch.allclose((decoded - WEIGHT).abs(), best, atol=1e-6)


def test_four_bits_in_blocks_of_64_take_four_and_a_quarter():
    assert KBit().bits_per_weight((64, 64)) == 4.25


def test_int_has_one_value_less_than_codes_and_all_books_but_quantiles_are_symmetric():
    assert [len(codebook("int", bits)) for bits in (3, 4, 8)] == [7, 15, 255]
    for kind in ("int", "float"):
        for bits in (3, 4, 5, 8):
            values = codebook(kind, bits)
            assert torch.equal(values, -values.flip(0))
            assert len(values) == 2**bits - 1  # zero and minus zero are one


def test_dynamic_is_the_eight_bit_code_of_double_quantization_and_bitsandbytes_map():
    assert torch.allclose(codebook("dynamic", 8), dynamic_code(), atol=1e-7)
    functional = pytest.importorskip("bitsandbytes.functional")
    for bits in (4, 8):
        theirs = functional.create_dynamic_map(signed=True, max_exponent_bits=bits - 1, total_bits=bits).unique()
        assert torch.allclose(codebook("dynamic", bits), theirs.cpu(), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_floats_are_bitsandbytes_map_but_for_its_smaller_subnormals(bits):
    functional = pytest.importorskip("bitsandbytes.functional")
    exponent = 2 if bits == 4 else 3
    theirs = functional.create_fp8_map(
        signed=True, exponent_bits=exponent, precision_bits=bits - 1 - exponent, total_bits=bits
    ).unique()
    mantissas = 2 ** (bits - 1 - exponent)
    normal = mantissas * (2**exponent - 1)  # on each side; theirs places subnormals at a quarter of IEEE's
    for side in (slice(None, normal), slice(-normal, None)):
        assert torch.allclose(codebook("float", bits)[side], theirs.cpu()[side], atol=1e-6)


def test_quantiles_are_used_equally_often():
    sample = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).clamp(-3, 3) / 3
    values = quantiles(sample, 4) * float(quantiles(sample, 4).abs().max())
    counts = torch.bucketize(sample, (values[1:] + values[:-1]) / 2).bincount(minlength=16) / len(sample)
    assert counts[1:-1].max() < 1.7 * counts[1:-1].min()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KBit(bits=9), "bits must be 2 to 8"),
        (lambda: KBit(bits=2, kind="float"), "bits must be 3 to 8"),
        (lambda: KBit(block=1), "block must be at least 2"),
        (lambda: KBit().encode(torch.full((2, 2), 1e6)), "65504"),
    ],
)
def test_what_is_no_k_bit_format_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_zeros_stay_zero():
    for kind in ("int", "float", "dynamic"):
        assert not KBit(kind=kind).decode(KBit(kind=kind).encode(torch.zeros(4, 32)), (4, 32)).any()
