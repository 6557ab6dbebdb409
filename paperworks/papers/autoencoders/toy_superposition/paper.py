"""Toy models of superposition: sparse features share dimensions, in regular polygons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT, INK
from paperworks.papers.autoencoders.toy_superposition import superposition as toy

paper = Paper(
    key="toy-superposition",
    title="Toy Models of Superposition",
    authors="Elhage, Hume, Olsson, Schiefer, Henighan, Kravec et al.",
    year=2022,
    ref="transformer-circuits.pub/2022/toy_model; arXiv:2209.10652",
    family="autoencoders",
    summary=(
        "A layer with fewer dimensions than its input has features keeps only the most important ones while they are "
        "dense; once they are sparse a ReLU lets it store more features than dimensions, arranged in regular polygons."
    ),
    implements=(
        "paperworks.papers.autoencoders.toy_superposition.superposition.ToyModel",
        "paperworks.papers.autoencoders.toy_superposition.superposition.AbsoluteValueModel",
        "paperworks.papers.autoencoders.toy_superposition.superposition.sparse_features",
        "paperworks.papers.autoencoders.toy_superposition.superposition.paired_features",
        "paperworks.papers.autoencoders.toy_superposition.superposition.dimensionality",
        "paperworks.papers.autoencoders.toy_superposition.superposition.superposition",
    ),
)

FEATURES, HIDDEN = 5, 2
DENSITIES = (1.0, 0.6, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)  # 1 - S, the chance that a feature is active
STORED = 0.5  # a feature is stored when ||W_i|| is above this: half of what a feature alone would have
PLACES: tuple[toy.Rectifier, ...] = ("output", "none", "hidden")
NAMES = {"output": "ReLU on the output", "none": "linear model", "hidden": "ReLU before W\u1d40"}


@dataclass(frozen=True)
class Trained:
    """Models of every place of the ReLU that saw the same data, and their loss on fresh data, one an instance."""

    models: dict[toy.Rectifier, toy.ToyModel]
    losses: dict[toy.Rectifier, Float[Tensor, " instances"]]

    def weight(self, place: toy.Rectifier = "output") -> Float[Tensor, "instances hidden features"]:
        """Return the trained weights."""
        return self.models[place].weight.detach()


def _train(
    lab: Lab,
    density: Float[Tensor, " instances"],
    importance: Float[Tensor, "instances features"],
    hidden: int,
    places: tuple[toy.Rectifier, ...],
    description: str,
) -> Trained:
    """Train one model an instance and place, all on the same draws, and measure their losses."""
    instances, features = importance.shape
    models = nn.ModuleDict({place: toy.ToyModel(instances, features, hidden, place) for place in places})
    batch, steps = 1024, lab.pick(smoke=20, small=5000)
    draws = torch.Generator().manual_seed(lab.seed)

    def loss(model: nn.Module, x: Float[Tensor, "instances batch features"]) -> Tensor:
        # Summed over instances, so that each has the gradient it would have alone.
        return torch.stack([toy.weighted_error(part(x), x, importance).sum() for part in model.children()]).sum()

    settings = train.Settings(
        steps=steps,
        lr=3e-3,
        optimizer=train.AdamW(weight_decay=0.0),
        schedule="constant",
        warmup=0,
        clip=None,  # a common norm would tie the instances together
        seed=None,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress(description, steps) as advance:
        train.fit(
            models,
            loss,
            lambda epoch: (toy.sparse_features(batch, density, features, draws) for _ in range(steps)),
            settings,
            on_step=lambda step: advance(1),
        )
    trained = {place: models[place] for place in places}
    return Trained(trained, _losses(lab, trained, density, importance, draws))  # type: ignore[arg-type]


@torch.no_grad()
def _losses(
    lab: Lab,
    models: dict[toy.Rectifier, toy.ToyModel],
    density: Float[Tensor, " instances"],
    importance: Float[Tensor, "instances features"],
    draws: torch.Generator,
) -> dict[toy.Rectifier, Float[Tensor, " instances"]]:
    """Return each instance's loss on the same fresh samples for every model (102,400, but few in a smoke run)."""
    rounds = lab.pick(smoke=2, small=50)
    totals = {place: torch.zeros(len(density)) for place in models}
    for _ in range(rounds):
        x = toy.sparse_features(2048, density, importance.shape[1], draws)
        for place, model in models.items():
            totals[place] += toy.weighted_error(model(x), x, importance) / rounds
    return totals


