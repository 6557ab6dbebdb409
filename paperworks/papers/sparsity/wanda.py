"""Wanda: a weight matters by its size times the norm of its input; remove the rest and change nothing."""

from __future__ import annotations

import torch

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.pruning.sparse import Magnitude, Wanda
from paperworks.compress.pruning.sparsegpt import SparseGPT
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds.rounded_smollm2 import subject
from paperworks.testbeds.smollm2 import PROVENANCE

paper = Paper(
    key="wanda",
    title="A Simple and Effective Pruning Approach for Large Language Models",
    authors="Sun, Liu, Bair, Kolter",
    year=2023,
    ref="arXiv:2306.11695",
    family="sparsity",
    summary=(
        "Some inputs of a layer are a hundred times larger than others, so a weight's magnitude alone says little: "
        "|w| times the norm of its input, compared within each output, tells which weights can go."
    ),
    implements=("paperworks.compress.pruning.sparse.Wanda", "paperworks.compress.pruning.sparse.Magnitude"),
)


@paper.claim(
    "SmolLM2 with two of every four weights removed: Wanda far below magnitude pruning, near SparseGPT",
    paper="Table 3: LLaMA-7B on WikiText2, 2:4: magnitude 42.13, SparseGPT 11.00, Wanda 11.53; dense 5.68",
    control="magnitude pruning to the same pattern",
)
def two_of_four_can_go(lab: Lab) -> Verdict:
    """Prune the linear layers of SmolLM2's blocks to 2:4, block after block, and score the model on text."""
    known = subject(lab)
    dense = known.perplexity()
    formats = {
        "Wanda": Wanda(pattern="2:4"),
        "SparseGPT": SparseGPT(pattern="2:4"),
        "magnitude": Magnitude(pattern="2:4"),
    }
    found = {name: known.perplexity(format) for name, format in lab.track(list(formats.items()), "ways to prune")}
    lab.table(
        "Two of every four weights removed",
        ["method", "perplexity", "over the dense model's"],
        [["as loaded", dense, 1.0], *([name, found[name], found[name] / dense] for name in formats)],
    )
    return lab.judge(
        checks={
            "perplexity of magnitude at least 1.5 times Wanda's": found["magnitude"] >= 1.5 * found["Wanda"],
            "SparseGPT <= Wanda < magnitude": found["SparseGPT"] <= found["Wanda"] < found["magnitude"],
        },
        measured={"perplexity, Wanda": found["Wanda"], "perplexity, as loaded": dense},
        control={"perplexity, magnitude": found["magnitude"], "perplexity, SparseGPT": found["SparseGPT"]},
        note=PROVENANCE + known.words + ".",
    )


@paper.claim(
    "The wider the inputs' scales are spread, the more Wanda gains over magnitude",
    paper="Section 3: large-magnitude features make the weight's magnitude a poor guide",
    control="magnitude pruning of the same weights; and inputs of equal scale, where both remove about the same",
)
def scales_of_inputs_tell(lab: Lab) -> Verdict:
    """Prune a random matrix to 50% behind inputs whose scales spread by 1, 10 and 100."""
    size = lab.pick(smoke=64, small=512)
    draws = torch.Generator().manual_seed(lab.seed)
    weight = torch.randn(size, size, generator=draws)
    ratios: dict[int, float] = {}
    for spread in (1, 10, 100):
        scales = spread ** torch.rand(size, generator=draws)
        x = torch.randn(4 * size, size, generator=draws) * scales
        statistics = Statistics.of(x, ("second_moment",))
        lost = []
        for format in (Wanda(), Magnitude()):
            pruned = format.decode(format.encode(weight, statistics), (size, size))
            lost.append(float(((pruned - weight) @ x.T).square().sum()))
        ratios[spread] = lost[0] / lost[1]
    with lab.figure("spread", figsize=(5.6, 2.6)) as figure:
        axes = figure.subplots()
        bars = axes.bar([str(spread) for spread in ratios], list(ratios.values()), color=COLORS[0], width=0.5)
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios.values()], padding=3)
        axes.axhline(1, color=CONTROL)
        axes.margins(y=0.15)
        axes.set_xlabel("largest over smallest scale of the inputs")
        axes.set_title("Squared output error of Wanda over magnitude's")
    return lab.judge(
        checks={
            "at most 0.3 of magnitude's error at a spread of 100": ratios[100] <= 0.3,
            "falling with the spread": ratios[100] < ratios[10] < ratios[1],
            "between 0.9 and 1.1 without": 0.9 <= ratios[1] <= 1.1,
        },
        measured={f"ratio at a spread of {spread}": ratios[spread] for spread in (10, 100)},
        control={"ratio without spread": ratios[1]},
    )


@paper.claim(
    "Scaling an input up and its weights down changes nothing for Wanda; with equal inputs it is magnitude by row",
    paper="Section 3: the score is |W_ij| ||X_j||, compared within each output",
    kind="exact",
)
def invariant_to_scaling_inputs(lab: Lab) -> Verdict:
    """Compare the masks before and after moving scales of powers of two between inputs and weights."""
    draws = torch.Generator().manual_seed(lab.seed)
    weight, x = torch.randn(24, 40, generator=draws), torch.randn(100, 40, generator=draws)
    scales = 2.0 ** torch.randint(-4, 5, (40,), generator=draws)
    masks = {}
    for format in (Wanda(), Magnitude()):
        before, after = (
            format.choose(w, Statistics.of(inputs, ("second_moment",)))[1]
            for w, inputs in ((weight, x), (weight / scales, x * scales))
        )
        masks[type(format).__name__] = int((before != after).sum())
    equal = Wanda().choose(weight, Statistics.neutral(40))[1]
    by_row = weight.abs() > weight.abs().sort(1).values[:, 19:20]
    return lab.judge(
        checks={
            "Wanda's mask stays": masks["Wanda"] == 0,
            "magnitude's does not": masks["Magnitude"] > 0,
            "20 of 40 removed in each row": bool((equal.sum(1) == 20).all()),
            "the smallest of each row where inputs are equal": torch.equal(equal, by_row),
        },
        measured={"changed by Wanda": masks["Wanda"], "changed by magnitude": masks["Magnitude"]},
    )
