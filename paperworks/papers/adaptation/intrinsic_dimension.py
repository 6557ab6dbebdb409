"""Intrinsic dimension: how few directions, drawn at random, training needs; and that pre-training lowers it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from paperworks import adapt
from paperworks.adapt.intrinsic import Fastfood, FastfoodDelta
from paperworks.kernels.hadamard import transform
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.testbeds.pictures import Classes, Images, accuracy, fit, network

paper = Paper(
    key="intrinsic-dimension",
    title="Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
    authors="Aghajanyan, Zettlemoyer, Gupta",
    year=2020,
    ref="arXiv:2012.13255",
    family="adaptation",
    summary=(
        "Train d numbers and let a fixed random projection spread them over all weights: a few hundred reach nine "
        "tenths of full fine-tuning. The better a model was pre-trained, the fewer it needs."
    ),
    implements=(
        "paperworks.adapt.intrinsic.DID",
        "paperworks.adapt.intrinsic.SAID",
        "paperworks.adapt.intrinsic.Fastfood",
        "paperworks.kernels.hadamard.transform",
    ),
)

DIMENSIONS = (10, 30, 50, 100, 200, 300)
RATES = (0.03, 0.1, 0.3)  # for the projected vector; each dimension has the best of these
FULL_RATES = (1e-3, 3e-3, 1e-2)  # for training every weight
NOISE = 0.4  # standard deviation on images whose own is about 0.7


def _images(count: int, degrees: float, seed: int) -> Images:
    """Draw images of ten classes, six patterns each, turned by an angle; the patterns are always the same."""
    return Classes.smooth(6, NOISE, degrees=degrees).draw(count, seed)


def _fit(lab: Lab, model: nn.Module, data: Images, rate: float, on_step: Callable[[int], None] | None = None) -> None:
    """Train what is trainable: 300 steps of Adam on batches of 128."""
    fit(model, data, steps=lab.pick(smoke=3, small=300), rate=rate, seed=lab.seed, on_step=on_step)


@dataclass(frozen=True)
class Task:
    """The images to learn from and those to be judged on."""

    learned: Images
    held_out: Images

    @classmethod
    def upright(cls, seed: int) -> Task:
        """The task of every claim here."""
        return cls(_images(1400, 0, 10 * seed + 2), _images(2000, 0, 10 * seed + 3))


def _in_subspace(lab: Lab, base: nn.Module, task: Task, dimension: int, *, redrawn: bool = False) -> float:
    """Return the best held-out accuracy of training so many numbers, over the learning rates."""
    found = []
    for rate in lab.pick(smoke=RATES[1:2], small=RATES):
        model = adapt.apply(copy.deepcopy(base), adapt.DID(dimension=dimension, seed=lab.seed), "all-linear")
        _fit(lab, model, task.learned, rate, partial(_redraw, model) if redrawn else None)
        found.append(accuracy(model, task.held_out))
    return max(found)


def _redraw(model: nn.Module, step: int) -> None:
    for number, layer in enumerate(adapt.adapted(model).values()):
        assert isinstance(layer.delta, FastfoodDelta)
        layer.delta.redraw(1000 * step + number)


def _full(lab: Lab, base: nn.Module, task: Task) -> float:
    found = []
    for rate in lab.pick(smoke=FULL_RATES[1:2], small=FULL_RATES):
        model = copy.deepcopy(base)
        _fit(lab, model, task.learned, rate)
        found.append(accuracy(model, task.held_out))
    return max(found)


@paper.claim(
    "A network of 8,832 weights reaches 90% of its accuracy when 50 to 300 numbers are trained",
    paper="Table 1: d90, the smallest dimension with 90% of full fine-tuning, is 207 for RoBERTa-large and 896 for "
    "RoBERTa-base on MRPC, of hundreds of millions of parameters",
    control="the same number of parameters, the projection drawn anew after every step",
)
def few_dimensions_suffice(lab: Lab) -> Verdict:
    """Train ever more numbers behind a fixed random projection, from random weights."""
    base, task = network(lab.seed), Task.upright(lab.seed)
    with lab.threads(1):
        full = _full(lab, base, task)
        found = {d: _in_subspace(lab, base, task, d) for d in lab.track(DIMENSIONS, "dimensions")}
        redrawn = _in_subspace(lab, base, task, DIMENSIONS[-1], redrawn=True)
    d90 = next((d for d, reached in found.items() if reached >= 0.9 * full), None)
    values = list(found.values())
    _draw(lab, found, full, redrawn)
    return lab.judge(
        checks={
            "d90 is between 50 and 300": d90 is not None and 50 <= d90 <= 300,
            "10 dimensions are too few": found[10] < 0.5,
            "more dimensions are never worse by more than 2 points": all(
                more >= less - 0.02 for less, more in pairwise(values)
            ),
            "with a projection drawn anew at every step nothing is learned": redrawn < 0.2,
        },
        measured={
            "d90": d90 if d90 is not None else f"over {DIMENSIONS[-1]}",
            "accuracy, every weight": full,
            "accuracy by dimension": values,
            "dimensions": list(found),
        },
        control={"accuracy, 300 dimensions, drawn anew": redrawn},
        note="Generated images of 8 x 8 stand in for scanned digits: ten classes of six smooth patterns, with noise. A "
        "network of 64-64-64-10, its biases left at their start; 300 steps of Adam on batches of 128, the best of "
        "three learning rates for each.",
    )


def _draw(lab: Lab, found: dict[int, float], full: float, redrawn: float) -> None:
    with lab.figure("accuracy", figsize=(7.6, 3.3)) as figure:
        axes = figure.subplots()
        axes.plot(list(found), list(found.values()), "o-", color=COLORS[0], label="trained behind a fixed projection")
        axes.plot([max(found)], [redrawn], "s", color=CONTROL, label="projection drawn anew at every step (control)")
        axes.axhline(0.9 * full, color=INK, linewidth=0.8, linestyle=":")
        axes.text(min(found), 0.9 * full + 0.02, "90% of training every weight", fontsize=9)
        axes.set_xscale("log")
        axes.set_xticks(list(found), [str(d) for d in found])
        axes.minorticks_off()
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("trained numbers, of a network with 8,832 weights")
        axes.set_title("Accuracy on held-out images")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.12))


@paper.claim(
    "Pre-training lowers the dimension: 30 numbers go further from a related task than from nothing",
    paper="Section 5 and Figure 2: the intrinsic dimension of six tasks falls with the number of pre-training updates",
    control="random weights; and pre-training on a task as hard that is not related",
)
def pretraining_lowers_it(lab: Lab) -> Verdict:
    """Train 30 numbers from random weights, after images turned by 30 degrees, and after images turned by 90."""
    task = Task.upright(lab.seed)
    bases = {"none": network(lab.seed)}
    with lab.threads(1):
        for degrees in (30, 90):
            bases[f"{degrees} degrees"] = base = network(lab.seed)
            _fit(lab, base, _images(4000, degrees, 10 * lab.seed + 1), 3e-3)
        at_once = {name: accuracy(base, task.held_out) for name, base in bases.items()}
        found = {name: _in_subspace(lab, base, task, 30) for name, base in lab.track(list(bases.items()), "starts")}
    lab.table(
        "Accuracy on upright images",
        ["pre-trained on images turned by", "before", "with 30 numbers trained"],
        [[name, at_once[name], found[name]] for name in bases],
    )
    return lab.judge(
        checks={
            "at least 15 points above random weights": found["30 degrees"] >= found["none"] + 0.15,
            "a quarter turn gives no such gain": found["90 degrees"] < found["none"] + 0.15,
            "and the task was not solved before": at_once["30 degrees"] < 0.9 * found["30 degrees"],
        },
        measured={"accuracy after 30 degrees": found["30 degrees"], "before training": at_once["30 degrees"]},
        control={
            "accuracy from random weights": found["none"],
            "accuracy after 90 degrees": found["90 degrees"],
            "before training, 90 degrees": at_once["90 degrees"],
        },
    )


@paper.claim(
    "Fastfood multiplies by a matrix with columns of length one that is never written down",
    paper="Sections 3.1 and 3.2: M = H G Pi H B, in O(D log d) time and O(D) memory; SAID counts its m scalars in d",
    kind="exact",
)
def projection_is_its_equation(lab: Lab) -> Verdict:
    """Compare with the product of the matrices, and count what is trained."""
    size, dimension = lab.pick(smoke=(200, 20), small=(5000, 300))
    fastfood = Fastfood.draw(dimension, size, lab.seed)
    columns = torch.stack([fastfood(row) for row in torch.eye(dimension, dtype=torch.float64)])
    norms = columns.square().sum(1)
    theta = torch.randn(dimension, dtype=torch.float64)
    x = torch.randn(3, 256, dtype=torch.float64)
    twice = (transform(transform(x)) - x).abs().max().item()
    off = (_dense(64, 10, lab.seed)).item()
    counts = [
        adapt.trainable_parameters(adapt.apply(network(0), adapter, "all-linear"))
        for adapter in (adapt.DID(dimension=100), adapt.SAID(dimension=100))
    ]
    return lab.judge(
        checks={
            "equal to the product of the matrices, to 1e-12": off < 1e-12,
            "linear in the trained vector": bool((fastfood(theta) - theta @ columns).abs().max() < 1e-12),
            "H H x = x": twice < 1e-12,
            "columns have length one: within 3% on average": abs(norms.mean().item() - 1) < 0.03,
            "exactly d numbers are trained, in both kinds": counts == [100, 100],
        },
        measured={
            "mean squared length of a column": norms.mean(),
            "largest difference to the matrices": off,
            "numbers trained": counts,
        },
    )


def _dense(size: int, dimension: int, seed: int) -> Tensor:
    """Return the largest difference between Fastfood and its matrices, for a size that is a power of two."""
    fastfood = Fastfood.draw(dimension, size, seed)
    walsh: Any = torch.ones(1, 1, dtype=torch.float64)
    while len(walsh) < size:
        walsh = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), walsh)
    gauss = fastfood.gauss.double()
    product = walsh @ gauss.diag() @ torch.eye(size, dtype=torch.float64)[fastfood.order.long()] @ walsh
    matrix = product[:, :dimension] * fastfood.signs.double() / (size * gauss.square().sum()).sqrt()
    theta = torch.randn(dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (fastfood(theta) - matrix @ theta).abs().max()
