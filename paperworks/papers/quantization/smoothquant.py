"""SmoothQuant: what makes inputs hard to round is divided out of them and multiplied into the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import WeightFormat
from paperworks.compress.formats.smoothquant import W8A8, SmoothQuant, smoothing_scales
from paperworks.kernels.integer_product import int8_product
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.papers.quantization._rounded_model import bench
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="smoothquant",
    title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    authors="Xiao, Lin, Seznec, Wu, Demouth, Han",
    year=2022,
    ref="arXiv:2211.10438",
    family="quantization",
    summary=(
        "Weights are easy to round to eight bits, inputs with a few loud channels are not. Dividing each channel by a "
        "scale and multiplying the weight with it shares the difficulty, and integers can do the product."
    ),
    implements=(
        "paperworks.compress.formats.smoothquant.SmoothQuant",
        "paperworks.compress.formats.smoothquant.W8A8",
        "paperworks.compress.formats.smoothquant.smoothing_scales",
        "paperworks.kernels.integer_product.int8_product",
    ),
    equation=r"Y = (X \operatorname{diag}(s)^{-1}) (\operatorname{diag}(s) W), \quad "
    r"s_j = \max |X_j|^\alpha / \max |W_j|^{1 - \alpha}",
    usage="""
import torch
from paperworks import compress

model = torch.nn.Sequential(torch.nn.Linear(512, 256))
texts = [torch.randn(64, 512) * torch.cat([torch.full((3,), 100.0), torch.ones(509)]) for _ in range(4)]
exact = model(texts[0])
smooth = compress.SmoothQuant(weights="tensor", activations="static")
out = compress.apply(model, smooth, calibration=texts)(texts[0])
print("error in int8:", ((out - exact).norm() / exact.norm()).item())
""",
    notes="Each layer is smoothed for itself; the paper folds the scales into the norm before.",
)

NAIVE = W8A8(weights="tensor", activations="tensor")
SMOOTH = SmoothQuant(weights="tensor", activations="tensor")


def signal_to_noise(form: WeightFormat, weight: Tensor, x: Tensor) -> float:
    """10 log10 of the outputs' power over that of their error."""
    stored = form.encode(weight, Statistics.of(x, form.needs) if form.needs else None)
    exact = x @ weight.T
    error = form.multiply(x, stored, (weight.shape[0], weight.shape[1])) - exact
    return float(10 * (exact.square().sum() / error.square().sum()).log10())


@paper.claim(
    "Behind loud channels, smoothing gains ten decibels",
    paper="Section 4 and Figure 4: outliers of activations are moved into the weights",
    control="eight bits on both sides without smoothing; and inputs without loud channels, with nothing to gain",
)
def smoothing_gains_decibels(lab: Lab) -> Verdict:
    """Multiply random matrices in int8, one scale each, with 3 of 512 input channels 100 times louder, and without."""
    rows = lab.pick(smoke=32, small=512)

    def arm(form: WeightFormat) -> Callable[[int], dict[str, float]]:
        def decibels(seed: int) -> dict[str, float]:
            draws = lab.generator(seed)
            weight, quiet = torch.randn(rows, 512, generator=draws), torch.randn(rows, 512, generator=draws)
            loud = quiet.clone()
            loud[:, torch.randperm(512, generator=draws)[:3]] *= 100
            return {"dB, loud": signal_to_noise(form, weight, loud), "dB, quiet": signal_to_noise(form, weight, quiet)}

        return decibels

    ours, plain, on_inputs, on_weights = "alpha = 0.5", "not smoothed", "alpha = 0", "alpha = 1"
    forms: dict[str, WeightFormat] = {ours: SMOOTH, plain: NAIVE}
    forms |= {name: replace(SMOOTH, alpha=alpha) for name, alpha in ((on_inputs, 0.0), (on_weights, 1.0))}
    verdict = lab.compare(
        arms={name: arm(form) for name, form in forms.items()},
        main=Beats(ours, plain, on="dB, loud", by=10),
        also=[
            Beats(ours, on_inputs, on="dB, loud"),
            Beats(ours, on_weights, on="dB, loud"),
            Within(ours, plain, on="dB, quiet", by=3),
        ],
        seeds=10,
        note="Alpha is the share of the difficulty that moves to the weights.",
    )
    lab.points("dB, loud", name="strength", title="Signal to noise of an int8 product behind loud channels")
    return verdict


@paper.claim(
    "SmolLM2 keeps more of its perplexity with static eight-bit weights and activations when smoothed",
    paper="Table 3: OPT-175B matches FP16 with SmoothQuant-O3 and collapses with naive W8A8",
    control="the same static scales, one a matrix and one for its inputs, without smoothing",
    reach="real",
)
def static_scales_work_when_smoothed(lab: Lab) -> Verdict:
    """Score SmolLM2 with int8 products in all linear layers of its blocks."""
    bed = bench(lab, scored=2, length=256, calibrated=2)
    how = {"decoded": False, "sequential": False}  # as in the paper, the model as loaded is calibrated
    verdict = lab.compare(
        arms={
            "smoothed": bed.arm(SmoothQuant(weights="tensor", activations="static"), **how),
            "not smoothed": bed.arm(W8A8(weights="tensor", activations="static"), **how),
        },
        main=Beats("smoothed", "not smoothed", on="nats lost", by_ratio=0.3, lower=True),
        seeds=3,
        note=PROVENANCE + bed.words + ".",
    )
    lab.points("nats lost", title="What SmolLM2 loses in static int8, nats a token")
    return verdict


@paper.claim(
    "Half and half makes both maxima their geometric mean, and integer products are exact",
    paper="Equation 4 and Section 4: s_j = sqrt(max|X_j| / max|W_j|)",
    kind="exact",
)
def half_and_half_is_the_geometric_mean(lab: Lab) -> Verdict:
    """Smooth random maxima; undo it; and multiply int8 matrices of awkward shapes."""
    draws = lab.generator(lab.seed)
    x, weight = torch.randn(64, 96, generator=draws).exp(), torch.randn(32, 96, generator=draws)
    tops = x.abs().amax(0), weight.abs().amax(0)
    scales = smoothing_scales(*tops, 0.5)
    mean = (tops[0] * tops[1]).sqrt()
    apart = max(
        float(((x / scales).abs().amax(0) / mean - 1).abs().max()),
        float(((weight * scales).abs().amax(0) / mean - 1).abs().max()),
    )
    exact = x @ weight.T
    moved = float(((x / scales) @ (weight * scales).T - exact).abs().max() / exact.abs().max())
    wrong = 0
    for tokens, columns, rows in ((1, 1, 1), (17, 576, 192), (3, 101, 7)):
        a, b = (torch.randint(-127, 128, (n, columns), generator=draws, dtype=torch.int8) for n in (tokens, rows))
        wrong += int((int8_product(a, b).long() != a.long() @ b.long().T).sum())
    return lab.judge(
        checks={
            "both maxima are sqrt(max|X| max|W|), to 1e-5": apart < 1e-5,
            "smoothing alone changes the product by less than 1e-5": moved < 1e-5,
            "alpha 0 and 1 leave all to one side": torch.allclose(smoothing_scales(*tops, 0.0), 1 / tops[1])
            and torch.allclose(smoothing_scales(*tops, 1.0), tops[0]),
            "no integer product is off": wrong == 0,
        },
        measured={"largest relative difference of maxima": apart, "of the product": moved, "wrong integers": wrong},
    )
