"""GELU: an input is weighted by how likely a normal variable lies below it, instead of cut at zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import Beats, Lab, Paper, Verdict
from paperworks.nn.feedforward.activations import GELU, gelu, stochastic_gelu
from paperworks.nn.feedforward.mlp import ACTIVATIONS
from paperworks.testbeds.digits import Digits, classified, digit_loss, draw
from paperworks.testbeds.training import fit

paper = Paper(
    key="gelu",
    title="Gaussian Error Linear Units (GELUs)",
    authors="Hendrycks, Gimpel",
    year=2016,
    ref="arXiv:1606.08415",
    family="blocks",
    summary=(
        "x Phi(x): the expectation of dropping an input with a probability that falls as the input grows. Smooth, not "
        "monotonic, and the activation of GPT-2 and BERT."
    ),
    implements=(
        "paperworks.nn.feedforward.activations.gelu",
        "paperworks.nn.feedforward.activations.stochastic_gelu",
        "paperworks.nn.feedforward.activations.GELU",
        "paperworks.nn.feedforward.mlp.ACTIVATIONS",
    ),
    equation=r"\operatorname{GELU}(x) = x \, \Phi(x) = \tfrac{x}{2} \left(1 + \operatorname{erf}(x / \sqrt{2})\right)",
    usage="""
import torch
from paperworks.nn import MLP
from paperworks.nn.feedforward.activations import stochastic_gelu

