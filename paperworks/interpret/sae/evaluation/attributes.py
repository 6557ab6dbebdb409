"""What the features of a dictionary say about known attributes, and activations that are made of attributes.

Makelov, Lange & Nanda 2024, arXiv:2405.08366: the third of their tests, interpretability, and the toy models of
features that hide or split others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from paperworks.interpret.sae.evaluation.directions import random_directions
from paperworks.interpret.sae.evaluation.supervised import checked_attributes

_APART = 0x9E3779B9  # a network built after torch.manual_seed(seed) must not draw these codes as its weights


@dataclass(frozen=True)
class AttributeScores:
    """How well each feature, on above the best of some thresholds, tells each value of each attribute.

    f1: harmonic mean of precision and recall. Always being on has 2 p / (1 + p) for a value with share p: 2/3 for one
        of two values, so that a lower score says there is no such feature at all.
    balanced_accuracy: mean of the shares right among those with the value and those without; being always on has 1/2.
    sizes: values of each attribute; the columns of both go through attributes and their values in order.
    """

    f1: Float[Tensor, "features predicates"]
    balanced_accuracy: Float[Tensor, "features predicates"]
    sizes: tuple[int, ...]

    def mean_best(self) -> list[float]:
        """For each attribute the F1 of the best feature for each value, mean over values."""
        return [float(best.mean()) for best in self.f1.amax(dim=0).split(self.sizes)]

    def mean_best_balanced(self) -> list[float]:
        """The same of the balanced accuracy."""
        return [float(best.mean()) for best in self.balanced_accuracy.amax(dim=0).split(self.sizes)]


def attribute_scores(
    latents: Float[Tensor, "n features"],
    attributes: Int[Tensor, "n attributes"],
    sizes: tuple[int, ...] | None = None,
    thresholds: int = 10,
) -> AttributeScores:
    """Score all features as detectors of attribute values, at thresholds of 0, 1/10, ... 9/10 of their largest value.

    Args:
        latents: what an autoencoder's `encode` gives for n prompts.
        attributes, sizes: see `supervised.mean_codes`.
        thresholds: how many.

    Raises ValueError for latents below 0 or of another number of rows, or fewer than one threshold.
    """
    attributes, sizes = checked_attributes(attributes, sizes, len(latents))
    truth = _truth(attributes, sizes)
    having, lacking = truth.sum(dim=0), len(truth) - truth.sum(dim=0)
    f1 = torch.zeros(latents.shape[1], truth.shape[1], dtype=torch.float64, device=latents.device)
    balanced = torch.zeros_like(f1)
    for on in _detections(latents, thresholds):
        both, fired = on.T @ truth, on.sum(dim=0)[:, None]
        f1 = torch.maximum(f1, 2 * both / (fired + having).clamp_min(1))
        rates = both / having.clamp_min(1) + 1 - (fired - both) / lacking.clamp_min(1)
        balanced = torch.maximum(balanced, rates / 2)
    return AttributeScores(f1, balanced, sizes)


@dataclass(frozen=True)
class Meaning:
    """What a feature says: the predicate "this attribute has one of these values" that fits it best."""

    feature: int
    attribute: int
    values: tuple[int, ...]
    f1: float


def best_meanings(
    latents: Float[Tensor, "n features"],
    attributes: Int[Tensor, "n attributes"],
    sizes: tuple[int, ...] | None = None,
    thresholds: int = 10,
    most: int | None = None,
) -> list[Meaning]:
    """For every feature the single value or union of values of one attribute with the largest F1.

    No union is left out, though not each is tried: F1 above F needs sum over its values of (2 both - F having) > F on,
    so for every F the best union is that of the largest such terms, and F rises until it stays (Dinkelbach 1967).

    Args:
        latents, attributes, sizes, thresholds: see `attribute_scores`.
        most: values in a union; None is half of an attribute's values, for the union of nearly all fits every feature
            that is nearly always on.
    """
    attributes, sizes = checked_attributes(attributes, sizes, len(latents))
    truth = _truth(attributes, sizes)
    found = [Meaning(feature, 0, (0,), 0.0) for feature in range(latents.shape[1])]
    for on in _detections(latents, thresholds):
        parts = zip((on.T @ truth).split(sizes, dim=1), truth.sum(dim=0).split(sizes), strict=True)
        for attribute, (both, having) in enumerate(parts):
            limit = max(1, sizes[attribute] // 2 if most is None else most)
            chosen, f1 = _best_union(both, having, on.sum(dim=0), limit)
            for feature in (f1 > torch.tensor([known.f1 for known in found]).to(f1)).nonzero().flatten().tolist():
                values = tuple(chosen[feature].nonzero().flatten().tolist())
                found[feature] = Meaning(feature, attribute, values, float(f1[feature]))
    return found


def _best_union(
    both: Float[Tensor, "features values"],
    having: Float[Tensor, " values"],
    fired: Float[Tensor, " features"],
    most: int,
) -> tuple[Bool[Tensor, "features values"], Float[Tensor, " features"]]:
    """For each feature which of an attribute's values to unite, at most so many, and the F1 of that."""
    f1 = torch.zeros_like(fired)
    while True:
        terms = 2 * both - f1[:, None] * having
        largest, places = terms.topk(min(most, len(having)), dim=1)
        chosen = torch.zeros_like(both, dtype=torch.bool).scatter_(1, places, largest > 0)
        higher = 2 * (both * chosen).sum(dim=1) / (fired + (having * chosen).sum(dim=1)).clamp_min(1)
        if not bool((higher > f1 + 1e-12).any()):
            return chosen, higher
        f1 = torch.maximum(f1, higher)


