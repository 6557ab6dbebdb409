"""The polytope lens on a small classifier of generated images: affine pieces, and where they meet."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.interpret.probing.separation import bootstrap
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.papers.circuits.polytope_lens import polytopes
from paperworks.testbeds.pictures import Classes, Images, accuracy, fit, network

paper = Paper(
    key="polytope-lens",
    title="Interpreting Neural Networks through the Polytope Lens",
    authors="Black, Sharkey, Grinsztajn, Winsor, Braun, Merizian, Parker, Guevara, Millidge, Alfour, Leahy",
    year=2022,
    ref="arXiv:2211.12312",
    family="circuits",
    summary=(
        "A ReLU network is one affine map on each polytope of its input space. Which units are on names the polytope; "
        "more polytopes lie between inputs of different classes than between inputs of one."
    ),
    implements=(
        "paperworks.papers.circuits.polytope_lens.polytopes.spline_code",
        "paperworks.papers.circuits.polytope_lens.polytopes.affine_map",
        "paperworks.papers.circuits.polytope_lens.polytopes.crossings",
        "paperworks.papers.circuits.polytope_lens.polytopes.crossing_density",
        "paperworks.papers.circuits.polytope_lens.polytopes.hamming",
    ),
)

# Patterns of each class and the noise on them: a class is several clouds, so noisy that the network misses about 2%.
# With less noise neighbours of any kind are of one class, before training too.
STYLES, NOISE = 6, 0.9


def _trained(lab: Lab) -> tuple[nn.Sequential, nn.Sequential, Images, Images]:
    """Return a trained classifier, the same before training, the images trained on and held-out ones."""
    classes = Classes.smooth(STYLES, NOISE)
    shown = classes.draw(lab.pick(smoke=200, small=4000), 2 + 10 * lab.seed)
    held_out = classes.draw(lab.pick(smoke=60, small=1400), 3 + 10 * lab.seed)
    model, fresh = network(lab.seed), network(lab.seed)
    with lab.threads(1):
        fit(model, shown, steps=lab.pick(smoke=5, small=1500), rate=1e-3, seed=lab.seed)
    return model.eval(), fresh.eval(), shown, held_out


@torch.no_grad()
def _densities(lab: Lab, model: nn.Module, images: Images, pairs: Tensor, name: str) -> Float[Tensor, " pairs"]:
    """Return the number of boundaries for each unit of distance, on the segment between the images of each pair."""
    exact = network(0).double()
    exact.load_state_dict(model.state_dict())
    pixels = images.pixels.double()
    with lab.threads(1):
        return torch.tensor(
            [
                polytopes.crossing_density(exact, pixels[a], pixels[b])
                for a, b in lab.track(pairs.tolist(), f"boundaries, {name}")
            ]
        )


def _pairs(images: Images, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pairs of different images of different classes, and of one class."""
    drawn = torch.randint(len(images), (40 * count, 2), generator=torch.Generator().manual_seed(seed))
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    same = images.labels[drawn[:, 0]] == images.labels[drawn[:, 1]]
    return drawn[~same][:count], drawn[same][:count]


@paper.claim(
    "More polytope boundaries lie between images of different classes than within a class",
    paper="Polytope boundaries reflect semantic boundaries: more of them, for the distance, between images of "
    "different classes than of the same class; measured before on digits: 1.10 times, untrained 0.97",
    control="the same network before training",
)
def boundaries_lie_between_classes(lab: Lab) -> Verdict:
    """Count the switches of units on segments between held-out images, exactly, for each unit of distance."""
    model, fresh, _, images = _trained(lab)
    across, within = _pairs(images, lab.pick(smoke=10, small=700), lab.seed)
    found = {}
    for name, each in (("trained", model), ("untrained", fresh)):
        found[name] = tuple(_densities(lab, each, images, pairs, name) for pairs in (across, within))

    def ratio(name: str, rows: Tensor | None = None) -> float:
        apart, together = found[name]
        if rows is None:
            return float(apart.mean() / together.mean())
        # rows below the number of pairs are pairs across classes, those above it pairs within
        first = rows[rows < len(apart)]
        return float(apart[first].mean() / together[rows[rows >= len(apart)] - len(apart)].mean())

    total = len(across) + len(within)
    spans = {
        name: bootstrap(lambda rows, name=name: ratio(name, rows), total, seed=lab.seed)  # type: ignore[misc]
        for name in found
    }
    below = _share_at_most_one(found["trained"], lab.seed)
    _draw(lab, found)
    return lab.judge(
        checks={
            "the ratio is above 1.05": spans["trained"].value > 1.05,
            "it is above 1 with p < 0.01, by resampling pairs": below < 0.01,
            "and above the untrained network's": spans["trained"].low > spans["untrained"].high,
        },
        measured={
            "ratio of boundaries across to within classes": spans["trained"].value,
            "95% interval": [spans["trained"].low, spans["trained"].high],
            "share of resamples at most 1": below,
            "accuracy on these images": accuracy(model, images),
            "boundaries for each unit of distance across classes": float(found["trained"][0].mean()),
            "within": float(found["trained"][1].mean()),
            "pairs of each kind": len(across),
        },
        control={
            "ratio, untrained": spans["untrained"].value,
            "95% interval": [spans["untrained"].low, spans["untrained"].high],
        },
    )


def _share_at_most_one(densities: tuple[Tensor, ...], seed: int) -> float:
    """Return the share of 2,000 resamples of the pairs in which the ratio is 1 or less."""
    draws = torch.Generator().manual_seed(seed)
    apart, together = (
        values[torch.randint(len(values), (2000, len(values)), generator=draws)].mean(1) for values in densities
    )
    return float((apart <= together).float().mean())


