"""Round to nearest: absmax and zero-point grids, and how many weights may share one."""

from __future__ import annotations

import torch
from torch import Tensor

from paperworks.compress.formats.grids import fake_quantize, find_grid
from paperworks.compress.formats.uniform import Int8, Uniform
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.testbeds.rounded_smollm2 import subject
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="quant-basics",
    title="Introduction to Weight Quantization, and A Visual Guide to Quantization",
    authors="Labonne; Grootendorst",
    year=2023,
    ref="towardsdatascience.com: Introduction to Weight Quantization; newsletter.maartengrootendorst.com",
    family="quantization",
    summary=(
        "Eight evenly spaced bits a weight cost a language model next to nothing, four cost much or little depending "
        "on how many weights share a scale, and a zero point pays where numbers lie to one side."
    ),
    implements=(
        "paperworks.compress.formats.uniform.Uniform",
        "paperworks.compress.formats.uniform.Int8",
        "paperworks.compress.formats.grids.find_grid",
        "paperworks.compress.formats.grids.fake_quantize",
        "paperworks.compress.calibration.activations.static_range",
        "paperworks.compress.calibration.activations.dynamic_int8",
    ),
)

WHOLE = "one scale a matrix"
GROUPED = "zero point, groups of 64"
FORMATS: dict[str, Uniform] = {
    "8 bits, one scale a row": Int8(),
    f"4 bits, {GROUPED}": Uniform(bits=4, group=64),
    "4 bits, absmax, groups of 64": Uniform(bits=4, group=64, symmetric=True),
    "4 bits, zero point, rows": Uniform(bits=4, group=None),
    f"4 bits, zero point, {WHOLE}": Uniform(bits=4, group=None, granularity="tensor"),
}


@paper.claim(
    "Eight bits are nearly free; at four bits it matters how many weights share a scale",
    paper="Labonne: GPT-2 keeps its perplexity in 8 bits; Grootendorst: finer granularity loses less",
    control="the same four bits with one scale a matrix",
)
def granularity_decides_at_four_bits(lab: Lab) -> Verdict:
    """Round all linear layers of SmolLM2's blocks to five formats, and score it on held-out text."""
    known = subject(lab)
    dense = known.perplexity()
    found = {name: known.perplexity(form) for name, form in lab.track(list(FORMATS.items()), "formats")}
    bits = {name: form.bits_per_weight((576, 576)) for name, form in FORMATS.items()}
    rise = {name: value / dense - 1 for name, value in found.items()}
    eight, grouped, absmax, rows, whole = FORMATS
    lab.table(
        "All linear layers of the blocks",
        ["format", "bits a weight", "perplexity", "rise"],
        [["as loaded", 5.0, dense, ""], *([name, bits[name], found[name], f"{rise[name]:+.1%}"] for name in FORMATS)],
    )
    with lab.figure("granularity", figsize=(7.6, 2.6)) as figure:
        axes = figure.subplots()
        names = list(reversed(FORMATS))
        bars = axes.barh(
            names, [found[n] / dense for n in names], color=[CONTROL if n == whole else COLORS[0] for n in names]
        )
        axes.bar_label(bars, [f"{found[n] / dense:,.3g} times" for n in names], padding=5, color=INK)
        axes.set_xscale("log")
        axes.margins(x=0.35)
        axes.grid(axis="y", visible=False)
        axes.set_title("SmolLM2's perplexity after rounding, over what it was")
    return lab.judge(
        checks={
            "8 bits a row raise perplexity by less than 1%": rise[eight] < 0.01,
            "4 bits in groups of 64 by less than 40%": rise[grouped] < 0.4,
            "one scale a matrix multiplies it by more than 10": found[whole] > 10 * dense,
            "matrix worse than row worse than group": found[whole] > found[rows] > found[grouped],
        },
        measured={
            "perplexity, as loaded": dense,
            "rise, 8 bits a row": rise[eight],
            "rise, 4 bits, groups of 64": rise[grouped],
            "rise, 4 bits, groups of 64, absmax": rise[absmax],
            "rise, 4 bits a row": rise[rows],
        },
        control={"times the perplexity, one scale a matrix": found[whole] / dense},
        note=PROVENANCE + known.words + ".",
    )


