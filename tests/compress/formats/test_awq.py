import pytest
import torch
from torch import nn

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.formats.awq import AWQ, channel_scales, fold_into_norm
from paperworks.compress.formats.uniform import Uniform

ROWS, COLUMNS = 16, 64
SHAPE = (ROWS, COLUMNS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = normal(ROWS, COLUMNS)
LOUD = torch.ones(COLUMNS)
LOUD[[5, 33]] = 30.0
X = normal(256, COLUMNS, seed=1) * LOUD
STATISTICS = Statistics.of(X)
PLAIN = Uniform(bits=3, group=16)


def rounded(form, statistics=None):
    return form.decode(form.encode(WEIGHT, statistics), SHAPE)


def loss(result):
    return float(((result - WEIGHT).double() @ X.double().T).square().mean())


@pytest.mark.parity
def test_scales_and_weights_equal_the_papers_search_in_float64():
    """Section 3.2 step by step: mean |x|, a grid of 20 exponents, the error of the outputs themselves."""
    x, weight = X.double(), WEIGHT.double()
    mean = x.abs().mean(0)
    losses = []
    for step in range(20):
        scales = mean.pow(step / 20).clamp(min=1e-4)
        scales = (scales / (scales.max() * scales.min()).sqrt()).to(torch.float16).double()
        out = torch.empty_like(weight)
        for row in range(ROWS):
            for start in range(0, COLUMNS, 16):
                part = weight[row, start : start + 16] * scales[start : start + 16]
                low, high = part.min().clamp(max=0), part.max().clamp(min=0)
                size = ((high - low) / 7).to(torch.float16).double()
                zero = (-low / size).round()
                out[row, start : start + 16] = (((part / size).round() + zero).clamp(0, 7) - zero) * size
        losses.append(float(((out / scales - weight) @ x.T).square().mean()))
    best = min(range(20), key=losses.__getitem__)
    form = AWQ(bits=3, group=16, output_clip=False)
    scales, alpha = form.search(WEIGHT, STATISTICS.second_moment, STATISTICS.absolute_mean)
    assert alpha == best / 20
    assert torch.equal(scales, channel_scales(STATISTICS.absolute_mean, alpha))
    # the second moment is summed in float32
    assert abs(loss(rounded(form, STATISTICS)) / losses[best] - 1) < 1e-4


def test_loud_inputs_get_a_finer_grid():
    found = loss(rounded(AWQ(bits=3, group=16, output_clip=False), STATISTICS))
    assert found < 0.5 * loss(rounded(PLAIN))
    scales, alpha = AWQ(bits=3, group=16).search(WEIGHT, STATISTICS.second_moment, STATISTICS.absolute_mean)
    assert alpha > 0
    assert sorted(scales.topk(2).indices.tolist()) == [5, 33]


def test_clipping_loses_less_still():
    clipped = loss(rounded(AWQ(bits=3, group=16), STATISTICS))
    assert clipped < loss(rounded(AWQ(bits=3, group=16, output_clip=False), STATISTICS))


def test_exponent_zero_is_rounding_to_nearest():
    neutral = Statistics.neutral(COLUMNS)
    assert torch.equal(channel_scales(X.abs().mean(0), 0.0), torch.ones(COLUMNS))
    assert torch.equal(rounded(AWQ(bits=3, group=16, output_clip=False), neutral), rounded(PLAIN))


def test_a_channel_scaled_by_s_has_an_error_s_times_smaller():
    """Equation 3, where the largest weight of the group is another channel's: expected |error| falls as 1 / s."""
    weight = normal(4096, 16) * 0.2
    weight[:, 0], weight[:, 2] = 3.0, -3.0
    grid = Uniform(bits=8, group=16).grid(weight)  # steps so fine that the errors spread evenly over them

    def error(s):
        scaled = weight.clone()
        scaled[:, 1] *= s
        return float((grid.nearest(scaled)[:, 1] / s - weight[:, 1]).abs().mean())

    assert abs(error(1.0) / error(4.0) / 4 - 1) < 0.05


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_folding_leaves_the_function_unchanged(norm):
    before = norm(COLUMNS)
    nn.init.uniform_(before.weight, 0.5, 2.0)
    linears = [nn.Linear(COLUMNS, 8), nn.Linear(COLUMNS, 24)]
    x = normal(5, COLUMNS)
    expected = [linear(before(x)) for linear in linears]
    fold_into_norm(before, linears, channel_scales(X.abs().mean(0), 0.5))
    for linear, wanted in zip(linears, expected, strict=True):
        assert (linear(before(x)) - wanted).abs().max() < 1e-5


def test_stored_bytes_are_the_claimed_bits_and_reencoding_changes_nothing():
    form = AWQ(bits=3, group=16)
    stored = form.encode(WEIGHT, STATISTICS)
    bits = 8 * sum(x.nbytes for x in stored.values()) / WEIGHT.numel()
    assert bits == form.bits_per_weight(SHAPE) == PLAIN.bits_per_weight(SHAPE) + 16 / ROWS
    decoded = form.decode(stored, SHAPE)
    assert torch.allclose(form.decode(form.reencode(decoded, stored), SHAPE), decoded, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AWQ(group=None, granularity="tensor"), "Uniform takes these"),
        (lambda: AWQ(clip=2.0), "output_clip"),
        (lambda: AWQ(group=16).encode(WEIGHT), "calibration=batches"),
        (lambda: fold_into_norm(nn.LayerNorm(8, elementwise_affine=False), [], torch.ones(8)), "norm with a gain"),
        (lambda: fold_into_norm(nn.RMSNorm(8), [nn.Linear(4, 4)], torch.ones(8)), "reads 4 inputs"),
    ],
)
def test_bad_input_is_told_what_to_do(build, words):
    with pytest.raises(ValueError, match=words):
        build()
