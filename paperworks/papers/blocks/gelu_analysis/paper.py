"""The analysis of the GELU as certificates that are computed, and a dozen activations in one residual network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks import train
from paperworks.lab import Beats, Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.nn import LayerNorm
from paperworks.papers.blocks.gelu_analysis.certificate import certify, derivatives
from paperworks.testbeds.digits import classified, draw, taught

paper = Paper(
    key="gelu-analysis",
    title="GELU Activation Function in Deep Learning: A Comprehensive Mathematical Analysis and Performance",
    authors="Lee",
    year=2023,
    ref="arXiv:2305.12073",
    family="blocks",
    summary=(
        "The GELU is smooth, with bounded first and second derivatives and one stationary point; in one residual "
        "network it is compared with a dozen other activations."
    ),
    implements=(
        "paperworks.papers.blocks.gelu_analysis.certificate.certify",
        "paperworks.papers.blocks.gelu_analysis.certificate.Certificate",
    ),
    equation=r"\operatorname{GELU}'(x) = \Phi(x) + x \phi(x), \quad \operatorname{GELU}''(x) = \phi(x) (2 - x^2)",
    budget_exception="Eleven activations on each of three seeds: a little under four minutes.",
    usage="""
import torch
from paperworks.papers.blocks.gelu_analysis.certificate import certify

for name, activation in {"GELU": torch.nn.GELU(), "SiLU": torch.nn.SiLU(), "ReLU": torch.nn.ReLU()}.items():
    found = certify(activation)  # any function of a tensor
    print(name, "slope", found.slope, "curvature", found.curvature, "stationary at", found.stationary)
