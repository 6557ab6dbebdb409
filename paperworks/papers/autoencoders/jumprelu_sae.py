"""JumpReLU autoencoders, and the frontier of all kinds on one model's activations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from paperworks import train
from paperworks.interpret import sae
from paperworks.interpret.sae.kinds.jumprelu import JumpReLUAutoencoder
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.testbeds import smollm2_activations as activations
from paperworks.testbeds.planted_features import COLUMNS, SETTING, trained
from paperworks.testbeds.smollm2_activations import Point, Setting

paper = Paper(
    key="jumprelu-sae",
    title="Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders",
    authors="Rajamanoharan, Lieberum, Sonnerat, Conmy, Varma, Kram\u00e1r, Nanda",
    year=2024,
    ref="arXiv:2407.14435",
    family="autoencoders",
    summary=(
        "A threshold a latent, below which it is off, and a penalty that simply counts the latents that are on: both "
        "without a gradient, estimated from the inputs near the threshold, and the best reconstruction at every L0."
    ),
    implements=(
        "paperworks.interpret.sae.kinds.jumprelu.JumpReLU",
        "paperworks.interpret.sae.kinds.jumprelu.jump_relu",
        "paperworks.interpret.sae.kinds.jumprelu.step",
    ),
)

PENALTIES = (0.01, 0.02, 0.03)


def _spec(penalty: float, reach: float = 0.1) -> sae.JumpReLU:
    return sae.JumpReLU(latents=256, penalty=penalty, threshold=reach, bandwidth=reach)


@paper.claim(
    "A learned threshold reconstructs better than L1 with as few latents, without shrinking",
    paper="Figure 2: the best loss recovered at every L0, against Gated and TopK; JumpReLU has no shrinkage, for "
    "magnitudes are not penalized",
    control="L1 at a similar L0; and the paper's own threshold and bandwidth of 0.001, made for long training",
)
def better_than_l1(lab: Lab) -> Verdict:
    """Train on planted data of mean squared norm 1 at three penalties, beside L1, Gated and the paper's constants."""
    runs = {
        penalty: trained(lab, _spec(penalty).build, f"JumpReLU, penalty {penalty:g}", mean_square=1.0, beta1=0.0)
        for penalty in PENALTIES
    }
    plain = trained(lab, sae.Standard(latents=256, penalty=5.0, warmup=0.1).build, "L1")
    gated = trained(lab, sae.Gated(latents=256, penalty=5.0).build, "gated", beta1=0.0)
    narrow = trained(lab, _spec(0.02, 0.001).build, "threshold and bandwidth 0.001", mean_square=1.0, beta1=0.0)
    lab.table(
        "What was trained",
        ["autoencoder", *COLUMNS],
        [
            *([f"JumpReLU, penalty {penalty:g}", *run.row] for penalty, run in runs.items()),
            ["JumpReLU, 0.02, threshold and bandwidth 0.001", *narrow.row],
            ["Gated, penalty 5", *gated.row],
            ["L1, penalty 5", *plain.row],
        ],
    )
    ours = runs[0.02]
    return lab.judge(
        checks={
            "FVU below 0.28 at an L0 below 8": ours.quality.fvu < 0.28 and ours.quality.l0 < 8,
            "mean best cosine above 0.8": ours.recovery.mmcs > 0.8,
            "nothing shrinks: gamma within 2% of 1": abs(ours.quality.bias - 1) < 0.02,
            "L1 needs as many latents for more than twice the error": plain.quality.l0 > 0.8 * ours.quality.l0
            and plain.quality.fvu > 2 * ours.quality.fvu,
            "with 0.001, thresholds cannot travel far enough: three times the L0": narrow.quality.l0
            > 3 * ours.quality.l0,
        },
        measured={
            "penalties": list(PENALTIES),
            "L0": [run.quality.l0 for run in runs.values()],
            "FVU": [run.quality.fvu for run in runs.values()],
            "gamma": [run.quality.bias for run in runs.values()],
            "mean best cosine": [run.recovery.mmcs for run in runs.values()],
            "dead": [run.quality.dead for run in runs.values()],
        },
        control={
            "L1: L0, FVU, gamma": [plain.quality.l0, plain.quality.fvu, plain.quality.bias],
            "gated: L0, FVU, gamma": [gated.quality.l0, gated.quality.fvu, gated.quality.bias],
            "0.001: L0, FVU, mean best cosine": [narrow.quality.l0, narrow.quality.fvu, narrow.recovery.mmcs],
        },
        note=SETTING + " Mean ||x||^2 of 1 (64 for L1 and gated, whose penalties are made for it); 2,000 steps; Adam's "
        "beta1 is 0 for JumpReLU and gated; threshold and bandwidth start at 0.1.",
    )


