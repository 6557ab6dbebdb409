"""Towards Monosemanticity: the first sparse autoencoder, ReLU and L1, and new life for its dead latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from paperworks.interpret import sae
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.testbeds.planted_features import BATCH, SETTING, trained

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
    equation=r"f = \operatorname{ReLU}(W_e (x - b_d) + b_e), \qquad "
    r"\mathcal{L} = \mathbb{E}_x \Big[ \lVert x - W_d f - b_d \rVert^2 + \lambda \sum_i f_i \Big], \qquad "
    r"\lVert W_{d,i} \rVert = 1",
    usage="""
import torch
from paperworks import train
from paperworks.interpret import sae

data = sae.Planted(mean_square=64.0)  # activations whose directions are known; 64 dimensions
model = sae.Standard(latents=256, penalty=3.0).build(64)  # unit decoder rows
training = sae.Training(model, steps=300)  # keeps rows at length 1, resamples where that is planned
settings = train.Settings(steps=300, lr=2e-3, optimizer=training.optimizer, progress=False, save_every=None)
train.fit(model, training.loss, lambda epoch: data.batches(512, 300, seed=0), settings, on_step=training.after_step)
print(sae.recovery(data.directions, model))
""",
    notes=(
        "Planted directions instead of a one-layer transformer's MLP, so that what should be found is known. Unit rows "
        "and the penalty's warm-up are as in the paper; 256 latents, where it has 4,096 to 131,072."
    ),
    budget_exception="Five autoencoders on each of three seeds, without any of which a check could not be made.",
)

KILLED = 64


def _spec(penalty: float) -> sae.Standard:
    return sae.Standard(latents=256, penalty=penalty, warmup=0.1)


@paper.claim(
    "An L1 penalty finds planted directions, more of them than dimensions, and makes them shrink",
    paper="'Towards Monosemanticity': a sparse overcomplete dictionary decomposes activations in superposition into "
    "features; shrinkage is the known cost of L1 (named in later work)",
    control="the same autoencoder without the penalty; random rows; and the later weighted penalty, which pays less",
)
def finds_planted_directions(lab: Lab) -> Verdict:
    """Train at several penalties, none included, and compare with random rows and with the 2024 form."""

    def arm(name: str, spec: sae.Standard, steps: int = 1500) -> Callable[[int], dict[str, float]]:
        def run(seed: int) -> dict[str, float]:
            done = trained(lab, spec.build, name, steps=steps, seed=seed)
            return {
                "mean best cosine": done.recovery.mmcs,
                "directions recovered": done.recovery.share,
                "L0": done.quality.l0,
                "FVU": done.quality.fvu,
                "shrinkage gamma": done.quality.bias,
            }

        return run

    ours, high, free = "penalty 3", "penalty 4", "no penalty"
    random, later = "random rows", "2024 form, penalty 2"
    specs = {ours: _spec(3.0), high: _spec(4.0), free: _spec(0.0)}
    weighted = sae.Standard(latents=256, penalty=2.0, decoder="weighted", warmup=0.1)
    verdict = lab.compare(
        arms={name: arm(name, spec) for name, spec in specs.items()}
        | {random: arm(random, _spec(3.0), steps=1), later: arm(later, weighted)},
        # Random rows come to 0.38 and the penalty to 0.9: most of that distance.
        main=Beats(ours, free, on="mean best cosine", by=0.3),
        also=[
            Beats(ours, random, on="mean best cosine", by=0.4),
            AtLeast(ours, 0.8, on="mean best cosine"),
            Beats(high, ours, on="shrinkage gamma", by=0.03, lower=True),
            AtMost(ours, 0.8, on="shrinkage gamma"),
            Beats(later, ours, on="FVU", by_ratio=0.2, lower=True),
            Beats(later, ours, on="L0", by_ratio=0.2, lower=True),
        ],
        seeds=3,
        note=SETTING + " Mean ||x||^2 of 64; 1,500 steps. Gamma: E ||x'||^2 / E [x' . x], "
        "below 1 where reconstructions shrink. The 2024 form weighs latents by their rows' lengths.",
    )
    lab.points("mean best cosine", name="cosines")
    return verdict


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
    steps, every = lab.pick(smoke=((4, 8), 2), small=((400, 800, 1200, 1600), 25))

    def arm(name: str, resampled: bool) -> Callable[[int], dict[str, float | list[float]]]:
        def run(seed: int) -> dict[str, float | list[float]]:
            looks: list[float] = []
            dead: list[float] = []

            def watch(step: int, model: sae.SparseAutoencoder) -> None:
                if step % every == 0:
                    looks.append(step)
                    dead.append(100 * float((model.idle >= 100 * BATCH).double().mean()))

            plan = partial(_resampling, steps) if resampled else None
            done = trained(lab, _spec(3.0).build, name, prepare=_kill, resampling=plan, watch=watch, seed=seed)
            return {
                "directions recovered": done.recovery.share,
                "dead at the end": done.quality.dead,
                "FVU": done.quality.fvu,
                "step": looks,
                "dead latents, percent": dead,
            }

        return run

    ours, control = "resampling", "no resampling"
    verdict = lab.compare(
        arms={ours: arm(ours, True), control: arm(control, False)},
        main=Beats(ours, control, on="directions recovered", by=0.1),
        also=[
            Beats(ours, control, on="FVU", lower=True),
            AtMost(ours, 0.10, on="dead at the end"),
            AtLeast(control, KILLED / 256, on="dead at the end"),
        ],
        seeds=3,
        note=SETTING + f" {KILLED} latents start with a bias of -1000; penalty 3; dead: not on for 51,200 inputs; "
        f"resampled after steps {', '.join(map(str, steps))}.",
    )
    lab.curves("dead latents, percent", x="step", name="dead", title="Dead latents; a quarter starts dead, percent")
    return verdict


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
    alive = float(model.encoder.detach()[~dead].norm(dim=1).mean())
    sae.resample(model, x, dead, generator=torch.Generator().manual_seed(4))
    new = float((model.encoder.detach()[dead].norm(dim=1) / alive - 0.2).abs().max())
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
