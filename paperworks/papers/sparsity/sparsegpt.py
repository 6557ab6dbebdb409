"""SparseGPT: remove half of a model's weights in one pass, each made up for by those not yet decided."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.pruning.sparse import Magnitude, Wanda
from paperworks.compress.pruning.sparsegpt import SparseGPT
from paperworks.lab import Beats, Lab, Paper, Verdict
from paperworks.papers.quantization._rounded_model import bench
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
    equation=r"\min_{M, \hat W} \lVert W X - (M \odot \hat W) X \rVert^2, \quad \text{removed first: least } "
    r"w_k^2 / [H^{-1}]_{kk}^2, \quad H = X X^\top + \lambda I",
    usage="""
import torch
from paperworks import compress

torch.manual_seed(0)
texts = [torch.randn(256, 64) @ torch.randn(64, 512) for _ in range(4)]  # inputs that correlate
for format in (compress.Wanda(), compress.SparseGPT()):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(512, 256))
    exact = model(texts[0])
    out = compress.apply(model, format, calibration=texts)(texts[0])
    print(type(format).__name__, "error", ((out - exact).norm() / exact.norm()).item())
""",
    notes="Pruned weights are zeros in a dense matrix: nothing is faster here.",
)

BLOCKS = range(0, 30, 4)  # each column is solved for in turn: every fourth block, for time


@paper.claim(
    "SmolLM2 without half of the weights of every fourth block: SparseGPT loses least, magnitude pruning most",
    paper="Table 1: OPT-175B on WikiText2 8.35 dense, 8.21 with 50% removed by SparseGPT, 1.7e4 by magnitude",
    control="Wanda: as good a choice of weights, but nothing makes up for them; and magnitude pruning",
    reach="real",
)
def half_the_weights_can_go(lab: Lab) -> Verdict:
    """Prune linear layers of SmolLM2 to 50% and score the model on text."""
    bed = bench(lab, blocks=BLOCKS)
    formats = {"SparseGPT": SparseGPT(), "Wanda": Wanda(), "magnitude": Magnitude()}
    verdict = lab.compare(
        arms={name: bed.arm(format, sequential=False) for name, format in formats.items()},
        main=Beats("SparseGPT", "magnitude", on="nats lost", by_ratio=0.5, lower=True),
        also=[
            Beats("SparseGPT", "Wanda", on="nats lost", lower=True),
            Beats("Wanda", "magnitude", on="nats lost", lower=True),
        ],
        seeds=3,
        note=PROVENANCE
        + bed.words
        + ". All linear layers of 8 of the 30 blocks are pruned, each calibrated in the model as loaded.",
    )
    lab.points("nats lost", title="What SmolLM2 loses with half of the weights of 8 blocks, nats a token")
    return verdict


@paper.claim(
    "Removing weights one by one in the order of columns, with the exact inverse Hessian, gives the same weights",
    paper="Section 3: optimal brain surgeon updates, restricted to the columns not yet decided",
    kind="exact",
)
def equals_optimal_brain_surgeon(lab: Lab) -> Verdict:
    """Apply the surgeon's update delta = -w_p / G_pp G_p with G = (H_pp..)^-1 column after column, in float64."""
    draws = lab.generator(lab.seed)
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