""",
)

ACTIVATIONS: dict[str, nn.Module] = {
    "GELU": nn.GELU(),
    "ReLU": nn.ReLU(),
    "LeakyReLU": nn.LeakyReLU(),
    "ELU": nn.ELU(),  # CELU with its default width is the same function
    "SELU": nn.SELU(),
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "Hardswish": nn.Hardswish(),
    "Softplus": nn.Softplus(),
    "Tanh": nn.Tanh(),
    "Sigmoid": nn.Sigmoid(),
}


def _closed_forms() -> dict[str, tuple[float, float, int]]:
    """Return (sup |f'|, sup |f''|, continuous derivatives up to 2) of those that have a closed form."""
    root, infinity = math.sqrt(2), math.inf
    gelu = 0.5 * (1 + math.erf(1)) + root * math.exp(-1) / math.sqrt(2 * math.pi)
    selu = 1.0507009873554805 * 1.6732632423543772  # scale times alpha, the slope on the left of 0
    return {
        "GELU": (gelu, 2 / math.sqrt(2 * math.pi), 2),
        "ReLU": (1.0, infinity, 0),
        "LeakyReLU": (1.0, infinity, 0),
        "ELU": (1.0, 1.0, 1),
        "SELU": (selu, infinity, 0),
        "Hardswish": (1.5, infinity, 0),
        "Softplus": (1 / (1 + math.exp(-10)), 0.25, 2),  # on [-10, 10]; its slope reaches 1 at infinity only
        "Tanh": (1.0, 4 / (3 * math.sqrt(3)), 2),
        "Sigmoid": (0.25, 1 / (6 * math.sqrt(3)), 2),
        "SiLU": (_swish_slope(), 0.5, 2),
    }


def _swish_slope() -> float:
    """The slope of x sigma(x) where x tanh(x / 2) = 2, found by Newton's method."""
    x = 2.4
    for _ in range(20):
        tanh = math.tanh(x / 2)
        x -= (x * tanh - 2) / (tanh + x / 2 * (1 - tanh**2))
    sigma = 1 / (1 + math.exp(-x))
    return sigma * (1 + x * (1 - sigma))


@paper.claim(
    "The GELU has bounded derivatives, one stationary point and no kink",
    paper="The theorems on differentiability, boundedness and stationarity: -0.1289 <= GELU' <= 1.1289, at -sqrt 2 and "
    "sqrt 2; |GELU''| <= 2 / sqrt(2 pi), at 0",
    kind="exact",
    control="ten other activations, of which the ReLU and its like have kinks and no bounded second derivative",
)
def certificates_match(lab: Lab) -> Verdict:
    """Certify all eleven numerically and compare with closed forms."""
    certificates = {name: certify(function) for name, function in ACTIVATIONS.items()}
    forms = _closed_forms()
    gaps = []
    for name, (slope, curvature, smooth) in forms.items():
        found = certificates[name]
        gaps.append(abs(found.slope - slope))
        gaps.append(0.0 if found.curvature == curvature else abs(found.curvature - curvature))
        gaps.append(float(found.smoothness != smooth))
    gelu = certificates["GELU"]
    x = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    first, second = derivatives(F.gelu, x)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    lab.table(
        "Certificates on [-10, 10]",
        ["activation", "sup |f'|", "sup |f''|", "stationary points", "kinks", "continuous derivatives"],
        [
            [
                name,
                round(found.slope, 6),
                "unbounded" if math.isinf(found.curvature) else round(found.curvature, 6),
                ", ".join(f"{at:.5f}" for at in found.stationary) or "none",
                ", ".join(f"{at:.0f}" for at in found.kinks).replace("-0", "0") or "none",
                "2 or more" if found.smoothness == 2 else str(found.smoothness),
            ]
            for name, found in certificates.items()
        ],
    )
    _draw_slopes(lab, certificates["GELU"].lowest_slope, certificates["GELU"].highest_slope)
    return lab.judge(
        checks={
            "bounds, curvature and smoothness of ten activations match closed forms to 1e-6": max(gaps) < 1e-6,
            "-0.1289 <= GELU' <= 1.1289": abs(gelu.lowest_slope + 0.1289041) < 1e-6
            and abs(gelu.highest_slope - 1.1289041) < 1e-6,
            "extremal at sqrt 2, curvature at 0": abs(gelu.slope_at - math.sqrt(2)) < 1e-4
            and abs(gelu.curvature_at) < 1e-4,
            "one stationary point, at -0.75179": len(gelu.stationary) == 1 and abs(gelu.stationary[0] + 0.75179) < 1e-5,
            "GELU'' = phi(x) (2 - x^2)": float((second - density * (2 - x.square())).abs().max()) < 1e-12,
            "GELU' = Phi(x) + x phi(x)": float((first - torch.special.ndtr(x) - x * density).abs().max()) < 1e-12,
            "the ReLU's second derivative is unbounded": math.isinf(certificates["ReLU"].curvature),
        },
        measured={
            "sup |GELU'|": gelu.slope,
            "inf GELU'": gelu.lowest_slope,
            "sup |GELU''|": gelu.curvature,
            "stationary points": list(gelu.stationary),
            "largest gap to a closed form": max(gaps),
        },
        control={
            "kinks, ReLU": len(certificates["ReLU"].kinks),
            "kinks, Hardswish": len(certificates["Hardswish"].kinks),
            "stationary points, SiLU": list(certificates["SiLU"].stationary),
            "sup |Mish'|": certificates["Mish"].slope,
        },
        note="Float64, a grid of 20,001 points, then golden-section search and bisection. Mish: no closed form.",
    )


def _draw_slopes(lab: Lab, lowest: float, highest: float) -> None:
    x = torch.linspace(-5, 5, 401, dtype=torch.float64)
    with lab.figure("slopes", figsize=(8.2, 3.2)) as figure:
        for axes, order in zip(figure.subplots(1, 2), (0, 1), strict=True):
            for name, color in (("ReLU", CONTROL), ("SiLU", COLORS[2]), ("Mish", COLORS[1]), ("GELU", COLORS[0])):
                axes.plot(x, derivatives(ACTIVATIONS[name], x)[order], color=color, label=name, linewidth=1.6)
            axes.set_title("First derivative" if order == 0 else "Second derivative")
            if order == 0:
                for bound in (lowest, highest):
                    axes.axhline(bound, color=COLORS[0], linewidth=0.8, linestyle=":")
                axes.legend()


@paper.claim(
    "After a normalization it has bounded features and a bounded Jacobian",
    paper="The section on GELU with normalization: bounded features and gradients",
    kind="exact",
    control="the same without the normalization, and the Jacobian without its division by the spread",
)
def normalized_features_are_bounded(lab: Lab) -> Verdict:
    """Draw inputs of every scale and shape, and hold features and Jacobian norms against the bounds."""
    dim, rows = 16, lab.pick(smoke=20, small=400)
    norm = LayerNorm(eps=0.0, bias=False, gain=False).build(dim).double()
    draws = lab.generator(lab.seed)
    scale = 10 ** (8 * torch.rand(rows, 1, generator=draws, dtype=torch.float64) - 4)
    heavy = torch.randn(rows, dim, generator=draws, dtype=torch.float64) ** 5  # a few entries far larger than others
    x = scale * (heavy + torch.randn(rows, 1, generator=draws, dtype=torch.float64))

    def features(row: Tensor) -> Tensor:
        return F.gelu(norm(row))

    jacobian = torch.func.vmap(torch.func.jacrev(features))(x)
    spread = x.std(-1, unbiased=False)
    ratio = torch.linalg.matrix_norm(jacobian, 2) * spread
    lipschitz = certify(F.gelu).slope
    made = features(x)
    return lab.judge(
        checks={
            "no feature exceeds sqrt(d - 1)": float(made.abs().max()) <= math.sqrt(dim - 1) + 1e-9,
            "no feature vector is longer than sqrt(d)": float(made.norm(dim=-1).max()) <= math.sqrt(dim) + 1e-9,
            "Jacobian norm times the spread never exceeds 1.1289": float(ratio.max()) <= lipschitz + 1e-9,
            "without the norm features grow with the input": float(F.gelu(x).abs().max()) > 100 * math.sqrt(dim),
        },
        measured={
            "largest feature": float(made.abs().max()),
            "its bound": math.sqrt(dim - 1),
            "largest Jacobian norm times spread": float(ratio.max()),
            "the bound": lipschitz,
        },
        control={"largest feature without the norm": float(F.gelu(x).abs().max())},
        note=f"{rows} inputs of {dim} numbers over eight orders of magnitude, float64. |GELU(z)| <= |z| and "
        "||LN(x)|| = sqrt(d) give the first two; LN's Jacobian is a projection divided by the spread.",
    )


class _Residual(nn.Module):
    """Two convolutions with batch norms, added to their input; the second may halve the picture."""

    def __init__(self, before: int, after: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            activation,
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the sum."""
        return self.activation(self.skip(x) + self.body(x))


def _network(activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, -1)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        activation,
        _Residual(16, 16, 1, activation),
        _Residual(16, 32, 2, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@paper.claim(
    "In a residual network it is the best of eleven activations",
    paper="The comparison on CIFAR-10, CIFAR-100 and STL-10: best of all, 89.52% on CIFAR-10",
    control="ten other activations in the same network, the ReLU before all",
)
def the_best(lab: Lab) -> Verdict:
    """Train one small residual network with each activation, same steps, on drawn digits."""
    rows, held_out, steps = lab.pick(smoke=(128, 500, 2), small=(3000, 10_000, 360))
    drawn = cache(lambda seed: (draw(rows, 1000 + seed), draw(held_out, 2000 + seed)))

    def arm(activation: nn.Module) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            digits, testing = drawn(seed)
            model = taught(
                lab, _network(activation), digits, steps=steps, lr=3e-3, rows=64, seed=seed,
                warmup=0.1, optimizer=train.AdamW(weight_decay=1e-4), clip=None,
            )  # fmt: skip
            loss, error = classified(lab, model, testing)
            return {"test accuracy, percent": 100 * (1 - error), "test loss": loss}

        return measures

    names = lab.pick(smoke=("GELU", "ReLU"), small=tuple(ACTIVATIONS))
    verdict = lab.compare(
        arms={name: arm(ACTIVATIONS[name]) for name in names},
        # A third of what the first design's seeds put between the two: other activations come closer to the ReLU
        main=Beats("GELU", "ReLU", on="test accuracy, percent", by=0.1),
        also=[Beats("GELU", name, on="test accuracy, percent") for name in names if name not in ("GELU", "ReLU")],
        seeds=3,
        note=f"{rows:,} drawn digits of 8 x 8 pixels, {steps} steps of 64; one rate and torch's initial weights for "
        f"all: "
        "with batch norms the gain of an activation matters little.",
    )
    lab.points("test accuracy, percent", name="ranking", title="Test accuracy with each activation")
    return verdict
