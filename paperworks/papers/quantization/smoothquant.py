"""SmoothQuant: what makes inputs hard to round is divided out of them and multiplied into the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import WeightFormat
from paperworks.compress.formats.smoothquant import W8A8, SmoothQuant, smoothing_scales
from paperworks.kernels.integer_product import int8_product
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS
from paperworks.testbeds.rounded_smollm2 import subject
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
)

NAIVE = W8A8(weights="tensor", activations="tensor")
SMOOTH = SmoothQuant(weights="tensor", activations="tensor")


def signal_to_noise(form: WeightFormat, weight: Tensor, x: Tensor) -> float:
    """Return 10 log10 of the outputs' power over that of their error."""
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
    draws = torch.Generator().manual_seed(lab.seed)
    weight = torch.randn(lab.pick(smoke=32, small=512), 512, generator=draws)
    quiet = torch.randn(lab.pick(smoke=64, small=512), 512, generator=draws)
    loud = quiet.clone()
    loud[:, [7, 100, 400]] *= 100
    exponents = [step / 10 for step in range(11)]
    curve = [
        signal_to_noise(SmoothQuant(weights="tensor", activations="tensor", alpha=alpha), weight, loud)
        for alpha in exponents
    ]
    naive, smooth = signal_to_noise(NAIVE, weight, loud), signal_to_noise(SMOOTH, weight, loud)
    gain_quiet = signal_to_noise(SMOOTH, weight, quiet) - signal_to_noise(NAIVE, weight, quiet)
    with lab.figure("strength", figsize=(7.2, 2.8)) as figure:
        axes = figure.subplots()
        axes.plot(exponents, curve, "o-", color=COLORS[0], label="smoothed")
        axes.axhline(naive, color=COLORS[1], label="not smoothed")
        axes.set_xlabel("alpha: the share of the difficulty that moves to the weights")
        axes.set_ylabel("decibels")
        axes.set_title("Signal to noise of an int8 product with loud input channels")
        axes.legend()
    return lab.judge(
        checks={
            "10 dB more with alpha = 0.5": smooth - naive >= 10,
            "less than 3 dB without loud channels": gain_quiet < 3,
            "all on one side is worse than half and half": max(curve[0], curve[-1]) < smooth,
        },
        measured={"dB, smoothed": smooth, "dB, alpha = 0": curve[0], "dB, alpha = 1": curve[-1]},
        control={"dB, not smoothed": naive, "dB gained without loud channels": gain_quiet},
    )


@paper.claim(
    "SmolLM2 keeps its perplexity with static eight-bit weights and activations when smoothed",
    paper="Table 3: OPT-175B matches FP16 with SmoothQuant-O3 and collapses with naive W8A8",
    control="the same static scales, one a matrix and one for its inputs, without smoothing",
)
def static_scales_work_when_smoothed(lab: Lab) -> Verdict:
    """Score SmolLM2 with int8 products in all linear layers of its blocks."""
    known = subject(lab)
    dense = known.perplexity()
    naive = known.perplexity(W8A8(weights="tensor", activations="static"), decoded=False)
    smooth = known.perplexity(SmoothQuant(weights="tensor", activations="static"), decoded=False)
    return lab.judge(
        checks={"at most half the rise": smooth - dense <= 0.5 * (naive - dense)},
        measured={"perplexity, as loaded": dense, "perplexity, smoothed": smooth},
        control={"perplexity, not smoothed": naive},
        note=PROVENANCE + known.words + ".",
    )


@paper.claim(
    "Half and half makes both maxima their geometric mean, and integer products are exact",
    paper="Equation 4 and Section 4: s_j = sqrt(max|X_j| / max|W_j|)",
    kind="exact",
)
def half_and_half_is_the_geometric_mean(lab: Lab) -> Verdict:
    """Smooth random maxima; undo it; and multiply int8 matrices of awkward shapes."""
    draws = torch.Generator().manual_seed(lab.seed)
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
