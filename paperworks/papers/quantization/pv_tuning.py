"""PV-Tuning: train the codes of a compressed network as well, a few at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import compress
from paperworks.compress.formats.kmeans_vq import KMeansVQ
from paperworks.compress.formats.pv_tuning import PVTuning, largest_groups, tunable, v_step
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.testbeds.pictures import Classes, Images, accuracy, fit, network

paper = Paper(
    key="pv-tuning",
    title="PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression",
    authors="Malinovskii, Mazur, Ilin, Kuznedelev, Burlachenko, Yi, Alistarh, Richtarik",
    year=2024,
    ref="arXiv:2405.14852",
    family="quantization",
    summary=(
        "Compressed weights are codes and the values they stand for. Gradients move the values with ease, the codes "
        "only if each step is kept for few of them: then a network of one bit a weight gets much of its accuracy back."
    ),
    implements=(
        "paperworks.compress.formats.pv_tuning.PVTuning",
        "paperworks.compress.formats.pv_tuning.v_step",
        "paperworks.compress.formats.kmeans_vq.KMeansVQ",
    ),
)

FORMAT = KMeansVQ(group=4, codes=16)
STYLES = 30  # patterns of each class: so many that a network of 1 bit a weight cannot hold all of them
NOISE = 0.4  # standard deviation on images whose own is about 0.7
VALUE_RATE = 3e-3  # of the codebooks
SHARE = 0.01  # of the groups a V step may change, the repository's
CODE_RATES = (0.03, 0.01, 0.1)  # straight-through estimation and PV-Tuning each have the best of these
VALUE_RATES = (3e-3, 1e-3, 1e-2)  # codebooks alone have the best of these


@dataclass
class Trained:
    """A network of one bit a weight, and what became of it."""

    loss: float  # divergence from the dense network's outputs on the training images
    accuracy: float
    rate: float = 0.0  # of the codes
    changes: list[int] = field(default_factory=list)  # of codes, a step


@dataclass(frozen=True)
class Task:
    """A dense network, the images it learned, and those it is judged on."""

    dense: nn.Module
    learned: Images
    held_out: Images
    steps: int
    seed: int

    @classmethod
    def make(cls, lab: Lab) -> Task:
        """Train the dense network."""
        classes = Classes.smooth(STYLES, NOISE)
        learned, held_out = classes.draw(4000, 10 * lab.seed + 2), classes.draw(2000, 10 * lab.seed + 3)
        dense = network(lab.seed)
        fit(dense, learned, steps=lab.pick(smoke=4, small=600), rate=3e-3, seed=lab.seed, schedule="linear")
        return cls(dense.eval(), learned, held_out, lab.pick(smoke=2, small=300), lab.seed)

    def divergence(self, model: nn.Module, batch: Images) -> Tensor:
        """Return KL(dense network || model) of the predicted classes."""
        with torch.no_grad():
            wanted = self.dense(batch.pixels).log_softmax(-1)
        return functional.kl_div(model(batch.pixels).log_softmax(-1), wanted, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def judge(self, model: nn.Module) -> Trained:
        """Measure a network as it is."""
        return Trained(float(self.divergence(model, self.learned)), accuracy(model, self.held_out))

    def tuned(self, start: nn.Module, optimizer: Callable[[nn.Module], PVTuning]) -> Trained:
        """Tune a copy of the compressed network, and measure it as it is stored."""
        model = copy.deepcopy(start)
        changes: list[int] = []
        with tunable(model):
            made = optimizer(model)
            fit(
                model,
                self.learned,
                steps=self.steps,
                rate=VALUE_RATE,
                seed=self.seed,
                schedule="linear",
                loss=self.divergence,
                optimizer=made,
                on_step=lambda step: changes.append(made.changed),  # returns None: go on
            )
        found = self.judge(model)
        return Trained(found.loss, found.accuracy, float(made.defaults["code_lr"]), changes)


@paper.claim(
    "At one bit a weight, training few codes at a time beats straight-through estimation and codebooks alone",
    paper="Llama-2-7B at 2 bits (the authors' repository): WikiText2 perplexity 5.68 with PV-Tuning, 5.92 with AQLM "
    "fine-tuned as a whole",
    control="no training (PTQ), codebooks only (P), straight-through estimation (STE), each with the same bits and "
    "steps; and V steps of the same length over all groups from where the weights are",
)
def few_codes_at_a_time(lab: Lab) -> Verdict:
    """Cluster a network's weights to one bit each and train 300 steps towards the dense network's outputs."""
    with lab.threads(1):
        task = Task.make(lab)
        start = compress.apply(copy.deepcopy(task.dense), FORMAT, "all-linear")
        base = partial(PVTuning, lr=VALUE_RATE)
        rates = lab.pick(smoke=CODE_RATES[:1], small=CODE_RATES)
        alone = lab.pick(smoke=VALUE_RATES[:1], small=VALUE_RATES)
        plans = [("P", partial(base, lr=rate, share=0.0)) for rate in alone]
        plans += [("STE", partial(base, code_lr=rate, share=1.0)) for rate in rates]
        plans += [("PV", partial(base, code_lr=rate, share=SHARE)) for rate in rates]
        found = {"PTQ": task.judge(start)}
        for name, plan in lab.track(plans, "methods and rates"):
            result = task.tuned(start, plan)
            if name not in found or result.loss < found[name].loss:  # the best rate, by what is trained
                found[name] = result
        best = found["PV"].rate
        found["all groups"] = task.tuned(start, partial(base, code_lr=best, share=1.0, decay=1.0))
        full = task.judge(task.dense)
    _draw(lab, found, full.accuracy)
    lab.table(
        "Networks of one bit a weight after 300 steps",
        ["method", "divergence from the dense network", "held-out accuracy", "rate of the codes", "changes of codes"],
        [[name, run.loss, run.accuracy, run.rate, sum(run.changes)] for name, run in found.items()],
    )
    order = ["PTQ", "P", "STE", "PV"]
    accuracy, loss = {n: found[n].accuracy for n in order}, {n: found[n].loss for n in order}
    return lab.judge(
        checks={
            "PV is at least 2 points above codebooks only": accuracy["PV"] >= accuracy["P"] + 0.02,
            "and at least as accurate as STE": accuracy["PV"] >= accuracy["STE"],
            "accuracy in the order PTQ, P, STE, PV": all(accuracy[a] < accuracy[b] for a, b in pairwise(order)),
            "so is the objective": all(loss[a] > loss[b] for a, b in pairwise(order)),
            "V steps of the same length over all groups change no code": sum(found["all groups"].changes) == 0,
        },
        measured={
            "accuracy, PV": accuracy["PV"],
            "divergence, PV": loss["PV"],
            "changes of codes, PV": sum(found["PV"].changes),
            "accuracy, dense": full.accuracy,
        },
        control={
            **{f"accuracy, {name}": accuracy[name] for name in order[:3]},
            **{f"divergence, {name}": loss[name] for name in order[:3]},
            "changes of codes, all groups": sum(found["all groups"].changes),
        },
        note="A network 64 - 64 - 64 - 10 on generated images of ten classes, 30 patterns each, as there are no "
        "photographs or language models this size; groups of 4 weights, codebooks of 16 vectors. One seed; STE and PV "
        "each have the best of the same three rates for the codes, P of three for the codebooks, by the objective. STE "
        "and PV sum their steps up in latent weights; PV is STE with 1% of the codes changed at a time.",
    )


def _draw(lab: Lab, found: dict[str, Trained], dense: float) -> None:
    names = ["PTQ", "P", "STE", "PV"]
    labels = ["PTQ: clustered, not trained", "P: codebooks only", "STE: straight-through", "PV: 1% of the codes a step"]
    with lab.figure("accuracy", figsize=(7.6, 2.8)) as figure:
        axes = figure.subplots()
        values = [found[name].accuracy for name in reversed(names)]
        colors = [COLORS[0] if name == "PV" else CONTROL for name in reversed(names)]
        bars = axes.barh(labels[::-1], values, color=colors, height=0.62)
        axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=5, color=INK)
        axes.axvline(dense, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate("dense", (dense, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -10),
                      textcoords="offset points", color=INK)  # fmt: skip
        axes.set_xlim(0, 1.12)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_title("Held-out accuracy at one bit a weight, equal steps")


@paper.claim(
    "Exact P and V steps never raise a quadratic loss, and a V step changes no more codes than it may",
    paper="the convergence statement: each P and V step minimises phi, or an upper bound of it that touches it",
    kind="exact",
)
def steps_never_raise_the_loss(lab: Lab) -> Verdict:
    """Alternate least squares for the codebook and V steps of rate 1/L on ||X (W - A)^T||^2, in growing subspaces."""
    draws = torch.Generator().manual_seed(lab.seed)
    shape, size = (16, 32), FORMAT.group
    inputs = torch.randn(100, shape[1], generator=draws) * torch.logspace(0, -0.5, shape[1])
    moment = inputs.T @ inputs / 100
    goal = torch.randn(shape, generator=draws)
    rate = 1 / float(torch.linalg.eigvalsh(moment)[-1])
    stored = FORMAT.encode(torch.randn(shape, generator=draws))
    stored["codebook"] = stored["codebook"].float()

    def loss() -> float:
        error = (FORMAT.decode(stored, shape) - goal).double()
        return float(((error @ moment.double()) * error).sum())

    losses, most, allowed = [loss()], [], []
    for share in (0.02, 0.05, 0.1, 0.3, 1.0, 1.0) * lab.pick(smoke=1, small=5):
        stored["codebook"] = _best_codebook(FORMAT.unpack(stored["codes"], shape)[..., 0].long(), goal, moment)
        losses.append(loss())
        weight = FORMAT.decode(stored, shape)
        gradient = (weight - goal) @ moment
        before = FORMAT.unpack(stored["codes"], shape)
        stored = v_step(FORMAT, stored, shape, weight - rate * gradient, largest_groups(gradient, size, share))
        most.append(int((FORMAT.unpack(stored["codes"], shape) != before).sum()))
        allowed.append(math.ceil(share * before.numel()))
        losses.append(loss())
    rises = [after / before - 1 for before, after in pairwise(losses)]
    return lab.judge(
        checks={
            "no step raises the loss, to 1e-6": max(rises) < 1e-6,  # the codebook is float32
            "no step changes more codes than it may": all(a <= b for a, b in zip(most, allowed, strict=True)),
            "codes do change, and the loss falls": sum(most) > 0 and losses[-1] < losses[0],
        },
        measured={
            "steps": len(rises),
            "largest relative rise": max(rises),
            "changes of codes": sum(most),
            "loss, first and last": [losses[0], losses[-1]],
        },
    )


def _best_codebook(codes: Int[Tensor, "rows groups"], goal: Tensor, moment: Tensor) -> Float[Tensor, "entries group"]:
    """Return the codebook of least loss for these codes: linear in its numbers, solved in float64."""
    uses = functional.one_hot(codes, FORMAT.codes).double()
    count = FORMAT.codes * FORMAT.group
    spread = torch.einsum("rgc,de->rgdce", uses, torch.eye(FORMAT.group).double()).reshape(*goal.shape, count)
    moved = torch.einsum("rix,ij->rjx", spread, moment.double())
    curvature = torch.einsum("rjx,rjy->xy", moved, spread)
    slope = torch.einsum("rjx,rj->x", moved, goal.double())
    return (torch.linalg.pinv(curvature) @ slope).view(FORMAT.codes, FORMAT.group).float()
