"""GLU variants: a feed-forward part whose hidden units are multiplied by gates learns more from as many parameters."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import torch
from torch import Tensor

from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import T5Initialization, count_parameters
from paperworks.nn import MLP, Feedforward, GatedMLP
from paperworks.nn.feedforward.mlp import Activation, GatedMLPModule, gated_hidden
from paperworks.testbeds.characters import LR, character_llama, held_out_loss, play, trained

paper = Paper(
    key="glu-variants",
    title="GLU Variants Improve Transformer",
    authors="Shazeer",
    year=2020,
    ref="arXiv:2002.05202",
    family="blocks",
    summary=(
        "The hidden units of a Transformer's feed-forward part become products of two linear maps of the input, one of "
        "them through an activation: with two thirds of the width, which keeps the parameters, perplexity falls."
    ),
    implements=("paperworks.nn.feedforward.mlp.GatedMLP", "paperworks.nn.feedforward.mlp.gated_hidden"),
)

UNGATED: dict[str, Activation] = {"ReLU": "relu", "GELU": "gelu", "Swish": "silu"}
GATED: dict[str, Activation] = {
    "GLU": "sigmoid",
    "Bilinear": "identity",
    "ReGLU": "relu",
    "GEGLU": "gelu",
    "SwiGLU": "silu",
}
TABLE_1 = {  # held-out log-perplexity after 65,536 steps
    "ReLU": 1.997,
    "GELU": 1.983,
    "Swish": 1.994,
    "GLU": 1.982,
    "Bilinear": 1.960,
    "ReGLU": 1.953,
    "GEGLU": 1.942,
    "SwiGLU": 1.944,
}


def variant(name: str, hidden: int) -> Feedforward:
    """Return a row of Table 1; `hidden` is the width of the ungated ones, of which gated ones get two thirds."""
    if name in UNGATED:
        return MLP(hidden=hidden, activation=UNGATED[name], bias=False)
    return GatedMLP(hidden=gated_hidden(hidden), activation=GATED[name])


@paper.claim(
    "The gated variants have the parameters of the others, and the two simplest are quadratic",
    paper="Section 2, Equations 5 and 6; Section 3.1: d_ff = 3072 becomes 2048",
    kind="exact",
    control="the gated variant at the full width",
)
@torch.no_grad()
def widths_and_forms(lab: Lab) -> Verdict:
    """Count parameters at T5-base's width; compare with the equations in float64; scale an input; let V be W."""
    counts = {name: sum(p.numel() for p in _meta(variant(name, 3072), 768).parameters()) for name in [*UNGATED, *GATED]}
    wide = sum(p.numel() for p in _meta(GatedMLP(hidden=3072), 768).parameters())
    draws = torch.Generator().manual_seed(lab.seed)
    x = torch.randn(1, 32, 12, dtype=torch.float64, generator=draws)

    def built(activation: Activation) -> GatedMLPModule:
        torch.manual_seed(lab.seed)
        module = GatedMLP(hidden=20, activation=activation).build(12).double()
        assert isinstance(module, GatedMLPModule)
        return module

    apart = 0.0
    for name, activation in GATED.items():
        module = built(activation)
        gate, up, down = (part.weight.t() for part in (module.gate, module.up, module.down))
        apart = max(apart, float((module(x) - (_written(name, x @ gate) * (x @ up)) @ down).abs().max()))
    bilinear, swiglu, reglu = built("identity"), built("silu"), built("relu")
    quadratic = float((bilinear(3 * x) - 9 * bilinear(x)).abs().max())
    reglu.up.weight.copy_(reglu.gate.weight)
    squared = (x @ reglu.gate.weight.t()).relu().square() @ reglu.down.weight.t()
    return lab.judge(
        checks={
            "all eight have the parameters of two matrices 768 x 3072": set(counts.values()) == {2 * 768 * 3072},
            "at the full width a gated one has half as many again": wide == 3 * 768 * 3072,
            "all five are their equations to 1e-12": apart < 1e-12,
            "Bilinear: f(3x) = 9 f(x)": quadratic < 1e-12,
            "SwiGLU is not quadratic": float((swiglu(3 * x) - 9 * swiglu(x)).abs().max()) > 1e-3,
            "ReGLU with V = W is a squared ReLU": float((reglu(x) - squared).abs().max()) < 1e-12,
        },
        measured={
            "parameters": list(counts.values()),
            "largest difference from the equations": apart,
            "largest difference from a quadratic, Bilinear": quadratic,
        },
        control={"parameters at the full width": wide},
    )


def _meta(feedforward: Feedforward, dim: int) -> torch.nn.Module:
    with torch.device("meta"):
        return feedforward.build(dim)