x = torch.randn(2, 16, 768)
bert = MLP(hidden=3072, activation="gelu").build(768)       # by erf: BERT
gpt2 = MLP(hidden=3072, activation="gelu_tanh").build(768)  # by tanh: GPT-2, Gemma
gpt2.load_state_dict(bert.state_dict())
print("largest difference of the two forms:", float((bert(x) - gpt2(x)).detach().abs().max()))
print("x = -0.5, mean of 10,000 masks:", float(stochastic_gelu(torch.full((10_000,), -0.5)).mean()))
""",
    notes=(
        "A checkpoint needs the form it was trained with: exact (BERT), tanh (GPT-2, Gemma) or sigmoid. "
        "The paper's image and speech sets are replaced by drawn digits."
    ),
)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


@paper.claim(
    "It is the expectation of the stochastic map, and its approximations are as near as said",
    paper="Section 2: E[x m] = x Phi(x), m ~ Bernoulli(Phi(x)); 0.5x(1 + tanh(sqrt(2/pi)(x + 0.044715x^3))) or "
    "x sigma(1.702x)",
    kind="exact",
    control="the approximations with constants a little off",
)
@torch.no_grad()
def is_the_expectation(lab: Lab) -> Verdict:
    """Compare with closed forms on a fine grid, and with the mean of many masks."""
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    exact, density = x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    ours = gelu(x)
    lowest = int(ours.argmin())
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(gelu(leaf).sum(), leaf)
    draws, times = lab.generator(lab.seed), lab.pick(smoke=1000, small=400_000)
    points = torch.tensor([-2.0, -0.75, -0.1, 0.5, 1.5], dtype=torch.float64)
    masked = stochastic_gelu(points.repeat(times, 1), generator=draws)
    spread = (masked.std(0) / math.sqrt(times)).clamp(min=1e-12)
    off = float(((masked.mean(0) - gelu(points)).abs() / spread).max())
    errors = {name: _largest(ACTIVATIONS[name](x) - exact) for name in ("gelu_tanh", "gelu_sigmoid")}
    skewed = {
        "tanh, 0.04 for 0.044715": _largest(_tanh_form(x, 0.04) - exact),
        "sigmoid, 1.6 for 1.702": _largest(x * torch.sigmoid(1.6 * x) - exact),
    }
    moved = gelu(x, mean=0.5, std=2.0)
    return lab.judge(
        checks={
            "x Phi(x), by erf, to 1e-15 of its size": _largest(ours - exact) < 1e-14,
            "GELU(x) - GELU(-x) = x": _largest(ours - gelu(-x) - x) < 1e-14,
            "minimum -0.16997 at -0.75179": abs(float(ours[lowest]) + 0.16997) < 1e-5
            and abs(float(x[lowest]) + 0.75179) < 1e-4,
            "its slope is Phi(x) + x phi(x)": _largest(slope - exact / torch.where(x == 0, 1.0, x) - x * density)
            < 1e-14 + 0.5 * float((x == 0).any()),
            "errors 4.7e-4 (tanh) and 2.03e-2 (sigmoid)": abs(errors["gelu_tanh"] - 4.7e-4) < 1e-5
            and abs(errors["gelu_sigmoid"] - 2.03e-2) < 1e-4,
            "the mean of the masked inputs within 4 standard errors": off < 4,
            "a narrow Gaussian gives the ReLU": _largest(gelu(x, std=1e-6) - x.relu()) < 1e-6,
            "mean and width move it as they should": _largest(moved - x * torch.special.ndtr((x - 0.5) / 2)) < 1e-14,
            "other constants are worse": skewed["tanh, 0.04 for 0.044715"] > 2 * errors["gelu_tanh"]
            and skewed["sigmoid, 1.6 for 1.702"] > errors["gelu_sigmoid"],
        },
        measured={
            "minimum": float(ours[lowest]),
            "at": float(x[lowest]),
            "largest error, tanh form": errors["gelu_tanh"],
            "largest error, sigmoid form": errors["gelu_sigmoid"],
            "distance of the masks' mean, standard errors": off,
        },
        control={f"largest error, {name}": value for name, value in skewed.items()},
        note=f"Grid from -10 to 10 in steps of 1e-4, float64; {times:,} masks of each of {len(points)} inputs.",
    )


def _tanh_form(x: Tensor, cubic: float) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + cubic * x**3)))


DEPTH, WIDTH = 8, 128  # Section 3.1
BATCH = 64
# Activation -> its module, and the best of the rates 1e-3, 3e-3, 1e-2 and 3e-2 on seed 100 and pictures of its own.
UNITS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "GELU": (GELU, 1e-2),
    "ReLU": (nn.ReLU, 3e-3),
    "ELU": (nn.ELU, 3e-3),
}


def _classifier(unit: Callable[[], nn.Module]) -> nn.Module:
    """Eight layers; weights as He et al. draw them, for all units alike."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise([64, *[WIDTH] * (DEPTH - 1)]):
        layers += [nn.Linear(before, after), unit()]
    layers.append(nn.Linear(WIDTH, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


@cache
def _digits(rows: int, held_out: int, seed: int) -> tuple[Digits, Digits]:
    """Digits to train on and digits to test on; every seed has its own."""
    return draw(rows, 1000 + seed), draw(held_out, 2000 + seed)


@paper.claim(
    "Networks with it have a lower test error than with ReLU or ELU",
    paper="Section 3: CIFAR-10 7.89% against 8.16 (ReLU) and 8.41 (ELU), CIFAR-100 20.74 / 21.77 / 22.98, TIMIT 29.3 / "
    "29.5 / 29.6",
    control="the same network with ReLU, or with ELU, each at its own best rate",
)
def lower_error(lab: Lab) -> Verdict:
    """Train eight layers of 128 units on drawn digits with each activation, and count errors on other digits."""
    steps, rows, held_out = lab.pick(smoke=(3, 256, 500), small=(1200, 4000, 10_000))

    def arm(unit: Callable[[], nn.Module], rate: float) -> Callable[[int], dict[str, float]]:
        def errors(seed: int) -> dict[str, float]:
            training, test = _digits(rows, held_out, seed)
            picked = torch.randint(rows, (steps, BATCH), generator=lab.generator(seed))
            batches = [{"x": training.pictures[some], "y": training.labels[some]} for some in picked]
            model = _classifier(unit)
            decay: dict[str, Any] = {"schedule": "linear", "warmup": 0.0, "min_lr": 0.0, "clip": None}
            adam = train.AdamW(weight_decay=0.0)
            with lab.threads(1):
                fit(model, digit_loss, batches, steps=steps, lr=rate, seed=seed, optimizer=adam, **decay)
            loss, error = classified(lab, model.eval(), test)
            return {"test error, percent": 100 * error, "test loss": loss}

        return errors

    verdict = lab.compare(
        arms={name: arm(unit, rate) for name, (unit, rate) in UNITS.items()},
        # The paper's distance on CIFAR-10.
        main=Beats("GELU", "ReLU", on="test error, percent", by=0.27, lower=True),
        also=[Beats("GELU", "ELU", on="test error, percent", lower=True)],
        seeds=3,
        note=f"{rows:,} drawn digits of 8 x 8 pixels, {held_out:,} others for the test, {steps:,} steps of {BATCH}; "
        "weights as He et al. draw them for every activation, Adam, a rate that falls linearly to 0, no dropout. "
        "Where ELU is ahead, the likely reason is the short training of eight layers without a norm, which rewards its "
        "mean near 0.",
    )
    lab.points("test error, percent", name="errors", title="Test error with each activation")
    return verdict