def _draw(lab: Lab, found: dict[str, tuple[Tensor, ...]]) -> None:
    with lab.figure("boundaries", figsize=(8.2, 3.4)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (name, (across, within)) in zip(panels, found.items(), strict=True):
            edges = torch.linspace(0, float(torch.cat([across, within]).max()), 31).tolist()
            axes.hist(within.tolist(), edges, color=CONTROL, label="one class")
            axes.hist(across.tolist(), edges, histtype="step", color=COLORS[0], linewidth=2, label="two classes")
            axes.set_xlabel("boundaries for each unit of distance")
            axes.set_title(f"Pairs of images, {name}")
        panels[0].legend(loc="upper left")


@paper.claim(
    "Images in nearby polytopes are of one class",
    paper="Clusters of spline codes look more monosemantic than neurons or directions; measured before on digits: "
    "the nearest code has the right class for 86%",
    control="the codes of the same network before training",
)
def near_codes_share_a_class(lab: Lab) -> Verdict:
    """Give held-out images the class of the training image whose code differs in the fewest units."""
    model, fresh, shown, images = _trained(lab)
    library = shown[torch.arange(min(1200, len(shown)))]
    right = {}
    for name, each in (("trained", model), ("untrained", fresh)):
        codes = (polytopes.spline_code(each, part.pixels) for part in (images, library))
        nearest = polytopes.hamming(*codes).argmin(1)
        right[name] = (library.labels[nearest] == images.labels).float().mean().item()
    return lab.judge(
        checks={
            "the nearest code has the right class for more than 80%": right["trained"] > 0.8,
            "for at least 5 points more than before training": right["trained"] > right["untrained"] + 0.05,
        },
        measured={
            "nearest code, right class": right["trained"],
            "the network itself": accuracy(model, images),
            "codes compared with": len(library),
        },
        control={"nearest code, right class, untrained": right["untrained"]},
    )


@paper.claim(
    "On its polytope a network is one affine map, and lines cut the plane as geometry says",
    paper="f(x) = W x + b on each polytope; one layer of n units in the plane makes at most "
    "1 + n + n (n - 1) / 2 regions, 37 for 8",
    kind="exact",
)
@torch.no_grad()
def pieces_are_affine(lab: Lab) -> Verdict:
    """Check the maps at and around random inputs, count regions, and see that codes ignore a unit's scale."""
    model = network(lab.seed).double()
    draws = torch.Generator().manual_seed(lab.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    inside = beyond = 0.0
    neighbours = 0
    for x in draw(20, 64):
        piece = polytopes.affine_map(model, x)
        near = x + 0.002 * draw(50, 64)
        same = (polytopes.spline_code(model, near) == polytopes.spline_code(model, x[None])).all(1)
        error = (piece(near) - model(near)).abs().amax(1)
        neighbours += int(same.sum())
        inside = max(inside, (piece(x[None]) - model(x[None])).abs().max().item(), *error[same].tolist())
        beyond = max(beyond, *(piece(draw(5, 64)) - model(draw(5, 64))).abs().amax(1).tolist())
    wrong = _error_of_wrong_codes(model, draw(64))
    regions = _regions(draw(8, 2), draw(8))
    line = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    most = max(len(polytopes.crossings(line, *draw(2, 64))) for _ in range(50))
    x = draw(500, 64)
    before = polytopes.spline_code(model, x)
    scale = draw(64).exp()
    first, second = _linears(model)[:2]
    first.weight.mul_(scale[:, None])
    first.bias.mul_(scale)
    second.weight.div_(scale)
    changed = int((polytopes.spline_code(model, x) != before).sum())
    return lab.judge(
        checks={
            "the map is the network at x and at other inputs with its code, to 1e-10": inside < 1e-10,
            "there were such other inputs": neighbours > 20,
            "with each layer's code used for the other one it is not": wrong > 1e-2,
            "8 lines make 37 regions": regions == 37,
            "one layer of 64 units is crossed at most 64 times": 0 < most <= 64,
            "scaling units changes no code": changed == 0,
        },
        measured={
            "largest error within a polytope": inside,
            "other inputs in the same polytope": neighbours,
            "largest error beyond": beyond,
            "error with the codes of the wrong layers": wrong,
            "regions of 8 lines": regions,
            "most crossings of one layer": most,
            "code bits changed by scaling": changed,
        },
    )


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _error_of_wrong_codes(model: nn.Sequential, x: Tensor) -> float:
    """Return by how much the product of the layers misses f(x) when the two layers' codes are exchanged."""
    first, second = (value[0] > 0 for value in polytopes.pre_activations(model, x[None]).values())
    layers = _linears(model)
    output = layers[2](first * layers[1](second * layers[0](x)))
    return (output - model(x[None])[0]).abs().max().item()


def _regions(weight: Float[Tensor, "units 2"], bias: Float[Tensor, " units"]) -> int:
    """Count the codes of one layer over the plane: each region has a corner, so look around all corners."""
    layer = nn.Linear(2, len(bias)).double()
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    codes: set[tuple[bool, ...]] = set()
    for i in range(len(bias)):
        for j in range(i):
            pair = weight[[i, j]]
            corner = torch.linalg.solve(pair, -bias[[i, j]])
            sides = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
            around = corner + 1e-7 * torch.linalg.solve(pair, sides.mT).mT
            codes.update(map(tuple, polytopes.spline_code(nn.Sequential(layer, nn.ReLU()), around).tolist()))
    return len(codes)
