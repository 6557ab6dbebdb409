"""Towards Monosemanticity: the first sparse autoencoder, ReLU and L1, and new life for its dead latents."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch

from paperworks.interpret import sae
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds.planted_features import BATCH, COLUMNS, SETTING, Trained, trained

paper = Paper(
    key="sae-l1",
    title="Towards Monosemanticity: Decomposing Language Models With Dictionary Learning",
    authors="Bricken, Templeton, Batson, Chen, Jermyn, Conerly et al.",
    year=2023,
    ref="transformer-circuits.pub/2023/monosemantic-features",
    family="autoencoders",
    summary=(
        "A wide ReLU layer with an L1 penalty and unit decoder columns, trained to reconstruct a model's activations, "
        "finds directions that mean one thing each, though there are more of them than dimensions."
    ),
    implements=(
        "paperworks.interpret.sae.kinds.standard.Standard",
        "paperworks.interpret.sae.training.Training",
        "paperworks.interpret.sae.training.resample",
        "paperworks.interpret.sae.splice.loss_recovered",
        "paperworks.interpret.sae.evaluation.directions.geometric_median",
    ),
)

PENALTIES = (2.0, 3.0, 4.0, 5.0)
KILLED = 64


def _spec(penalty: float) -> sae.Standard:
    return sae.Standard(latents=256, penalty=penalty, warmup=0.1)


def _at(l0: float, runs: list[Trained]) -> float:
    """Return FVU at an L0: linear between the two runs around it, that of the last run beyond the ends."""
    points = sorted((run.quality.l0, run.quality.fvu) for run in runs)
    for (low, above), (high, below) in pairwise(points):
        if low <= l0 <= high:
            return above + (below - above) * (l0 - low) / (high - low)
    return points[0][1] if l0 < points[0][0] else points[-1][1]


@paper.claim(
    "An L1 penalty finds planted directions, more of them than dimensions, and makes them shrink",
    paper="'Towards Monosemanticity': a sparse overcomplete dictionary decomposes activations in superposition into "
    "features; shrinkage is the known cost of L1 (named in later work)",
    control="the untrained autoencoder's random directions; and the later weighted penalty, which pays less for as "
    "many latents",
)
def finds_planted_directions(lab: Lab) -> Verdict:
    """Train at rising penalties, and compare with random rows and with the 2024 form at equal L0."""
    runs = {penalty: trained(lab, _spec(penalty).build, f"penalty {penalty:g}") for penalty in PENALTIES}
    random = trained(lab, _spec(3.0).build, "untrained", steps=1)
    later = trained(
        lab, sae.Standard(latents=256, penalty=2.0, decoder="weighted", warmup=0.1).build, "lengths in the penalty"
    )
    clipped = trained(lab, _spec(3.0).build, "penalty 3, gradients clipped", clip=1.0)
    ours = runs[3.0]
    here = _at(later.quality.l0, list(runs.values()))
    lab.table(
        "What was trained",
        ["autoencoder", *COLUMNS],
        [
            *([f"L1, penalty {penalty:g}", *run.row] for penalty, run in runs.items()),
            ["L1, penalty 3, gradients clipped to 1", *clipped.row],
            ["2024 form, penalty 2", *later.row],
            ["untrained", *random.row],
        ],
    )
    gammas = [run.quality.bias for run in runs.values()]
    return lab.judge(
        checks={
            "mean best cosine above 0.8 at penalty 3": ours.recovery.mmcs > 0.8,
            "random rows stay below 0.45": random.recovery.mmcs < 0.45,
            "FVU is above the 2024 form's at the same L0": here > later.quality.fvu,
            "reconstructions shrink more, the higher the penalty": gammas == sorted(gammas, reverse=True)
            and gammas[0] < 0.8,
        },
        measured={
            "penalties": list(PENALTIES),
            "mean best cosine": [run.recovery.mmcs for run in runs.values()],
            "directions recovered": [run.recovery.share for run in runs.values()],
            "L0": [run.quality.l0 for run in runs.values()],
            "FVU": [run.quality.fvu for run in runs.values()],
            "shrinkage gamma": gammas,
            "FVU at the 2024 form's L0": here,
            "penalty 3 with gradients clipped to 1: L0, FVU": [clipped.quality.l0, clipped.quality.fvu],
        },
        control={
            "mean best cosine, untrained": random.recovery.mmcs,
            "L0 of the 2024 form": later.quality.l0,
            "FVU of the 2024 form": later.quality.fvu,
            "gamma of the 2024 form": later.quality.bias,
        },
        note=SETTING + " Mean ||x||^2 of 64; 2,000 steps; FVU at an L0 is interpolated between penalties.",
    )


def _kill(model: sae.SparseAutoencoder) -> None:
    """Switch the first 64 latents off for good: no input reaches them, so no gradient does."""
    with torch.no_grad():
        model.get_parameter("encoder_bias")[:KILLED] = -1e3


def _resampling(steps: tuple[int, ...], data: sae.Planted) -> sae.Resampling:
    draws = torch.Generator().manual_seed(77)
    return sae.Resampling(steps, dead_after=100 * BATCH, sample=lambda: data.draw(8192, draws))


@paper.claim(
    "Resampling brings dead latents back as directions that are needed",
    paper="'Neuron Resampling': dead neurons are pointed at inputs that the autoencoder reconstructs badly, four times "
    "in training, and their moments are reset",
    control="the same run without resampling",
)
def resampling_revives_the_dead(lab: Lab) -> Verdict:
    """Kill a quarter of the latents before training, with and without resampling, and count the dead as it goes."""
    steps = lab.pick(smoke=(4, 8), small=(400, 800, 1200, 1600))
    dead: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
    every = lab.pick(smoke=2, small=25)

    def counting(kept: list[tuple[int, float]], step: int, model: sae.SparseAutoencoder) -> None:
        if step % every == 0:
            kept.append((step, float((model.idle >= 100 * BATCH).double().mean())))

    runs = {
        revived: trained(
            lab,
            _spec(3.0).build,
            "resampling" if revived else "no resampling",
            prepare=_kill,
            resampling=partial(_resampling, steps) if revived else None,
            watch=partial(counting, dead[revived]),
        )
        for revived in (True, False)
    }
    _draw_dead(lab, dead, steps)
    with_it, without = runs[True], runs[False]
    return lab.judge(
        checks={
            "fewer than 10% are dead at the end": with_it.quality.dead < 0.10,
            "without it the quarter stays dead": without.quality.dead >= KILLED / 256,
            "more directions are recovered": with_it.recovery.share > without.recovery.share,
            "at a lower error": with_it.quality.fvu < without.quality.fvu,
        },
        measured={
            "dead": with_it.quality.dead,
            "directions recovered": with_it.recovery.share,
            "mean best cosine": with_it.recovery.mmcs,
            "L0": with_it.quality.l0,
            "FVU": with_it.quality.fvu,
        },
        control={
            "dead": without.quality.dead,
            "directions recovered": without.recovery.share,
            "mean best cosine": without.recovery.mmcs,
            "L0": without.quality.l0,
            "FVU": without.quality.fvu,
        },
        note=SETTING + f" {KILLED} latents start with a bias of -1000; penalty 3; dead: not on for 51,200 inputs; "
        f"resampled after steps {', '.join(map(str, steps))}.",
    )


def _draw_dead(lab: Lab, dead: dict[bool, list[tuple[int, float]]], steps: tuple[int, ...]) -> None:
    with lab.figure("dead", figsize=(7.2, 3.2)) as figure:
        axes = figure.subplots()
        for revived, color, label in ((False, CONTROL, "no resampling"), (True, COLORS[0], "resampling")):
            axes.plot(*zip(*dead[revived], strict=True), color=color, label=label)
        for index, step in enumerate(steps):
            axes.axvline(step, color=COLORS[1], linewidth=0.9, linestyle=":", label="" if index else "resampled")
        axes.set_ylim(-0.01, 0.34)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("step")
        axes.set_title("Dead latents, a quarter of which were killed at the start")
        axes.legend(loc="upper right", ncols=3)


@paper.claim(
    "Unit columns, tangent gradients and resampled rows are exactly as described",
    paper="'Sparse Autoencoder Setup' and 'Neuron Resampling': columns of unit norm, gradient information parallel to "
    "them removed; new encoder rows at 0.2 of the mean norm of living ones",
    kind="exact",
)
def steps_are_exact(lab: Lab) -> Verdict:
    """Check columns after every step, gradients, an exact solution, the parameter count and a resampling."""
    lengths: list[float] = []

    def watch(step: int, model: sae.SparseAutoencoder) -> None:
        lengths.append(float((model.decoder.detach().norm(dim=1) - 1).abs().max()))

    run = trained(lab, _spec(3.0).build, "columns", steps=lab.pick(smoke=10, small=200), watch=watch)
    model = run.model
    x = run.data.draw(512, torch.Generator().manual_seed(3))
    model.zero_grad()
    model.loss(x, 1.0)[0].backward()
    assert model.decoder.grad is not None
    largest = float(model.decoder.grad.norm(dim=1).max())
    along = float((model.decoder.grad * model.decoder.detach()).sum(dim=1).abs().max()) / largest
    dead = torch.arange(256) < 40
    alive = float(model.encoder[~dead].detach().norm(dim=1).mean())
    sae.resample(model, x, dead, generator=torch.Generator().manual_seed(4))
    new = float((model.encoder[dead].norm(dim=1) / alive - 0.2).abs().max())
    whole = sae.Standard(latents=128, penalty=0.0).build(64)
    with torch.no_grad():
        both = torch.cat([torch.eye(64), -torch.eye(64)])
        whole.encoder.copy_(both)
        whole.decoder.copy_(both)
        exact = float(whole.loss(x, 1.0)[0] / x.square().sum(dim=1).mean())
    count = sum(parameter.numel() for parameter in model.parameters())
    return lab.judge(
        checks={
            "every column has length 1 after every step, to 1e-6": max(lengths) < 1e-6,
            "gradients have nothing along their columns, to 1e-6 of their length": along < 1e-6,
            "resampled rows have 0.2 of the living ones' length, to 1e-6": new < 1e-6,
            "without a penalty, [I, -I] reconstructs to 1e-12": exact < 1e-12,
            "parameters: 2md + m + d": count == 2 * 256 * 64 + 256 + 64,
        },
        measured={
            "largest error of a column's length": max(lengths),
            "gradient along a column / largest gradient": along,
            "error of resampled lengths": new,
            "relative error of [I, -I]": exact,
            "parameters": count,
        },
    )
