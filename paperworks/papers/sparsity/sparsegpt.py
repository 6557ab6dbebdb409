"""SparseGPT: remove half of a model's weights in one pass, each made up for by those not yet decided."""

from __future__ import annotations

import statistics as stats

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import compress, train
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.pruning.sparse import Magnitude, Wanda
from paperworks.compress.pruning.sparsegpt import SparseGPT
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds.rounded_smollm2 import subject
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="sparsegpt",
    title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    authors="Frantar, Alistarh",
    year=2023,
    ref="arXiv:2301.00774",
    family="sparsity",
    summary=(
        "Pruning is rounding to zero: with GPTQ's error feedback each removed weight is made up for by the columns to "
        "its right, and half of the weights can go at once, without training."
    ),
    implements=("paperworks.compress.pruning.sparsegpt.SparseGPT",),
)


@paper.claim(
    "SmolLM2 without half of its weights: SparseGPT loses least, then Wanda, then magnitude pruning",
    paper="Table 1: OPT-175B on WikiText2 8.35 dense, 8.21 with 50% removed by SparseGPT, 1.7e4 by magnitude",
    control="magnitude pruning: the smallest weights go, whatever their inputs bring, and nothing makes up for them",
)
def half_the_weights_can_go(lab: Lab) -> Verdict:
    """Prune the linear layers of SmolLM2's blocks to 50%, block after block, and score the model on text."""
    known = subject(lab)
    dense = known.perplexity()
    formats = {"SparseGPT": SparseGPT(), "Wanda": Wanda(), "magnitude": Magnitude()}
    found: dict[str, float] = {}
    errors: dict[str, list[float]] = {}
    for name, format in lab.track(list(formats.items()), "ways to prune"):
        # magnitude needs no data; calibrated all the same, so that its output errors are measured
        pruned = compress.apply(known.model_copy(), format, known.targets, calibration=known.calibration)
        report = compress.report(pruned)
        errors[name] = [layer.error.output or 0.0 for layer in report.layers if layer.error is not None]
        found[name] = train.perplexity(compress.decompress(pruned), known.tokens, known.context)
    ratio = stats.median(ours**2 / plain**2 for ours, plain in zip(*_pair(errors), strict=True))
    lab.table(
        "Half of the weights removed",
        ["method", "perplexity", "rise", "median output error of a layer"],
        [
            ["as loaded", dense, "", ""],
            *(
                [name, found[name], f"{found[name] / dense - 1:+.1%}", f"{stats.median(errors[name]):.1%}"]
                for name in formats
            ),
        ],
    )
    with lab.figure("perplexity", figsize=(7.2, 2.4)) as figure:
        axes = figure.subplots()
        names = list(reversed(formats))
        colors = [COLORS[0] if name == "SparseGPT" else CONTROL for name in names]
        bars = axes.barh(names, [found[name] for name in names], color=colors, height=0.6)
        axes.bar_label(bars, [f"{found[name]:.1f}" for name in names], padding=5)
        axes.axvline(dense, color=COLORS[1], linewidth=1.2)
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_title(f"SmolLM2 without half of its weights: perplexity (line: dense, {dense:.1f})")
    return lab.judge(
        checks={
            "perplexity of magnitude at least 1.5 times SparseGPT's": found["magnitude"] >= 1.5 * found["SparseGPT"],
            "SparseGPT < Wanda < magnitude": found["SparseGPT"] < found["Wanda"] < found["magnitude"],
            "a layer's squared output error at most 0.6 of magnitude's, in the median": ratio <= 0.6,
        },
        measured={"perplexity, SparseGPT": found["SparseGPT"], "perplexity, as loaded": dense, "squared error": ratio},
        control={"perplexity, magnitude": found["magnitude"], "perplexity, Wanda": found["Wanda"]},
        note=PROVENANCE + known.words + ".",
    )


def _pair(errors: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    return errors["SparseGPT"], errors["magnitude"]


@paper.claim(
    "Removing weights one by one in the order of columns, with the exact inverse Hessian, gives the same weights",
    paper="Section 3: optimal brain surgeon updates, restricted to the columns not yet decided",
    kind="exact",
)
def equals_optimal_brain_surgeon(lab: Lab) -> Verdict:
    """Apply the surgeon's update delta = -w_p / G_pp G_p with G = (H_pp..)^-1 column after column, in float64."""
    draws = torch.Generator().manual_seed(lab.seed)
    weight, x = torch.randn(6, 16, generator=draws), torch.randn(80, 16, generator=draws)
    statistics = Statistics.of(x, ("second_moment",))
    format = SparseGPT(damping=0.0, block=16)
    corrected, kept = format.choose(weight, statistics)
    expected = _surgery(weight.double(), statistics.required("second_moment").double(), ~kept)
    apart = float((corrected.double() - expected).abs().max())
    neutral = Statistics.neutral(64)
    wide = torch.randn(8, 64, generator=draws)
    unchanged, mask = SparseGPT(block=64, damping=0.0).choose(wide, neutral)
    removed = int((~mask).sum())
    smallest = wide.abs().flatten().sort().values[removed - 1]
    pattern = SparseGPT(pattern="2:4").choose(wide, Statistics.of(torch.randn(200, 64, generator=draws)))[1]
    return lab.judge(
        checks={
            "equal to the surgeon's updates, to 1e-5": apart < 1e-5,
            "inputs without correlation: what is kept is unchanged": torch.equal(unchanged[mask], wide[mask]),
            "and the smallest magnitudes go": bool((wide.abs() <= smallest).eq(~mask).all()),
            "int(share * weights) + 1 of a block are removed": removed == int(0.5 * wide.numel()) + 1,
            "with 2:4, two of every four": bool((pattern.view(-1, 4).sum(1) == 2).all()),
        },
        measured={"largest difference": apart, "removed of 512": removed},
    )


def _surgery(
    weight: Float[Tensor, "rows columns"], hessian: Float[Tensor, "columns columns"], pruned: Tensor
) -> Float[Tensor, "rows columns"]:
    weight = weight.clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(weight.shape[0]):
            if pruned[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight
