"""Intrinsic dimension: how few directions, drawn at random, training needs; and that pre-training lowers it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paperworks import adapt
from paperworks.adapt.intrinsic import Fastfood, FastfoodDelta
from paperworks.kernels.hadamard import transform
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.testbeds import digits
from paperworks.testbeds.pictures import Images, accuracy, fit, network

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
    equation=r"\theta^D = \theta_0^D + P(\theta^d), \quad P = \tfrac{1}{c} H G \Pi H B",
    usage="""
import torch
from paperworks import adapt

model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
x = torch.randn(4, 64)
before = model(x)
adapt.apply(model, adapt.DID(dimension=50, seed=0), "all-linear")
print("trained:", adapt.trainable_parameters(model), "unchanged at first:", torch.equal(model(x), before))
model(x).square().mean().backward()
print([tuple(parameter.grad.shape) for parameter in model.parameters() if parameter.grad is not None])
""",
    notes="A classifier of drawn digits stands in for the language models of the paper. SAID is only counted.",
)

RATE, FULL_RATE = 0.03, 3e-3  # for the projected vector, and for training every weight
ACCURACY = "held-out accuracy"


@cache
def _digits(count: int, seed: int, degrees: int = 0) -> Images:
    """Drawn digits of 8 x 8, turned by an angle."""
    drawn = digits.draw(count, seed)
    pictures = drawn.pictures[:, None]
    if degrees:
        turn = math.radians(degrees)
        angle = torch.tensor([[math.cos(turn), -math.sin(turn), 0.0], [math.sin(turn), math.cos(turn), 0.0]])
        grid = functional.affine_grid(angle.expand(count, 2, 3), [count, 1, 8, 8], align_corners=False)
        pictures = functional.grid_sample(pictures, grid, align_corners=False)
    return Images(pictures.flatten(1), drawn.labels)


def _trained(lab: Lab, model: nn.Module, data: Images, rate: float, seed: int, on_step: Any = None) -> nn.Module:
    """Train what is trainable: 300 steps of Adam on batches of 128."""
    with lab.threads(1):
        fit(model, data, steps=lab.pick(smoke=3, small=300), rate=rate, seed=seed, on_step=on_step)
    return model


def _in_subspace(lab: Lab, base: nn.Module, dimension: int, seed: int, *, redrawn: bool = False) -> float:
    """Held-out accuracy after training so many numbers."""
    model = adapt.apply(copy.deepcopy(base), adapt.DID(dimension=dimension, seed=seed), "all-linear")
    _trained(lab, model, _digits(1400, 10 * seed + 2), RATE, seed, partial(_redraw, model) if redrawn else None)
    return accuracy(model, _digits(2000, 10 * seed + 3))


def _redraw(model: nn.Module, step: int) -> None:
    for number, layer in enumerate(adapt.adapted(model).values()):
        assert isinstance(layer.delta, FastfoodDelta)
        layer.delta.redraw(1000 * step + number)


@paper.claim(
    "A network of 8,832 weights reaches 90% of its accuracy when 1,000 numbers are trained",
    paper="Table 1, DID: d90, the smallest dimension with 90% of full fine-tuning, is 322 for RoBERTa-large and 1000 "
    "for RoBERTa-base on MRPC, of hundreds of millions of parameters",
    control="the same number of parameters, the projection drawn anew after every step",
)
def few_dimensions_suffice(lab: Lab) -> Verdict:
    """Train numbers behind a fixed random projection, from random weights."""

    @cache
    def full(seed: int) -> float:
        model = _trained(lab, network(seed), _digits(1400, 10 * seed + 2), FULL_RATE, seed)
        return accuracy(model, _digits(2000, 10 * seed + 3))

    def arm(dimension: int, redrawn: bool = False) -> Callable[[int], dict[str, float]]:
        def reached(seed: int) -> dict[str, float]:
            found = _in_subspace(lab, network(seed), dimension, seed, redrawn=redrawn)
            return {ACCURACY: found, "share of training every weight": found / full(seed)}

        return reached

    share, many, anew = "share of training every weight", "1,000 numbers", "1,000 numbers, drawn anew"
    verdict = lab.compare(
        arms={many: arm(1000), "300 numbers": arm(300), "30 numbers": arm(30), anew: arm(1000, redrawn=True)},
        main=Beats(many, anew, on=share, by=0.5),
        also=[AtLeast(many, 0.9, on=share), AtMost("30 numbers", 0.6, on=share)],
        seeds=3,
        note="Drawn digits of 8 x 8. A network of 64-64-64-10, its biases left at their start; 300 steps of Adam on "
        f"batches of 128, at {RATE} in the subspace and {FULL_RATE} with every weight.",
    )
    lab.points(share, name="accuracy", title="Accuracy on held-out digits, as a share of training every weight")
    return verdict


@paper.claim(
    "Pre-training lowers the dimension: 30 numbers go further from a related task than from nothing",
    paper="Section 5 and Figure 2: the intrinsic dimension of six tasks falls with the number of pre-training updates",
    control="random weights; and pre-training on a task as hard that is less related",
)
def pretraining_lowers_it(lab: Lab) -> Verdict:
    """Train 30 numbers from random weights, after digits turned by 30 degrees, and after digits turned by 90."""

    def arm(degrees: int | None) -> Callable[[int], dict[str, float]]:
        def reached(seed: int) -> dict[str, float]:
            base: nn.Module = network(seed)
            if degrees is not None:
                _trained(lab, base, _digits(4000, 10 * seed + 1, degrees), FULL_RATE, seed)
            before = accuracy(base, _digits(2000, 10 * seed + 3))
            return {ACCURACY: _in_subspace(lab, base, 30, seed), "before": before}

        return reached

    related, nothing, other = "after a turn by 30 degrees", "random weights", "after a turn by 90 degrees"
    verdict = lab.compare(
        arms={related: arm(30), nothing: arm(None), other: arm(90)},
        main=Beats(related, nothing, on=ACCURACY, by=0.15),
        also=[Beats(related, other, on=ACCURACY, by=0.1)],
        seeds=3,
    )
    lab.points(ACCURACY, name="pretraining", title="Accuracy on upright digits when 30 numbers are trained")
    return verdict


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
    """The largest difference between Fastfood and its matrices, for a size that is a power of two."""
    fastfood = Fastfood.draw(dimension, size, seed)
    walsh: Any = torch.ones(1, 1, dtype=torch.float64)
    while len(walsh) < size:
        walsh = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), walsh)
    gauss = fastfood.gauss.double()
    product = walsh @ gauss.diag() @ torch.eye(size, dtype=torch.float64)[fastfood.order.long()] @ walsh
    matrix = product[:, :dimension] * fastfood.signs.double() / (size * gauss.square().sum()).sqrt()
    theta = torch.randn(dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (fastfood(theta) - matrix @ theta).abs().max()