def _written(name: str, z: Tensor) -> Tensor:
    """Return the activation of a variant as the paper writes it."""
    written = {
        "GLU": lambda z: 1 / (1 + (-z).exp()),
        "Bilinear": lambda z: z,
        "ReGLU": lambda z: z * (z > 0),
        "GEGLU": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
        "SwiGLU": lambda z: z / (1 + (-z).exp()),
    }
    out: Tensor = written[name](z)
    return out


@paper.claim(
    "With equal parameters and steps, gated variants learn more than ungated ones",
    paper="Table 1: after 65,536 steps GEGLU 1.942 and SwiGLU 1.944, ReLU 1.997; every gated one is at most 1.982",
    control="ReLU, GELU and Swish without gates, as wide as gives the same parameters",
)
def gated_learn_more(lab: Lab) -> Verdict:
    """Train all eight on characters of tinyshakespeare, three seeds each; a seed decides windows for all."""
    steps = lab.pick(smoke=1, small=180, large=3000)
    seeds = tuple(lab.seed + offset for offset in range(lab.pick(smoke=1, small=3)))
    dim, depth, hidden = lab.pick(smoke=(24, 1, 48), small=(96, 2, 384))
    play()  # before the bars: it may have to be fetched
    base = replace(character_llama(dim=dim, depth=depth), init=T5Initialization())  # the paper's test bed
    specs = {name: replace(base, block=replace(base.blocks[0], feedforward=variant(name, hidden))) for name in TABLE_1}
    losses = {
        name: [held_out_loss(lab, trained(lab, spec, steps, seed, f"{name}, seed {seed}")) for seed in seeds]
        for name, spec in specs.items()
    }
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    gains = {
        name: [relu - value for relu, value in zip(losses["ReLU"], losses[name], strict=True)]
        for name in ("GEGLU", "SwiGLU")
    }
    counts = {count_parameters(spec) for spec in specs.values()}
    gated, ungated = (statistics.fmean(means[name] for name in group) for group in (GATED, UNGATED))
    _draw(lab, losses)
    lab.table(
        "The same parameters, steps and data",
        ["variant", "loss", "below ReLU by", "Table 1", "below ReLU there by"],
        [
            [name, means[name], means["ReLU"] - means[name], TABLE_1[name], TABLE_1["ReLU"] - TABLE_1[name]]
            for name in TABLE_1
        ],
    )
    return lab.judge(
        checks={
            "GEGLU and SwiGLU are at least 0.01 nats below ReLU": (
                max(means["GEGLU"], means["SwiGLU"]) <= means["ReLU"] - 0.01
            ),
            "with every seed": min(map(min, gains.values())) > 0,
            "the gated ones are lower than the ungated, on average": gated < ungated,
            "all have equal parameters": len(counts) == 1,
        },
        measured={
            **{f"loss, {name}": means[name] for name in GATED},
            "below ReLU by seed, GEGLU": gains["GEGLU"],
            "below ReLU by seed, SwiGLU": gains["SwiGLU"],
            "mean of the gated": gated,
            "best gated below best ungated by": (
                min(means[name] for name in UNGATED) - min(means[name] for name in GATED)
            ),
        },
        control={
            **{f"loss, {name}": means[name] for name in UNGATED},
            "loss by seed, ReLU": losses["ReLU"],
            "mean of the ungated": ungated,
        },
        note=f"{depth} layers, width {dim}, {hidden} hidden units without gates and {gated_hidden(hidden)} with, "
        f"{steps} steps of 1,024 characters, peak rate {LR} for all, seeds {', '.join(map(str, seeds))}; nats "
        "a character on the last tenth. The runs are short: what counts is how fast a model learns. A first design had "
        "initial weights N(0, 0.02^2), with which pre-activations begin at 0.2: there gates multiply two small "
        "numbers, GELU and Swish are nearly linear, and ReLU led (ReLU 2.166, GEGLU 2.181, SwiGLU 2.189). Here they "
        "are N(0, 1 / inputs), as in T5.",
    )


def _draw(lab: Lab, losses: dict[str, list[float]]) -> None:
    with lab.figure("variants", figsize=(8.4, 3.6)) as figure:
        here, there = figure.subplots(1, 2, sharey=True)
        for row, (name, values) in enumerate(losses.items()):
            color = CONTROL if name in UNGATED else COLORS[0]
            here.plot(values, [row] * len(values), "o", color=color, alpha=0.5)
            here.plot(statistics.fmean(values), row, "|", color=color, markersize=18, markeredgewidth=2.5)
            there.plot(TABLE_1[name], row, "|", color=color, markersize=18, markeredgewidth=2.5)
        here.set_yticks(range(len(losses)), list(losses))
        here.set_ylim(len(losses) - 0.5, -0.5)
        here.set(title="Here: characters, three seeds", xlabel="nats a character, held out")
        there.set(title="Table 1: T5 on C4, 65,536 steps", xlabel="log-perplexity, held out")
        for axes in (here, there):
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.1)
