"""Wanda: a weight matters by its size times the norm of its input; remove the rest and change nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paperworks.compress import WeightFormat
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.pruning.sparse import Magnitude, Wanda
from paperworks.lab import Beats, Lab, Paper, Verdict, Within
from paperworks.papers.quantization._rounded_model import bench
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
    equation=r"S_{ij} = |W_{ij}| \, \lVert X_j \rVert_2, \quad \text{the smallest of each row are removed}",
    usage="""
import torch
from paperworks import compress

scales = torch.logspace(0, 2, 512)[torch.randperm(512)]  # inputs of unequal size
texts = [torch.randn(64, 512) * scales for _ in range(4)]
for format in (compress.Magnitude(pattern="2:4"), compress.Wanda(pattern="2:4")):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 256))
    exact = model(texts[0])
    out = compress.apply(model, format, calibration=texts)(texts[0])
    print(type(format).__name__, "error", ((out - exact).norm() / exact.norm()).item())
""",
    notes="Pruned weights are zeros in a dense matrix; no kernel here makes 2:4 faster.",
)


@paper.claim(
    "SmolLM2 with two of every four weights removed loses far less by Wanda than by magnitude",
    paper="Table 3: LLaMA-7B on WikiText2, 2:4: magnitude 42.13, SparseGPT 11.00, Wanda 11.53; dense 5.68",
    control="magnitude pruning to the same pattern",
    reach="real",
)
def two_of_four_can_go(lab: Lab) -> Verdict:
    """Prune the linear layers of SmolLM2's blocks to 2:4, block after block, and score the model on text."""
    bed = bench(lab, calibrated=4)
    verdict = lab.compare(
        arms={"Wanda": bed.arm(Wanda(pattern="2:4")), "magnitude": bed.arm(Magnitude(pattern="2:4"))},
        # The paper's distance is ln(42.13 / 11.53) = 1.3 nats.
        main=Beats("Wanda", "magnitude", on="nats lost", by=1.0, lower=True),
        seeds=3,
        note=PROVENANCE + bed.words + ".",
    )
    lab.points("nats lost", title="What SmolLM2 loses with two of every four weights, nats a token")
    return verdict


@paper.claim(
    "The wider the inputs' scales are spread, the more Wanda gains over magnitude",
    paper="Section 3: large-magnitude features make the weight's magnitude a poor guide",
    control="magnitude pruning of the same weights; and inputs of equal scale, where both remove about the same",
)
def scales_of_inputs_tell(lab: Lab) -> Verdict:
    """Prune a random matrix to 50% behind inputs whose scales spread by 1, 10 and 100."""
    size = lab.pick(smoke=64, small=256)

    def arm(format: WeightFormat) -> Callable[[int], dict[str, float]]:
        def errors(seed: int) -> dict[str, float]:
            draws = lab.generator(seed)
            weight, found = torch.randn(size, size, generator=draws), {}
            for spread in (1, 10, 100):
                x = torch.randn(4 * size, size, generator=draws) * spread ** torch.rand(size, generator=draws)
                stored = format.encode(weight, Statistics.of(x, ("second_moment",)))
                lost = (format.decode(stored, (size, size)) - weight) @ x.T
                found[f"error, spread {spread}"] = float(lost.square().sum() / (weight @ x.T).square().sum())
            return found

        return errors

    verdict = lab.compare(
        arms={"Wanda": arm(Wanda()), "magnitude": arm(Magnitude())},
        main=Beats("Wanda", "magnitude", on="error, spread 100", by_ratio=0.7, lower=True),
        also=[
            Beats("Wanda", "magnitude", on="error, spread 10", by_ratio=0.3, lower=True),
            Within("Wanda", "magnitude", on="error, spread 1", by_ratio=0.1),
        ],
        seeds=10,
        note="Squared error of the outputs, relative to their square.",
    )
    lab.points("error, spread 100", name="spread", title="Squared output error with half of the weights removed")
    return verdict


@paper.claim(
    "Scaling an input up and its weights down changes nothing for Wanda; with equal inputs it is magnitude by row",
    paper="Section 3: the score is |W_ij| ||X_j||, compared within each output",
    kind="exact",
)
def invariant_to_scaling_inputs(lab: Lab) -> Verdict:
    """Compare the masks before and after moving scales of powers of two between inputs and weights."""
    draws = lab.generator(lab.seed)
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
