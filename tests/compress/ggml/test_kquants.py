"""Our k-quant writers: read back by the decoders that are compared byte for byte with the gguf package."""

import numpy as np
import pytest
import torch

from paperworks.compress.ggml import blocks as ggml
from paperworks.compress.ggml.format import GGML, K_FALLBACKS

# Mean squared error on N(0, 1) of ggml's own C quantizers, measured on 2^19 samples.
REFERENCE = {"Q2_K": 0.0883, "Q3_K": 0.0228, "Q4_K": 5.10e-3, "Q5_K": 1.31e-3, "Q6_K": 3.15e-4}
NORMAL = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", REFERENCE)
def test_the_error_is_the_reference_quantizers(kind):
    decoded = ggml.decode(ggml.encode(NORMAL, kind), kind)
    error = float((decoded - NORMAL).square().mean())
    assert error == pytest.approx(REFERENCE[kind], rel=0.02)  # 2^17 samples here: about 1% noise


@pytest.mark.parametrize("kind", REFERENCE)
def test_bytes_are_what_the_gguf_package_reads(kind):
    gguf = pytest.importorskip("gguf")
    stored = ggml.encode(NORMAL[:4], kind)
    read = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read, ggml.decode(stored, kind).numpy())


def nearest(x):
    return float(np.round(np.float32(x)))  # half to even


def fit_with_minimum(x, weights, levels, first, step, steps, absolute):
    """The reference search on one sub-block, number by number in float64."""
    low, high = min(x.min(), 0.0), x.max()
    if high <= low:
        return 0.0, -low
    sum_w, sum_x = weights.sum(), (weights * x).sum()

    def error(scale, minimum, q):
        difference = np.abs(scale * q + minimum - x)
        return (weights * (difference if absolute else difference**2)).sum()

    def integers(target):
        return np.clip([nearest(target / (high - low) * (v - low)) for v in x], 0, levels)

    scale = (high - low) / levels
    best = error(scale, low, integers(levels))
    for index in range(steps + 1):
        q = integers(levels + first + step * index)
        sum_q, sum_qq, sum_qx = (weights * q).sum(), (weights * q * q).sum(), (weights * q * x).sum()
        determinant = sum_w * sum_qq - sum_q**2
        if determinant <= 0:
            continue
        new_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant
        new_low = (sum_qq * sum_x - sum_q * sum_qx) / determinant
        if new_low > 0:
            new_low, new_scale = 0.0, sum_qx / sum_qq
        if error(new_scale, new_low, q) < best:
            best, scale, low = error(new_scale, new_low, q), new_scale, new_low
    return scale, -low


def by_the_book(x, kind):
    """Q2_K, Q4_K and Q5_K of one block from the description, without packing: the decoded values."""
    size, levels, top, search = {
        "Q2_K": (16, 3, 15, (-0.5, 0.1, 15)),
        "Q4_K": (32, 15, 63, (-1.0, 0.1, 20)),
        "Q5_K": (32, 31, 63, (-0.5, 0.1, 15)),
    }[kind]
    parts = x.reshape(-1, size)
    fits = []
    for part in parts:
        weights = np.abs(part) + (0 if kind == "Q2_K" else np.sqrt((part**2).mean()))
        fits.append(fit_with_minimum(part, weights, levels, *search, kind == "Q2_K"))
    scales, minima = (np.array(values) for values in zip(*fits, strict=True))
    unit, unit_of_minima = (float(np.float16(values.max() / top)) for values in (scales, minima))
    out = []
    for part, scale, minimum in zip(parts, scales, minima, strict=True):
        d = unit * min(top, nearest(top * scale / scales.max()))
        m = unit_of_minima * min(top, nearest(top * minimum / minima.max()))
        out.append([d * min(max(nearest((v + m) / d), 0), levels) - m for v in part])
    return np.array(out).ravel()


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q5_K"])
def test_blocks_with_minima_follow_the_description_number_by_number(kind):
    x = NORMAL[0].view(4, 256)
    decoded = ggml.decode(ggml.encode(x, kind), kind).double().numpy()
    expected = np.stack([by_the_book(row, kind) for row in x.double().numpy()])
    # float32 sums may tip one trial, and with it the block's largest scale and every value of the block
    equal = np.isclose(decoded, expected, atol=1e-4).mean(axis=1)
    assert np.sort(equal)[1] > 0.97, equal
    errors = [np.square(values - x.double().numpy()).mean() for values in (decoded, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


def test_six_bits_keep_the_largest_of_several_fits():
    """Q6_K by the description: scales of largest (sum w x q)^2 / sum w q^2 over 19 trials."""
    x = NORMAL[1, :256].double().numpy()
    scales = []
    for part in x.reshape(-1, 16):
        extreme = part[np.abs(part).argmax()]
        best, scale = -1.0, 0.0
        for shift in [0, *range(-9, 0), *range(1, 10)]:
            q = np.clip([nearest(-(32 + 0.1 * shift) / extreme * v) for v in part], -32, 31)
            product, square = (part**3 * q).sum(), (part**2 * q * q).sum()
            if product**2 > best * square:
                best, scale = product**2 / square, product / square
        scales.append(scale)
    scales = np.array(scales)
    inverse = -128 / scales[np.abs(scales).argmax()]
    unit = float(np.float16(1 / inverse))
    steps = unit * np.array([min(127, nearest(inverse * s)) for s in scales])
    parts = zip(steps, x.reshape(-1, 16), strict=True)
    expected = np.concatenate([[d * min(max(nearest(v / d), -32), 31) for v in part] for d, part in parts])
    found = ggml.decode(ggml.encode(NORMAL[1:2, :256], "Q6_K"), "Q6_K").double().numpy()[0]
    assert np.isclose(found, expected, atol=1e-5).mean() > 0.97


@pytest.mark.parametrize("kind", REFERENCE)
def test_zeros_constants_and_single_outliers_survive(kind):
    zeros = torch.zeros(1, 256)
    assert torch.equal(ggml.decode(ggml.encode(zeros, kind), kind), zeros)
    ones = torch.ones(1, 256)
    assert (ggml.decode(ggml.encode(ones, kind), kind) - ones).abs().max() < 1e-3  # float16 scales
    spike = zeros.clone()
    spike[0, 37] = -8.0
    assert (ggml.decode(ggml.encode(spike, kind), kind) - spike).abs().max() < 0.02 * 8


@pytest.mark.parametrize("kind", REFERENCE)
def test_writing_what_was_read_changes_little(kind):
    once = ggml.decode(ggml.encode(NORMAL[:8], kind), kind)
    twice = ggml.decode(ggml.encode(once, kind), kind)
    assert (twice - once).square().mean() < 0.35 * (once - NORMAL[:8]).square().mean()


def test_values_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="65504"):
        ggml.encode(torch.full((1, 256), 1e9) * torch.arange(256), "Q4_K")


def test_rows_that_do_not_divide_name_the_fallback():
    with pytest.raises(ValueError, match="multiple of 256 values, got 576; set fallback='Q5_0'"):
        GGML(kind="Q4_K").encode(torch.zeros(2, 576))
    format = GGML(kind="Q4_K", fallback=K_FALLBACKS["Q4_K"])
    weight = torch.randn(3, 576)
    stored = format.encode(weight)
    assert stored["blocks"].shape == (3, 576 // 32 * 22)
    assert format.bits_per_weight((3, 576)) == 5.5
    assert (format.decode(stored, (3, 576)) - weight).abs().max() < 0.2
    assert format.bits_per_weight((3, 1536)) == 4.5