@paper.claim(
    "The pseudo-derivatives are the paper's, and the count moves thresholds only",
    paper="Equations 11 and 12: derivatives of JumpReLU and of the step with respect to theta, by a rectangle kernel; "
    "appendix: their expectation is the true derivative of the expected loss",
    kind="exact",
)
def gradients_are_the_papers(lab: Lab) -> Verdict:
    """Check gradients around a threshold by hand, the limit of no threshold, and the estimate of a known density."""
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    apart = 0.0
    for value, on, near in ((0.5, 0, 0), (0.85, 0, 1), (1.15, 1, 1), (1.5, 1, 0)):
        before = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
        jumped, stepped = sae.jump_relu(before, theta, 0.4), sae.step(before, theta, 0.4)
        by_input, by_theta = torch.autograd.grad(jumped.sum(), [before, theta])
        (count_by_theta,) = torch.autograd.grad(stepped.sum(), theta)
        wanted = (value * on, on, -near / 0.4, on, -near / 0.4)
        found = (jumped, by_input, by_theta, stepped, count_by_theta)
        apart = max([apart, *(abs(f.item() - w) for f, w in zip(found, wanted, strict=True))])
    torch.manual_seed(lab.seed)
    model = sae.JumpReLU(latents=256, penalty=0.1, threshold=0.1, bandwidth=0.1).build(64).double()
    assert isinstance(model, JumpReLUAutoencoder)
    x = sae.Planted(mean_square=1.0).draw(256, torch.Generator().manual_seed(1)).double()
    before = (x @ model.encoder.T + model.encoder_bias).relu()
    count = sae.step(before, model.threshold, 0.1).sum()
    reached = torch.autograd.grad(count, [model.encoder, model.log_threshold], allow_unused=True)
    with torch.no_grad():
        model.log_threshold.fill_(-60.0)
        relu = float((model.encode(x) - before).abs().max())
    draws = torch.randn(lab.pick(smoke=100_000, small=1_000_000), 1, generator=torch.Generator().manual_seed(lab.seed))
    place = torch.tensor([0.8], requires_grad=True)
    sae.step(draws, place, 0.1).mean().backward()
    assert place.grad is not None
    density = math.exp(-(0.8**2) / 2) / math.sqrt(2 * math.pi)
    estimate = place.grad.item()
    return lab.judge(
        checks={
            "values and gradients by hand, to 1e-12": apart < 1e-12,
            "the count gives the encoder no gradient": reached[0] is None,
            "and does give thresholds one": bool(reached[1].any()),
            "a vanishing threshold is a ReLU": relu < 1e-20,
            "the count's gradient is minus the density at theta, to 5%": abs(estimate / -density - 1) < 0.05,
        },
        measured={
            "largest difference": apart,
            "difference from ReLU at theta of e^-60": relu,
            "estimated gradient": estimate,
            "minus the density": -density,
        },
    )


BASE = "L1 (2023)"
LATENTS = 1152  # twice the dimensions of SmolLM2


@dataclass(frozen=True)
class Kind:
    """One line of the frontier: its specs by strength, and how its paper trains it."""

    name: str
    color: str
    specs: dict[float, sae.SparseAutoencoderSpec]
    options: dict[str, Any] = field(default_factory=dict)


def _kinds(latents: int) -> list[Kind]:
    """Return the kinds; penalties are for a mean ||x||^2 equal to dim, JumpReLU's for one of 1."""
    return [
        Kind(
            BASE,
            CONTROL,
            {p: sae.Standard(latents=latents, penalty=p, warmup=0.1) for p in (1.5, 2.5, 4.0)},
        ),
        Kind(
            "L1, lengths weighed (2024)",
            COLORS[4],
            {p: sae.Standard(latents=latents, penalty=p, decoder="weighted") for p in (2.0, 3.5, 5.0)},
            {"clip": 1.0},
        ),
        Kind(
            "p-annealing",
            COLORS[3],
            {
                p: sae.Standard(latents=latents, penalty=p, warmup=0.1, annealing=sae.Annealing())
                for p in (1.0, 2.0, 3.0)
            },
        ),
        Kind("Gated", COLORS[1], {p: sae.Gated(latents=latents, penalty=p) for p in (2.0, 5.0, 10.0)}, {"beta1": 0.0}),
        Kind("TopK", COLORS[2], {k: sae.TopK(latents=latents, k=k, aux=0.0) for k in (16, 32, 64)}, {"clip": 1.0}),
        Kind(
            "JumpReLU",
            COLORS[0],
            {
                # Log theta does not travel far in 300 steps: where it starts decides about L0 as much as the penalty.
                p: sae.JumpReLU(latents=latents, penalty=p, threshold=start, bandwidth=start)
                for p, start in ((0.002, 0.02), (0.0025, 0.03), (0.003, 0.05))
            },
            {"beta1": 0.0, "scale": 1.0},
        ),
    ]


