import pytest
import torch
from torch import nn

from paperworks import compress
from paperworks.compress.calibration.activations import dynamic_int8, static_grid, static_range
from paperworks.compress.formats.grids import fake_quantize, find_grid, round_to_bfloat16, ternary
from paperworks.compress.formats.uniform import Int8, Uniform
from paperworks.kernels.bit_packing import pack_codes, packed_bytes, unpack_codes

SHAPE = (12, 64)
FORMATS = [
    Int8(),
    Uniform(bits=4, group=32),
    Uniform(bits=3, group=16, symmetric=True),
    Uniform(bits=8, group=None),
    Uniform(bits=5, group=None, granularity="column"),
    Uniform(bits=7, group=None, granularity="tensor", symmetric=True),
    Uniform(bits=2, group=64, clip=2.4),
    Uniform(bits=6, group=32, scale_dtype="float32"),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(form, weight):
    return form.decode(form.encode(weight), tuple(weight.shape))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 24, 37])
def test_packed_codes_come_back_in_the_claimed_bytes(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, -(-columns * bits // 8)) == (5, packed_bytes(columns, bits))
    assert torch.equal(unpack_codes(packed, bits, columns), codes.to(torch.uint8))


def test_three_bit_codes_stand_in_the_order_of_their_bits():
    codes = torch.tensor([[1, 0, 7, 2, 0, 5, 0, 3]])
    word = sum(code << (3 * place) for place, code in enumerate(codes[0].tolist()))
    assert pack_codes(codes, 3)[0].tolist() == list(word.to_bytes(3, "little"))


def naive(weight, form):
    """The catalogue's equations in float64, slice by slice; scales as the format stores them."""
    weight = weight.double()
    out = torch.empty_like(weight)
    rows, columns = weight.shape
    boxes = {
        "tensor": [(slice(None), slice(None))],
        "column": [(slice(None), slice(j, j + 1)) for j in range(columns)],
        "row": [
            (slice(i, i + 1), slice(j, j + (form.group or columns)))
            for i in range(rows)
            for j in range(0, columns, form.group or columns)
        ],
    }[form.granularity]
    kept = getattr(torch, form.scale_dtype)
    for box in boxes:
        x = weight[box]
        if form.symmetric:
            top = 2 ** (form.bits - 1) - 1
            scale = (x.abs().max() / top).to(kept).double()
            out[box] = (x / scale).round().clamp(-top, top) * scale
        else:
            low, high = x.min().clamp(max=0), x.max().clamp(min=0)
            scale = ((high - low) / (2**form.bits - 1)).to(kept).double()
            zero = (-low / scale).round().clamp(0, 2**form.bits - 1)
            out[box] = ((x / scale).round() + zero).clamp(0, 2**form.bits - 1).sub(zero) * scale
    return out


@pytest.mark.parametrize("form", [form for form in FORMATS if form.clip is None], ids=str)
def test_decoded_weights_equal_the_equations_in_float64(form):
    weight = normal(*SHAPE)
    # float32 divides within 2^-24; no number of this seed is so close to the middle of two levels
    assert (rounded(form, weight) - naive(weight, form)).abs().max() < 1e-6


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_stored_bytes_are_the_claimed_bits(form):
    stored = form.encode(normal(*SHAPE))
    assert 8 * sum(x.nbytes for x in stored.values()) / (SHAPE[0] * SHAPE[1]) == form.bits_per_weight(SHAPE)
    assert all(x.is_contiguous() for x in stored.values())


def test_four_bits_in_groups_of_128_take_4_156_bits():
    assert Uniform(bits=4, group=128).bits_per_weight((256, 256)) == 4 + (16 + 4) / 128
    assert Uniform(bits=3, group=64, symmetric=True).bits_per_weight((256, 256)) == 3 + 16 / 64
    assert Int8().bits_per_weight((256, 256)) == 8 + 16 / 256


@pytest.mark.parametrize("form", [form for form in FORMATS if form.clip is None], ids=str)
def test_the_error_is_at_most_half_a_step(form):
    weight = normal(*SHAPE)
    slices = form.slices(weight)
    grid = form.grid(slices)
    error = (grid.nearest(slices) - slices).abs() / grid.scale
    # half a step, and what rounding the scale to float16 (2^-11 of up to 2^bits - 1 steps) moves the ends
    assert error.max() <= 0.5 + 2.0**-11 * (2**form.bits - 1) + 1e-5
    assert error.max() > 0.4


@pytest.mark.parametrize("form", [form for form in FORMATS if form.symmetric], ids=str)
def test_symmetric_rounding_again_changes_no_bit(form):
    once = rounded(form, normal(*SHAPE))
    assert torch.equal(rounded(form, once), once)


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_rounding_again_changes_nothing(bits):
    """With exact scales; float16 ones can move the ends of a range by a level."""
    x = normal(200, 32).double()
    once = find_grid(x, bits, symmetric=False, scale_dtype=torch.float64).nearest(x)
    twice = find_grid(once, bits, symmetric=False, scale_dtype=torch.float64).nearest(once)
    assert (twice - once).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zero_stays_exactly_zero(form):
    weight = normal(*SHAPE)
    weight[:, ::3] = 0
    assert (rounded(form, weight)[:, ::3] == 0).all()
    assert torch.equal(rounded(form, torch.zeros(SHAPE)), torch.zeros(SHAPE))


def test_one_sided_numbers_are_held_with_zero_in_the_range():
    weight = 1 + torch.rand(4, 32, generator=torch.Generator().manual_seed(0))
    assert (rounded(Uniform(bits=4, group=32), weight) - weight).abs().max() <= 2 / 15 / 2 + 2e-3


def test_uniform_numbers_lose_a_twelfth_of_the_squared_step():
    x = 2 * torch.rand(1, 1 << 18, generator=torch.Generator().manual_seed(0)) - 1
    for bits in (4, 8):
        grid = find_grid(x, bits, symmetric=True)
        noise = (grid.nearest(x) - x).double().square().mean() / (grid.scale.double() ** 2 / 12)
        assert abs(float(noise) - 1) < 0.01  # 2^18 draws: 0.2% standard deviation


def test_normal_numbers_in_groups_of_32_lose_the_known_amount():
    """The catalogue's figure for 8-bit absmax, 2.88e-5."""
    weight = normal(1024, 1024, seed=5)
    error = (rounded(Uniform(bits=8, group=32, symmetric=True), weight) - weight).square().mean()
    assert abs(float(error) / 2.88e-5 - 1) < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_the_clipping_search_finds_the_least_error_of_its_eighty_ranges(symmetric, power):
    x = normal(6, 64)
    x[:, 0] *= 6
    grid = find_grid(x, 3, symmetric, clip=power)
    for row in range(6):
        errors = []
        for step in range(80):
            low, high = x[row].min() * (1 - step / 100), x[row].max() * (1 - step / 100)
            candidate = static_grid(float(low), float(high), 3, symmetric)
            errors.append(float((candidate.nearest(x[row]) - x[row]).abs().pow(power).sum()))
        found = float((grid.nearest(x)[row] - x[row]).abs().pow(power).sum())
        assert abs(found / min(errors) - 1) < 1e-5
        assert found < errors[0]


@pytest.mark.parity
def test_values_and_gradients_equal_torchs_fake_quantization():
    x = normal(6, 40).requires_grad_()
    mirror = x.detach().clone().requires_grad_()
    # a range narrower than the data, so that some numbers are clipped
    grid = find_grid(x.detach() * 0.5, 4, symmetric=False)
    ours = fake_quantize(x, grid)
    theirs = torch.fake_quantize_per_channel_affine(mirror, grid.scale[:, 0], grid.zero[:, 0].int(), 0, 0, 15)
    assert (ours - theirs).abs().max() < 1e-6
    upstream = normal(6, 40, seed=1)
    ours.backward(upstream)
    theirs.backward(upstream)
    assert torch.equal(x.grad, mirror.grad)
    assert 0 < (x.grad == 0).sum() < x.numel()


@pytest.mark.parity
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_equal_torchs_quantized_tensors(symmetric):
    x = normal(1, 4096)
    grid = find_grid(x, 8, symmetric)
    kind = torch.qint8 if symmetric else torch.quint8
    theirs = torch.quantize_per_tensor(x, float(grid.scale), int(grid.zero), kind).int_repr()
    assert torch.equal(grid.codes(x).int(), theirs.int())


def test_the_lowest_code_of_int8_is_minus_127():
    weight = torch.tensor([[-1.0, 0.5, 0.25, 0.0]])
    assert Int8().encode(weight)["codes"].min() == -127


def test_merging_keeps_the_format_and_a_compressed_layer_computes_with_it():
    layer = nn.Linear(64, 12)
    weight = layer.weight.detach().clone()
    model = compress.apply(nn.Sequential(layer), Uniform(bits=4, group=32), "0")
    x = normal(3, 64).requires_grad_()
    out = model(x)
    decoded = rounded(Uniform(bits=4, group=32), weight)
    assert torch.allclose(out, x @ decoded.T + layer.bias, atol=1e-6)
    out.sum().backward()
    assert torch.allclose(x.grad, decoded.sum(0).expand(3, -1), atol=1e-6)


def test_scales_can_be_trained_through_decode():
    form = Uniform(bits=4, group=32)
    stored = form.encode(normal(*SHAPE))
    stored["scales"] = stored["scales"].float().requires_grad_()
    form.decode(stored, SHAPE).sum().backward()
    codes = unpack_codes(stored["codes"], 4, 64).view(-1, 32).float()
    zeros = unpack_codes(stored["zeros"][None], 4, 24)[0].float()[:, None]
    assert torch.allclose(stored["scales"].grad, (codes - zeros).sum(1), atol=1e-4)


def test_ternary_numbers_are_rounded_multiples_of_the_mean_magnitude():
    weight = torch.tensor([[-2.0, 0.3, 0.6, 1.1]])  # mean magnitude 1
    codes, gamma = ternary(weight)
    assert float(gamma) == 1.0
    assert codes.tolist() == [[-1, 0, 1, 1]]


def test_bfloat16_rounding_equals_torchs():
    x = torch.cat((normal(4096), normal(4096) * 1e-38, torch.tensor([0.0, -0.0, 3.38e38, 1.00390625, 1.01171875])))
    assert torch.equal(round_to_bfloat16(x).view(torch.int32), x.bfloat16().float().view(torch.int32))


def test_dynamic_scales_are_one_a_token():
    x = normal(2, 3, 16) * torch.tensor([1.0, 100.0, 0.0])[:, None]
    codes, scale = dynamic_int8(x)
    assert scale.shape == (2, 3, 1)
    assert codes.dtype == torch.int8
    assert ((codes * scale - x).abs() <= scale / 2 + 1e-6).all()
    assert codes[:, :2].abs().amax(-1).eq(127).all()
    assert dynamic_int8(x, per_token=False)[1].numel() == 1


def test_static_ranges_cut_what_their_method_says():
    x = normal(50_000)
    x[0] = 80.0
    assert static_range(x) == (-80.0, 80.0)
    low, high = static_range(x, "minmax", symmetric=False)
    assert high == 80.0
    assert low == float(x.min())
    cut = static_range(x, "percentile", percentile=99.9)[1]
    assert abs(cut - 3.29) < 0.15  # the 99.9% point of |N(0, 1)|

    def loss(top):
        return float((static_grid(-top, top, 4).nearest(x) - x).square().mean())

    searched = static_range(x, "mse", bits=4)[1]
    assert loss(searched) == min(loss(80.0 * step / 100) for step in range(1, 101))
    assert static_range(x, "kl")[1] < 40


def test_a_range_of_kl_keeps_what_has_no_tail():
    x = 2 * torch.rand(50_000, generator=torch.Generator().manual_seed(0)) - 1
    assert static_range(x, "kl")[1] > 0.95


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Uniform(bits=1), "bits must be 2 to 8, got 1"),
        (lambda: Uniform(bits=9), "bits must be 2 to 8, got 9"),
        (lambda: Uniform(group=0), "None for whole rows"),
        (lambda: Uniform(granularity="tensor"), "set group=None"),
        (lambda: Uniform(clip=0.0), "exponent"),
        (lambda: Int8(bits=4), "Uniform takes others"),
        (lambda: Uniform(group=128).encode(torch.ones(2, 96)), "these do: 8, 12, 16, 24, 32, 48, 96"),
        (lambda: Uniform(group=None).encode(torch.full((2, 8), 1e30)), "store scales as float32"),
        (lambda: Uniform(group=None).encode(torch.full((2, 8), torch.nan)), "NaN"),
        (lambda: pack_codes(torch.tensor([[4]]), 2), "0..3, got 4..4"),
        (lambda: pack_codes(torch.tensor([[4]]), 9), "1 to 8 bits"),
        (lambda: unpack_codes(torch.zeros(1, 3, dtype=torch.uint8), 4, 8), "take 4 bytes"),
        (lambda: static_range(torch.ones(3), "entropy"), "range method"),
        (lambda: static_range(torch.ones(0)), "finite samples"),
        (lambda: static_range(torch.ones(3), "percentile", percentile=5.0), "above 50"),
    ],
)
def test_bad_input_is_told_what_to_do(build, words):
    with pytest.raises(ValueError, match=words):
        build()