@paper.claim(
    "A zero point pays where numbers lie to one side",
    paper="Labonne: zero-point quantization suits asymmetric distributions such as the output of ReLU",
    control="absmax on the same numbers; and both on normal ones, where the zero point gains little",
)
def zero_point_suits_one_sided_numbers(lab: Lab) -> Verdict:
    """Round rectified normal numbers, one of each row 50 times too large, and plain ones, to 8 bits."""
    numbers = torch.randn(lab.pick(smoke=16, small=256), 4096, generator=torch.Generator().manual_seed(lab.seed))
    rectified = numbers.relu()
    rectified[:, 0] = 50 * rectified[:, 1:].mean()

    def gain(x: Tensor) -> float:
        error = {kind: (find_grid(x, 8, kind).nearest(x) - x).square().mean() for kind in (True, False)}
        return float(error[True] / error[False])

    one_sided, two_sided = gain(rectified), gain(numbers)
    return lab.judge(
        checks={
            "absmax has at least 3 times the squared error": one_sided >= 3,
            "on normal numbers under 1.5": two_sided < 1.5,
        },
        measured={"squared error of absmax over zero point, one-sided": one_sided},
        control={"the same on normal numbers": two_sided},
        note="A zero point doubles the levels on one side: half the step, a quarter of the squared error.",
    )


@paper.claim(
    "Rounding errs by at most half a step, by a twelfth of its square on average, keeps zeros, and is done once",
    paper="both: x' = round(s x) / s; the error of an even grid",
    kind="exact",
)
def the_arithmetic_of_a_grid(lab: Lab) -> Verdict:
    """Round evenly distributed numbers on grids of 2 to 8 bits of both kinds, twice."""
    size = lab.pick(smoke=1 << 14, small=1 << 16)
    x = 2 * torch.rand(8, size // 8, generator=torch.Generator().manual_seed(lab.seed), dtype=torch.float64) - 1
    x[:, 0] = 0
    worst, noise, moved, zeros = 0.0, 0.0, 0.0, 0.0
    for bits in range(2, 9):
        for symmetric in (True, False):
            grid = find_grid(x, bits, symmetric, scale_dtype=torch.float64)
            once = grid.nearest(x)
            worst = max(worst, float(((once - x).abs() / grid.scale).max()))
            if symmetric:  # the ends of a shifted grid are cut by its rounded zero point
                noise = max(noise, abs(float(((once - x) / grid.scale).square().mean()) * 12 - 1))
            again = find_grid(once, bits, symmetric, scale_dtype=torch.float64).nearest(once)
            moved = max(moved, float((again - once).abs().max()))
            zeros = max(zeros, float(once[:, 0].abs().max()))
    return lab.judge(
        checks={
            "never more than half a step": worst <= 0.5 + 1e-9,
            "s^2 / 12 on average, to 2%": noise < lab.pick(smoke=0.1, small=0.02),
            "zeros stay zeros": zeros == 0,
            "rounding again moves nothing by 1e-12": moved < 1e-12,
            "4 bits in groups of 128 take 4.156": Uniform().bits_per_weight((128, 256)) == 4 + 20 / 128,
        },
        measured={
            "largest error in steps": worst,
            "mean squared error off s^2/12 by": noise,
            "moved by rounding twice": moved,
        },
    )


@paper.claim(
    "Values and gradients of fake quantization are torch's",
    paper="Grootendorst: quantization-aware training passes gradients straight through, 0 where a number was clipped",
    kind="parity",
)
def fake_quantization_is_torchs(lab: Lab) -> Verdict:
    """Compare with torch.fake_quantize_per_channel_affine on numbers of which some are clipped."""
    draws = torch.Generator().manual_seed(lab.seed)
    x = torch.randn(32, 256, generator=draws).requires_grad_()
    mirror = x.detach().clone().requires_grad_()
    grid = find_grid(0.5 * x.detach(), 4, symmetric=False)
    ours = fake_quantize(x, grid)
    theirs = torch.fake_quantize_per_channel_affine(mirror, grid.scale[:, 0], grid.zero[:, 0].int(), 0, 0, 15)
    weights = torch.randn(32, 256, generator=draws)
    ours.backward(weights)
    theirs.backward(weights)
    assert x.grad is not None
    assert mirror.grad is not None
    apart, clipped = float((ours - theirs).detach().abs().max()), float((x.grad == 0).float().mean())
    return lab.judge(
        checks={
            "values agree to 1e-6": apart < 1e-6,
            "gradients are equal": torch.equal(x.grad, mirror.grad),
            "and some numbers were clipped": clipped > 0.01,
        },
        measured={"largest difference": apart, "share clipped": clipped},
    )