def _stored(weight: Float[Tensor, "*instances hidden features"]) -> list[int]:
    return (toy.feature_norms(weight) > STORED).sum(dim=-1).tolist()


@paper.claim(
    "Sparse features are stored in superposition: five of them in two dimensions",
    paper="'Demonstrating superposition': 2 of 5 features while dense, all 5 as a pentagon when sparse",
    control="the linear model, and the ReLU placed before W\u1d40, on the same data",
    tour=60,
)
def stores_more_features_than_dimensions(lab: Lab) -> Verdict:
    """Count the features that are stored as they become sparse, and draw what equal ones end up as."""
    # The last instance is for the drawing: equal importance, sparse.
    density = torch.tensor([*DENSITIES, 0.05])
    decaying = 0.9 ** torch.arange(FEATURES)
    importance = torch.stack([decaying] * len(DENSITIES) + [torch.ones(FEATURES)])
    trained = _train(lab, density, importance, HIDDEN, PLACES, "five features, two dimensions")
    stored = {place: _stored(trained.weight(place)[:-1]) for place in PLACES}
    share = toy.dimensionality(trained.weight()).sum(dim=-1)
    _draw_superposition(lab, trained, stored)
    ours = stored["output"]
    dense_loss = trained.losses["none"][0].item()
    return lab.judge(
        checks={
            "all five are stored when sparsest": ours[-1] == FEATURES,
            "only two are stored when dense": ours[0] == HIDDEN,
            "never fewer as features become sparser": ours == sorted(ours),
            "the linear model stores two at every sparsity": set(stored["none"]) == {HIDDEN},
            "so does the ReLU before W\u1d40": set(stored["hidden"]) == {HIDDEN},
            "the dimensionalities add up to the dimensions, to 2%": bool(((share / HIDDEN - 1).abs() < 0.02).all()),
        },
        measured={
            "features stored": ours,
            "chance of being active": list(DENSITIES),
            "sum of D_i": [round(value, 3) for value in share[:-1].tolist()],
        },
        control={
            "linear model": stored["none"],
            "ReLU before W\u1d40": stored["hidden"],
            "dense loss of the linear model": dense_loss,
        },
        note=f"A feature counts as stored when its norm is above {STORED}. Importance 0.9^i; 5,000 steps of AdamW.",
    )


def _draw_superposition(lab: Lab, trained: Trained, stored: dict[toy.Rectifier, list[int]]) -> None:
    with lab.figure("pentagon", figsize=(9.2, 5.2)) as figure:
        grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.9))
        strip = grid[0].subgridspec(1, len(DENSITIES))
        for index, density in enumerate(DENSITIES):
            axes = figure.add_subplot(strip[index])
            _draw_plane(axes, trained.weight()[index], small=True)
            axes.set_title(f"{density:.0%}", fontsize=9, fontweight="normal", loc="center", pad=2)
        figure.suptitle(
            "Where the five features point, from dense to sparse (share of the time a feature is active)",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
            color=INK,
        )
        below = grid[1].subgridspec(1, 2, width_ratios=(1.7, 1))
        counts = figure.add_subplot(below[0])
        for place, count in reversed(stored.items()):
            color = COLORS[0] if place == "output" else CONTROL
            style = ":" if place == "hidden" else "-"
            marker = "s" if place == "hidden" else "o"
            size = 10 if place == "hidden" else 6
            face = "none" if place == "hidden" else color
            counts.plot(DENSITIES, count, style, color=color, marker=marker, ms=size, mfc=face, label=NAMES[place])
        counts.set_xscale("log")
        counts.set_xticks(DENSITIES, [f"{density:.0%}" for density in DENSITIES])
        counts.set_xticks([], minor=True)
        counts.invert_xaxis()
        counts.set_ylim(0, 5.4)
        counts.set_xlabel("share of the time a feature is active  (sparser \u2192)")
        counts.set_title("Features stored in two dimensions")
        counts.legend(loc="lower right", bbox_to_anchor=(1.0, 0.02))
        plane = figure.add_subplot(below[1])
        _draw_plane(plane, trained.weight()[-1], small=False)
        plane.set_title("Equal features, 5% active", loc="center")