def _points(lab: Lab, where: Setting) -> dict[str, list[Point]]:
    """Train every kind at every strength on the same rows, and measure each on the same held-out contexts."""
    steps = lab.pick(smoke=4, small=300)
    kinds = _kinds(lab.pick(smoke=128, small=LATENTS))
    baseline: tuple[float, float] | None = None
    points: dict[str, list[Point]] = {}
    with lab.progress("six kinds", sum(len(kind.specs) for kind in kinds)) as advance:
        for kind in kinds:
            points[kind.name] = []
            options = dict(kind.options)
            if kind.name == "JumpReLU":
                options["scale"] = where.dim**-0.5  # to a mean ||x||^2 of 1
            for strength, spec in list(kind.specs.items())[: lab.pick(smoke=1, small=None)]:
                model = activations.fitted(lab, where, spec, steps=steps, lr=1e-3, seed=lab.seed, **options)
                quality = sae.measure(model, where.held_out.split(1024))
                model.rescale(1 / where.factor)
                loss = sae.loss_recovered(
                    where.model,
                    where.tap,
                    model,
                    where.contexts,
                    train.next_token_loss,
                    leave_out_first=1,
                    longest=where.longest,
                    baseline=baseline,
                )
                baseline = (loss.clean, loss.zero)
                points[kind.name].append(
                    Point(kind.name, strength, quality.l0, quality.fvu, loss.recovered, quality.dead)
                )
                advance(1)
    return points


def _curve(points: list[Point], what: str) -> list[tuple[float, float]]:
    return sorted((max(point.l0, 0.01), getattr(point, what)) for point in points)  # 0.01: none on has no logarithm


def _against(points: list[Point], base: list[Point], what: str) -> list[float]:
    """Return how far each point is above the base at its L0 (linear in log L0); those beyond its ends are left out."""
    curve = _curve(base, what)
    apart = []
    for point in points:
        for (low, first), (high, second) in pairwise(curve):
            if low <= point.l0 <= high and low < high:
                share = math.log(point.l0 / low) / math.log(high / low)
                apart.append(getattr(point, what) - (first + share * (second - first)))
                break
    return apart


@paper.claim(
    "The frontier: on SmolLM2's activations every later kind reconstructs better than the L1 of 2023 at equal L0",
    paper="Figure 2 (Gemma 2 9B): JumpReLU at or above Gated and TopK in loss recovered at every L0; the earlier "
    "papers each place their kind above L1",
    control="the L1 autoencoder of 2023, trained on the same rows of the same buffer",
)
def frontier(lab: Lab) -> Verdict:
    """Train six kinds from one activation buffer and draw loss recovered and FVU over L0."""
    where = activations.setting(lab)
    points = _points(lab, where)
    base, later = points[BASE], {name: found for name, found in points.items() if name != BASE}
    _draw_frontier(lab, points)
    lab.table(
        "Every autoencoder on the frontier",
        ["kind", "strength", "L0", "FVU", "loss recovered", "dead"],
        [
            [each.kind, each.strength, each.l0, each.fvu, each.recovered, each.dead]
            for found in points.values()
            for each in found
        ],
    )
    lower = {name: _against(found, base, "fvu") for name, found in later.items()}
    higher = {name: _against(found, base, "recovered") for name, found in later.items()}
    learned = ("Gated", "TopK", "JumpReLU")
    return lab.judge(
        checks={
            "Gated, TopK and JumpReLU: a lower FVU than L1 at every L0 both have": all(
                lower[name] and max(lower[name]) < 0 for name in learned
            ),
            "and more loss recovered": all(higher[name] and min(higher[name]) > 0 for name in learned),
            "every kind has a point where L1 has": all(lower.values()),
            "JumpReLU's FVU is not above Gated's at equal L0": all(
                apart <= 0 for apart in _against(points["JumpReLU"], points["Gated"], "fvu")
            ),
        },
        measured={
            f"{name}: L0, FVU, loss recovered": [round(value, 4) for p in found for value in (p.l0, p.fvu, p.recovered)]
            for name, found in later.items()
        }
        | {f"{name}: FVU above L1's at equal L0": values for name, values in lower.items() if values},
        control={"L1 (2023): L0, FVU, loss recovered": [value for p in base for value in (p.l0, p.fvu, p.recovered)]},
        note=f"{where.words}; {len(where.rows):,} activations after block 15 of 30 (first tokens and those longer "
        "than five medians left out, scaled to a "
        f"mean ||x||^2 of 576), {LATENTS} latents, 300 steps of 256; measured on {len(where.held_out):,} held-out "
        "activations, the loss on 512 held-out tokens. Short training: a first look, not the paper's scale.",
    )


def _draw_frontier(lab: Lab, points: dict[str, list[Point]]) -> None:
    colors = {kind.name: kind.color for kind in _kinds(128)}
    with lab.figure("frontier", figsize=(9.2, 4.0)) as figure:
        loss, error = figure.subplots(1, 2)
        for name, found in points.items():
            style = {"color": colors[name], "marker": "s" if name == BASE else "o", "ms": 5, "label": name}
            loss.plot(*zip(*_curve(found, "recovered"), strict=True), **style)
            error.plot(*zip(*_curve(found, "fvu"), strict=True), **style)
        loss.set_title("Loss recovered")
        error.set_title("Variance unexplained")
        for axes in (loss, error):
            axes.set_xscale("log")
            axes.set_xlabel("latents on (L0)")
        figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
