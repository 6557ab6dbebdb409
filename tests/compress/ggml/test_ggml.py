"""ggml's block formats: exact sizes, known blocks by hand, errors of the writers, bad input."""

import math

import pytest
import torch

from paperworks.compress.ggml.blocks import BLOCKS, WRITABLE, block_format, decode, encode

# k-quants, whose rows are multiples of 256, have tests of their own: compress/test_kquants.py
SHORT_BLOCKS = [name for name in WRITABLE if not name.endswith("_K")]

HALF_TWO = [0x00, 0x40]  # 2.0 as a little-endian float16
HALF_ONE = [0x00, 0x3C]


def block(*parts: list[int]) -> torch.Tensor:
    return torch.tensor([byte for part in parts for byte in part], dtype=torch.uint8)


def test_block_sizes_are_those_of_the_format_specification():
    sizes = {name: BLOCKS[name].bytes for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")}
    assert sizes == {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}
    bits = [BLOCKS[name].bits_per_value for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0")]
    assert bits == [2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5, 4.5]


def test_element_j_and_j_plus_16_share_a_byte():
    raw = block(HALF_TWO, [0x00, 0x00], [0xF0 | j for j in range(16)])
    values = decode(raw, "Q4_1")
    assert values[:16].tolist() == [2.0 * j for j in range(16)]
    assert values[16:].tolist() == [30.0] * 16


def test_the_fifth_bit_of_q5_0_adds_sixteen_to_its_element_only():
    raw = block(HALF_ONE, [0b1, 0, 0, 0b1000_0000], [0] * 16)  # bits 0 and 31
    values = decode(raw, "Q5_0")
    assert values[0] == 0.0
    assert values[31] == 0.0
    assert values[1:31].tolist() == [-16.0] * 30


def test_a_set_mask_bit_of_q3_k_spares_the_offset():
    scales = [0x11] * 8 + [0xAA] * 4  # every six-bit scale is 1 + 32 = 33, that is +1
    raw = block([0x01] * 32, [0] * 64, scales, HALF_ONE)  # mask bit 0: the first 32 values
    values = decode(raw, "Q3_K")
    assert values[:32].tolist() == [0.0] * 32
    assert values[32:].tolist() == [-4.0] * 224


@pytest.mark.parametrize(
    ("type", "mse"), [("Q8_0", 2.88e-5), ("Q4_0", 7.43e-3), ("Q4_1", 6.14e-3), ("Q5_0", 1.84e-3), ("Q5_1", 1.44e-3)]
)
def test_rounding_error_on_normal_values_is_the_published_one(type, mse):
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    measured = (decode(encode(x, type), type) - x).square().mean().item()
    assert measured == pytest.approx(
        mse, rel=0.02
    )  # two samples of the reference differ by 0.4 %; 2 % is five times it


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_plain_types_round_trip_exactly_what_they_can_hold(type):
    x = torch.tensor([[0.0, -0.0, 1.5, -2.25, 1024.0, math.inf, -math.inf, math.nan]])
    back = decode(encode(x, type), type)
    assert torch.equal(back.isnan(), x.isnan())
    assert torch.equal(torch.signbit(back[:, :7]), torch.signbit(x[:, :7]))
    assert torch.equal(back[:, :7], x[:, :7])


@pytest.mark.parametrize("type", SHORT_BLOCKS)
def test_an_all_zero_row_stays_zero(type):
    assert torch.equal(decode(encode(torch.zeros(2, 64), type), type), torch.zeros(2, 64))


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_values_too_small_for_a_reciprocal_do_not_become_infinite(type):
    assert decode(encode(torch.full((1, 32), 1e-42), type), type).abs().max() <= 1e-42


@pytest.mark.parametrize("type", [name for name in BLOCKS if name.startswith("Q") and name != "Q1_0"])
def test_decoding_in_pieces_into_given_memory_and_another_dtype_changes_no_value(type):
    fmt = BLOCKS[type]
    raw = torch.randint(0, 256, (7, 300 * fmt.bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = decode(raw, type)  # 537,600 values and more: many steps
    rows = torch.stack([decode(row, type) for row in raw])
    assert torch.equal(whole.view(torch.int32), rows.view(torch.int32))
    out = torch.empty(7 * 300, fmt.values, dtype=torch.bfloat16)
    assert decode(raw, type, out=out) is out
    assert torch.equal(out.view_as(whole).nan_to_num(), whole.to(torch.bfloat16).nan_to_num())


def test_bytes_at_an_odd_address_decode_alike():
    x = torch.randn(3, 64)
    stored = encode(x, "Q4_0")
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), stored.flatten()])[1:].view_as(stored)
    assert torch.equal(decode(odd, "Q4_0"), decode(stored, "Q4_0"))


@pytest.mark.parametrize(
    ("type", "dtype"),
    [("F64", torch.float64), ("I8", torch.int8), ("I16", torch.int16), ("I32", torch.int32), ("I64", torch.int64)],
)
def test_plain_numbers_of_every_width_are_read(type, dtype):
    numbers = torch.tensor([[1, -2, 100], [0, 7, -128]], dtype=dtype)
    assert torch.equal(decode(numbers.view(torch.uint8), type), numbers.float())


def test_an_empty_tensor_decodes_to_an_empty_tensor():
    assert decode(torch.empty(0, 18, dtype=torch.uint8), "Q4_0").shape == (0, 32)
    assert encode(torch.empty(0, 32), "Q4_0").shape == (0, 18)


def test_unknown_type_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'Q4_K'"):
        block_format("q4_k")


def test_a_type_nobody_can_decode_says_so():
    with pytest.raises(ValueError, match="Q1_0 can be neither decoded here nor by the installed gguf"):
        decode(torch.zeros(BLOCKS["Q1_0"].bytes, dtype=torch.uint8), "Q1_0")


def test_bytes_that_are_not_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="multiple of 18 bytes"):
        decode(torch.zeros(19, dtype=torch.uint8), "Q4_0")
    with pytest.raises(ValueError, match="uint8"):
        decode(torch.zeros(18), "Q4_0")
    with pytest.raises(ValueError, match="32 values"):
        decode(torch.zeros(18, dtype=torch.uint8), "Q4_0", out=torch.empty(31))


def test_what_cannot_be_written_says_what_can():
    with pytest.raises(ValueError, match="IQ4_XS can be read but not written here; what can be written: F32"):
        encode(torch.zeros(256), "IQ4_XS")
    with pytest.raises(ValueError, match="multiple of 32 values, got shape \\(2, 33\\)"):
        encode(torch.zeros(2, 33), "Q8_0")


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16"])
def test_values_beyond_float16_are_refused_not_turned_into_infinities(type):
    with pytest.raises(ValueError, match="65504"):
        encode(torch.full((1, 32), 3e38).index_fill(1, torch.tensor([3]), -3e38), type)
    if type != "F16":
        with pytest.raises(ValueError, match="not finite"):
            encode(torch.full((1, 32), math.nan), type)