def _draw_plane(axes: Any, weight: Float[Tensor, "2 features"], *, small: bool) -> None:
    """Draw the features as arrows in the plane of the hidden units, inside the unit circle."""
    from matplotlib.patches import Circle, Polygon

    axes.set_aspect("equal")
    axes.set_axis_off()
    reach = 1.2 if small else 1.35
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.add_patch(Circle((0, 0), 1.0, fill=False, edgecolor=FAINT, linewidth=0.7, alpha=0.6))
    columns = weight.T.tolist()
    if not small:
        order = torch.atan2(weight[1], weight[0]).argsort().tolist()
        corners = [columns[index] for index in order]
        axes.add_patch(Polygon(corners, closed=True, facecolor=COLORS[0], alpha=0.12, edgecolor="none"))
        axes.add_patch(Polygon(corners, closed=True, fill=False, edgecolor=COLORS[0], linewidth=1.2, alpha=0.7))
    for index, (x, y) in enumerate(columns):
        color = COLORS[index % len(COLORS)]
        axes.plot([0, x], [0, y], color=color, linewidth=1.6 if small else 2.6)
        axes.plot([x], [y], "o", color=color, markersize=3 if small else 7)
        if not small:
            axes.text(1.2 * x, 1.2 * y, f"{index + 1}", ha="center", va="center", color=INK, fontsize=9)


@paper.claim(
    "Equal sparse features form a regular pentagon",
    paper="'The geometry of superposition': five features in two dimensions lie at the corners of a regular pentagon, "
    "each with dimensionality 2/5",
    control="the linear model on the same data, which keeps a flat two-dimensional view of them",
)
def equal_features_form_a_pentagon(lab: Lab) -> Verdict:
    """Train eight seeds at three sparsities and measure angles and dimensionalities."""
    seeds = lab.pick(smoke=2, small=8)
    densities = (0.1, 0.05, 0.03)
    density = torch.tensor([value for value in densities for _ in range(seeds)])
    importance = torch.ones(len(density), FEATURES)
    trained = _train(lab, density, importance, HIDDEN, ("output", "none"), "pentagons")
    regular = {place: [_is_pentagon(weight) for weight in trained.weight(place)] for place in trained.models}
    counts = {
        place: [sum(found[start : start + seeds]) for start in range(0, len(found), seeds)]
        for place, found in regular.items()
    }
    sparse = [index for index in range(seeds, len(density)) if regular["output"][index]]
    corners = trained.weight()[sparse]
    angles = torch.stack([toy.neighbour_angles(weight) for weight in corners]) if sparse else torch.zeros(1)
    shares = toy.dimensionality(corners) if sparse else torch.zeros(1)
    return lab.judge(
        checks={
            "all runs at 5% and 3% are regular pentagons": counts["output"][1:] == [seeds, seeds],
            "most runs at 10% are": counts["output"][0] > seeds / 2,
            "each feature has 0.38 to 0.42 of a dimension": bool((shares > 0.38).all() and (shares < 0.42).all()),
            "the linear model never makes one": sum(counts["none"]) == 0,
        },
        measured={
            "regular pentagons": [
                f"{count} of {seeds} at {d:.0%}" for count, d in zip(counts["output"], densities, strict=True)
            ],
            "angles, smallest and largest": [angles.min(), angles.max()],
            "D_i, smallest and largest": [shares.min(), shares.max()],
        },
        control={
            "regular pentagons": [
                f"{count} of {seeds} at {d:.0%}" for count, d in zip(counts["none"], densities, strict=True)
            ],
            "features represented (sum of squared norms)": (
                HIDDEN / toy.dimensions_per_feature(trained.weight("none"))
            ).mean(),
        },
        note="Regular: all five norms above 0.5 and all angles between neighbours within 3 degrees of 72.",
    )


def _is_pentagon(weight: Float[Tensor, "2 features"]) -> bool:
    angles = toy.neighbour_angles(weight)
    return bool((toy.feature_norms(weight) > STORED).all()) and bool(((angles - 72).abs() < 3).all())


PHASE_DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
PHASE_IMPORTANCES = (0.1, 0.3, 0.6, 1.0, 1.5, 3.0, 10.0)  # of the second feature relative to the first
PHASES = ("not stored", "antipodal", "dedicated")


