"""Round to nearest: absmax and zero-point grids, and how many weights may share one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paperworks.compress.formats.grids import fake_quantize, find_grid
from paperworks.compress.formats.uniform import Int8, Uniform
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.papers.quantization._rounded_model import bench
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
    equation=r"\hat x = s \left( \operatorname{clamp}\left( \left\lfloor x / s \right\rceil + z, 0, 2^b - 1 \right) "
    r"- z \right)",
    usage="""
import torch
from paperworks import compress

for bits, group in ((8, None), (4, 64), (4, None)):
    model = torch.nn.Sequential(torch.nn.Linear(512, 256))
    x = torch.randn(32, 512)
    exact = model(x)
    out = compress.apply(model, compress.Uniform(bits=bits, group=group))(x)
    size = round(compress.report(model).bits_per_weight, 3)
    print(bits, "bits,", size, "stored: error", ((out - exact).norm() / exact.norm()).item())
""",
    notes="Both texts explain; they measure little. The claims are what they say in general, on SmolLM2.",
)

EIGHT, GROUPED, ROWS, WHOLE = "8 bits, rows", "4 bits, groups of 64", "4 bits, rows", "4 bits, one scale a matrix"
FORMATS: dict[str, Uniform] = {
    EIGHT: Int8(),
    GROUPED: Uniform(bits=4, group=64),
    ROWS: Uniform(bits=4, group=None),
    WHOLE: Uniform(bits=4, group=None, granularity="tensor"),
}


@paper.claim(
    "Eight bits are nearly free; at four bits it matters how many weights share a scale",
    paper="Labonne: GPT-2 keeps its perplexity in 8 bits; Grootendorst: finer granularity loses less",
    control="the same four bits with a scale a row, and with one a matrix",
    reach="real",
)
def granularity_decides_at_four_bits(lab: Lab) -> Verdict:
    """Round all linear layers of SmolLM2's blocks to four formats, and score it."""
    bed = bench(lab)
    verdict = lab.compare(
        arms={name: bed.arm(form) for name, form in FORMATS.items()},
        main=Beats(GROUPED, ROWS, on="nats lost", by_ratio=0.25, lower=True),
        also=[Beats(ROWS, WHOLE, on="nats lost", by=1.0, lower=True), AtMost(EIGHT, 0.01, on="nats lost")],
        seeds=3,
        measured={f"bits a weight, {name}": form.bits_per_weight((576, 576)) for name, form in FORMATS.items()},
        note=PROVENANCE + bed.words + ". The grids of four bits have a zero point.",
    )
    lab.points("perplexity", name="granularity", log=True, title="Perplexity of SmolLM2 when rounded")
    return verdict


@paper.claim(
    "A zero point pays where numbers lie to one side",
    paper="Labonne: zero-point quantization suits asymmetric distributions such as the output of ReLU",
    control="absmax on the same numbers; and both on normal ones, where the zero point gains little",
)
def zero_point_suits_one_sided_numbers(lab: Lab) -> Verdict:
    """Round rectified normal numbers, one of each row 50 times too large, and plain ones, to 8 bits."""
    rows = lab.pick(smoke=16, small=256)

    def arm(symmetric: bool) -> Callable[[int], dict[str, float]]:
        def error(x: Tensor) -> float:
            return float((find_grid(x, 8, symmetric).nearest(x) - x).square().mean())

        def errors(seed: int) -> dict[str, float]:
            numbers = torch.randn(rows, 4096, generator=lab.generator(seed))
            rectified = numbers.relu()
            rectified[:, 0] = 50 * rectified[:, 1:].mean()
            return {"squared error, one-sided": error(rectified), "squared error, normal": error(numbers)}

        return errors

    return lab.compare(
        arms={"zero point": arm(False), "absmax": arm(True)},
        main=Beats("zero point", "absmax", on="squared error, one-sided", by_ratio=2 / 3, lower=True),
        also=[Within("zero point", "absmax", on="squared error, normal", by_ratio=1 / 3)],
        seeds=10,
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
    x = 2 * torch.rand(8, size // 8, generator=lab.generator(lab.seed), dtype=torch.float64) - 1
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
    draws = lab.generator(lab.seed)
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