def _truth(attributes: Tensor, sizes: Sequence[int]) -> Float[Tensor, "n predicates"]:
    columns = zip(attributes.unbind(dim=1), sizes, strict=True)
    return torch.cat([one_hot(values, size) for values, size in columns], dim=1).double()


def _detections(latents: Tensor, thresholds: int) -> Iterator[Float[Tensor, "n features"]]:
    """Give, for each threshold, where each feature is above it."""
    if thresholds < 1:
        raise ValueError(f"thresholds is {thresholds}; one or more are needed")
    if latents.dim() != 2 or bool((latents < 0).any()):
        raise ValueError(f"latents must be (n, features) and 0 or more, got shape {tuple(latents.shape)}")
    largest = latents.detach().amax(dim=0)
    for index in range(thresholds):
        yield (latents.detach() > largest * (index / thresholds)).double()


class AdditiveAttributes:
    """x = factor * (sum_i magnitude_i * c_{i, a_i} + noise): independent attributes, each value a random unit vector.

    Args:
        sizes: values of each attribute.
        magnitudes: length of each attribute's codes.
        dim: dimensions.
        noise: standard deviation of what is added to every coordinate.
        mean_square: what E ||x||^2 is brought to by the one `factor`; None leaves factor at 1.
        seed: of the codes.

    `codes` are the true ones, (values, dim) for each attribute, factor included.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (10, 10, 2),
        magnitudes: Sequence[float] = (1.0, 0.8, 0.3),
        dim: int = 64,
        noise: float = 0.02,
        *,
        mean_square: float | None = None,
        seed: int = 0,
    ) -> None:
        if len(sizes) != len(magnitudes) or not sizes or min(sizes) < 2:
            raise ValueError(
                f"give every attribute a magnitude and two values or more, got {tuple(sizes)}, {tuple(magnitudes)}"
            )
        if noise < 0 or min(magnitudes) < 0 or (mean_square is not None and not mean_square > 0):
            raise ValueError(
                f"noise and magnitudes must be 0 or more, mean_square positive; got {noise}, {tuple(magnitudes)} and "
                f"{mean_square}"
            )
        self.sizes, self.noise, self.factor = tuple(sizes), noise, 1.0
        generator = torch.Generator().manual_seed(seed + _APART)
        self.codes = [
            magnitude * random_directions(size, dim, generator)
            for size, magnitude in zip(sizes, magnitudes, strict=True)
        ]
        if mean_square is not None:
            self.factor = (mean_square / self._mean_square()) ** 0.5
            self.codes = [self.factor * code for code in self.codes]

    @property
    def dim(self) -> int:
        """Dimensions of the activations."""
        return self.codes[0].shape[1]

    def _mean_square(self) -> float:
        """E ||x||^2 = dim noise^2 + sum_i E ||c_i||^2 + sum over i != j of E c_i . E c_j, at factor 1."""
        means = torch.stack([code.double().mean(dim=0) for code in self.codes])
        own = sum(float(code.double().square().sum(dim=1).mean()) for code in self.codes)
        together = float(means.sum(dim=0).square().sum() - means.square().sum())
        return self.dim * self.noise**2 + own + together

    def draw(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "count dim"], Int[Tensor, "count attributes"]]:
        """Draw activations and the values of their attributes."""
        columns = [torch.randint(size, (count,), generator=generator) for size in self.sizes]
        attributes = torch.stack(columns, dim=1)
        noise = self.factor * self.noise * torch.randn(count, self.dim, generator=generator)
        return self.sum(attributes) + noise, attributes

    def sum(self, attributes: Int[Tensor, "n attributes"]) -> Float[Tensor, "n dim"]:
        """Activations without noise."""
        parts = zip(self.codes, attributes.unbind(dim=1), strict=True)
        return torch.stack([code[values] for code, values in parts]).sum(dim=0)

    def read(self, x: Float[Tensor, "n dim"]) -> Int[Tensor, "n attributes"]:
        """The attributes whose sum of codes is nearest to each activation: what a model could read off it."""
        every = torch.cartesian_prod(*[torch.arange(size, device=x.device) for size in self.sizes])
        every = every.view(len(every), -1)
        return every[torch.cdist(x, self.sum(every).to(x)).argmin(dim=1)]

    def batches(self, size: int, count: int, seed: int = 0) -> Iterator[Float[Tensor, "size dim"]]:
        """Draw `count` batches of activations, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield self.draw(size, generator)[0]