@paper.claim(
    "Two features in one dimension change phase: ignored, dedicated or antipodal",
    paper="'Superposition as a phase change': the extra feature is not represented, has the dimension to itself, or "
    "shares it as an antipodal pair, with sharp borders in sparsity and relative importance",
    control="the linear model, which never shares the dimension",
)
def phase_diagram(lab: Lab) -> Verdict:
    """Fill the diagram for n = 2, m = 1 with the best of four seeds in each cell."""
    seeds = lab.pick(smoke=1, small=4)
    cells = [(density, ratio) for density in PHASE_DENSITIES for ratio in PHASE_IMPORTANCES]
    density = torch.tensor([cell[0] for cell in cells for _ in range(seeds)])
    importance = torch.tensor([[1.0, cell[1]] for cell in cells for _ in range(seeds)])
    trained = _train(lab, density, importance, 1, ("output", "none"), "phase diagram")
    rows = {place: _phases(trained, place, seeds) for place in trained.models}
    _draw_phases(lab, rows["output"])
    ours = rows["output"]
    antipodal = [
        [ratio for ratio, phase in zip(PHASE_IMPORTANCES, row, strict=True) if phase == "antipodal"] for row in ours
    ]
    linear = sum(phase == "antipodal" for row in rows["none"] for phase in row)
    return lab.judge(
        checks={
            "antipodal at every importance when 10% active or less": antipodal[3:] == [list(PHASE_IMPORTANCES)] * 2,
            "never antipodal when dense": antipodal[0] == [],
            "in between, only about equal importance": antipodal[1] == [0.6, 1.0, 1.5]
            and antipodal[2] == [0.3, 0.6, 1.0, 1.5, 3.0],
            "dense, the more important feature has the dimension": ours[0][0] == "not stored"
            and ours[0][-1] == "dedicated",
            "the linear model is never antipodal": linear == 0,
        },
        measured={
            f"antipodal importances, {active:.0%} active": antipodal[index] or "none"
            for index, active in enumerate(PHASE_DENSITIES)
        },
        control={"antipodal cells of the linear model": linear, "cells": len(cells)},
        note=(
            "Importance of the second feature relative to the first; the best of four seeds in each cell by loss. "
            "Antipodal: opposite signs, and squared norms that add up to more than 1.5."
        ),
    )


def _phases(trained: Trained, place: toy.Rectifier, seeds: int) -> list[list[str]]:
    """Name the phase of the second feature in each cell, from the seed with the least loss."""
    best = trained.losses[place].view(-1, seeds).argmin(dim=1)
    weight = trained.weight(place).view(-1, seeds, 2)
    phases = []
    for cell, seed in enumerate(best.tolist()):
        first, second = weight[cell, seed].tolist()
        # One dimension's worth is ||W||^2 = 1, two features stored at full length is 2. Equally important
        # dense features may share one dimension's worth in any ratio: a tie, not superposition.
        if first * second < 0 and first**2 + second**2 > 1.5:
            phases.append("antipodal")
        else:
            phases.append("dedicated" if abs(second) > abs(first) else "not stored")
    width = len(PHASE_IMPORTANCES)
    return [phases[start : start + width] for start in range(0, len(phases), width)]


def _draw_phases(lab: Lab, rows: list[list[str]]) -> None:
    from matplotlib.patches import Rectangle

    colors = dict(zip(PHASES, (CONTROL, COLORS[0], COLORS[1]), strict=True))
    with lab.figure("phases", figsize=(6.4, 3.6)) as figure:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            for x, phase in enumerate(row):
                axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, color=colors[phase], linewidth=0))
        axes.set_xlim(-0.5, len(PHASE_IMPORTANCES) - 0.5)
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_xticks(range(len(PHASE_IMPORTANCES)), [f"{ratio:g}" for ratio in PHASE_IMPORTANCES])
        axes.set_yticks(range(len(rows)), [f"{density:.0%}" for density in PHASE_DENSITIES])
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("importance of the second feature relative to the first")
        axes.set_ylabel("share of the time active")
        axes.set_title("What happens to the second feature")
        handles = [Rectangle((0, 0), 1, 1, color=colors[phase], label=phase) for phase in PHASES]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))


