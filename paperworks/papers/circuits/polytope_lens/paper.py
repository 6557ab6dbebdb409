"""The polytope lens on a small classifier of generated images: affine pieces, and where they meet."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
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
    equation=r"f(x) = W_s x + b_s \text{ where } s(x) = \operatorname{sign}(\text{pre-activations}) = s, "
    r"\qquad \text{density}(a, b) = \frac{\text{changes of } s \text{ from } a \text{ to } b}{\lVert a - b \rVert}",
    usage="""
import torch
from torch import nn
from paperworks.papers.circuits.polytope_lens import polytopes

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
a, b = torch.randn(2, 8, dtype=torch.float64)
print("units that are on:", polytopes.spline_code(model, a[None]).sum().item(), "of 32")
piece = polytopes.affine_map(model, a)                     # W and b of the polytope that a is in
print("it is the network there:", torch.allclose(piece(a[None]), model(a[None])))
print("boundaries from a to b:", len(polytopes.crossings(model, a, b)))
""",
    notes="Drawn pictures of ten classes and a network of three layers; the paper uses InceptionV1 and GPT-2.",
)

# Patterns of each class and the noise on them: a class is several clouds, so noisy that the network misses about 2%.
# With less noise neighbours of any kind are of one class, before training too.
STYLES, NOISE = 6, 0.9


@cache
def _trained(lab: Lab, seed: int) -> tuple[nn.Sequential, nn.Sequential, Images, Images]:
    """A trained classifier, the same before training, the images trained on and held-out ones."""
    classes = Classes.smooth(STYLES, NOISE)
    shown = classes.draw(lab.pick(smoke=200, small=4000), 2 + 10 * seed)
    held_out = classes.draw(lab.pick(smoke=60, small=1400), 3 + 10 * seed)
    model, fresh = network(seed), network(seed)
    with lab.threads(1):
        fit(model, shown, steps=lab.pick(smoke=5, small=1500), rate=1e-3, seed=seed)
    return model.eval(), fresh.eval(), shown, held_out


@torch.no_grad()
def _densities(model: nn.Module, images: Images, pairs: Tensor) -> Float[Tensor, " pairs"]:
    """Boundaries for each unit of distance, on the segment between the images of each pair."""
    exact = network(0).double()
    exact.load_state_dict(model.state_dict())
    pixels = images.pixels.double()
    return torch.tensor([polytopes.crossing_density(exact, pixels[a], pixels[b]) for a, b in pairs.tolist()])


def _pairs(images: Images, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of different images of different classes, and of one class."""
    drawn = torch.randint(len(images), (40 * count, 2), generator=draws)
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    same = images.labels[drawn[:, 0]] == images.labels[drawn[:, 1]]
    return drawn[~same][:count], drawn[same][:count]


@paper.claim(
    "More polytope boundaries lie between images of different classes than within a class",
    paper="Polytope boundaries reflect semantic boundaries: more of them, for the distance, between images of "
    "different classes than of the same class",
    control="the same network before training",
)
def boundaries_lie_between_classes(lab: Lab) -> Verdict:
    """Count the switches of units on segments between held-out images, exactly, for each unit of distance."""
    count = lab.pick(smoke=10, small=700)

    def arm(trained: bool) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            model, fresh, _, images = _trained(lab, seed)
            pairs = _pairs(images, count, lab.generator(seed))
            across, within = (_densities(model if trained else fresh, images, each) for each in pairs)
            return {
                "boundaries across classes, over those within": float(across.mean() / within.mean()),
                "boundaries for each unit of distance across classes": float(across.mean()),
                "accuracy": accuracy(model if trained else fresh, images),
            }

        return measured

    after, before, on = "trained", "before training", "boundaries across classes, over those within"
    verdict = lab.compare(
        arms={after: arm(True), before: arm(False)},
        main=Beats(after, before, on=on, by=0.05),
        also=[AtLeast(after, 1.05, on=on)],
        seeds=5,
        note=f"{count} held-out pairs of each kind; ten classes of {STYLES} noisy patterns each.",
    )
    lab.points(on, name="boundaries", title="Boundaries between and within classes")
    return verdict


@paper.claim(
    "Images in nearby polytopes are of one class",
    paper="Clusters of spline codes look more monosemantic than neurons or directions",
    control="the codes of the same network before training",
)
def near_codes_share_a_class(lab: Lab) -> Verdict:
    """Give held-out images the class of the training image whose code differs in the fewest units."""

    def arm(trained: bool) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            model, fresh, shown, images = _trained(lab, seed)
            library = shown[torch.arange(min(1200, len(shown)))]
            chosen = model if trained else fresh
            codes = (polytopes.spline_code(chosen, part.pixels) for part in (images, library))
            nearest = polytopes.hamming(*codes).argmin(1)
            return {"nearest code of the right class": (library.labels[nearest] == images.labels).float().mean().item()}

        return measured

    after, before, on = "trained", "before training", "nearest code of the right class"
    verdict = lab.compare(
        arms={after: arm(True), before: arm(False)},
        main=Beats(after, before, on=on, by=0.05),
        also=[AtLeast(after, 0.8, on=on)],
        seeds=5,
        note="Compared with the codes of 1,200 training images.",
    )
    lab.points(on, name="nearest", title="Nearest code of the right class")
    return verdict


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
    """By how much the product of the layers misses f(x) when the two layers' codes are exchanged."""
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