@paper.claim(
    "Dense features: the linear model drops the least important ones, at the loss the formula gives",
    paper="'Setup' and the linear model: the optimum keeps the m most important features; with a bias the rest costs "
    "sum of I_i / 12, which is 0.18293 for n=5, m=2, I_i = 0.9^i",
    kind="exact",
)
def dense_loss_is_the_closed_form(lab: Lab) -> Verdict:
    """Compare the trained dense loss with the closed form."""
    importance = (0.9 ** torch.arange(FEATURES)).unsqueeze(0)
    trained = _train(lab, torch.ones(1), importance, HIDDEN, ("none", "output"), "dense features")
    formula = toy.linear_optimum(importance[0], HIDDEN)
    linear, rectified = trained.losses["none"].item(), trained.losses["output"].item()
    kept = (toy.feature_norms(trained.weight("none"))[0] > STORED).nonzero().flatten().tolist()
    return lab.judge(
        checks={
            "the linear model reaches the closed form, to 3%": abs(linear / formula - 1) < 0.03,
            "so does the ReLU model": abs(rectified / formula - 1) < 0.03,
            "it keeps the two most important features": kept == [0, 1],
            "the formula gives 0.18293": abs(formula - (0.81 + 0.729 + 0.6561) / 12) < 1e-7,
        },
        measured={"linear model": linear, "ReLU model": rectified, "closed form": formula, "features kept": kept},
    )


@paper.claim(
    "Dimensionality reads 1 for a feature of its own, 1/2 for a pair, 2/5 for a pentagon",
    paper="'The geometry of superposition': D_i of digons, triangles and pentagons; neither D_i nor the loss changes "
    "when the hidden space is rotated",
    kind="exact",
)
def geometry_is_exact(lab: Lab) -> Verdict:
    """Evaluate the metrics on constructed geometries and under a random rotation, in float64."""
    shapes = {"one feature a dimension": (torch.eye(2, dtype=torch.float64), 1.0)}
    expected = {"antipodal pair": (2, 1 / 2), "triangle": (3, 2 / 3), "square": (4, 1 / 2), "pentagon": (5, 2 / 5)}
    for name, (corners, share) in expected.items():
        # A pair occupies one dimension of the two, so each of its features has half of that one.
        shapes[name] = (toy.regular_polygon(corners), share)
    errors = {name: (toy.dimensionality(weight) - share).abs().max().item() for name, (weight, share) in shapes.items()}
    within = _largest_total_share(lab)
    moved, loss_moved = _effect_of_rotation(lab)
    lab.table(
        "Dimensionality of constructed geometries",
        ["geometry", "D_i of the paper", "largest error"],
        [[name, share, errors[name]] for name, (_, share) in shapes.items()],
    )
    # Some twenty float64 additions and divisions of numbers near 1.
    return lab.judge(
        checks={
            "every D_i is the paper's, to 1e-12": max(errors.values()) < 1e-12,
            "the D_i of random weights never exceed the dimensions": within <= 3 + 1e-9,
            "rotating the hidden space changes no D_i": moved < 1e-12,
            "nor the loss": loss_moved < 1e-12,
        },
        measured={
            "largest error of D_i": max(errors.values()),
            "largest sum of D_i over 3 dimensions": within,
            "change of D_i under rotation": moved,
            "change of the loss under rotation": loss_moved,
        },
    )


def _largest_total_share(lab: Lab) -> float:
    draws = torch.Generator().manual_seed(lab.seed)
    weight = torch.randn(1000, 3, 7, generator=draws, dtype=torch.float64)
    return toy.dimensionality(weight).sum(dim=-1).max().item()


@torch.no_grad()
def _effect_of_rotation(lab: Lab) -> tuple[float, float]:
    """Return how much D_i and the loss of the ReLU model change when W becomes Q W with Q orthogonal."""
    draws = torch.Generator().manual_seed(lab.seed)
    model = toy.ToyModel(4, 6, 3).double()
    rotation = torch.linalg.qr(torch.randn(4, 3, 3, generator=draws, dtype=torch.float64)).Q
    x = toy.sparse_features(256, torch.full((4,), 0.5, dtype=torch.float64), 6, draws).double()
    importance = torch.ones(6, dtype=torch.float64)
    shares, loss = toy.dimensionality(model.weight), toy.weighted_error(model(x), x, importance)
    model.weight.copy_(rotation @ model.weight)
    moved = (toy.dimensionality(model.weight) - shares).abs().max().item()
    return moved, (toy.weighted_error(model(x), x, importance) - loss).abs().max().item()
