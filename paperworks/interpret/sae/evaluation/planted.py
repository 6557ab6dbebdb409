"""Activations whose directions are known: sparse features in superposition, for telling what a method recovers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret.sae.evaluation.directions import random_directions, unit_rows

# A network built after torch.manual_seed(seed) must not draw these very directions as its weights.
_APART = 0x9E3779B9


class Planted:
    """x = factor * sum_i a_i d_i: each random unit direction d_i is on with probability `rate`, at a_i in U[low, high].

    The defaults are 256 directions in 64 dimensions, five of them on at a time on average.

    Args:
        features, dim: how many directions, in how many dimensions.
        rate: chance of being on; one for all, or (features,) of them.
        low, high: range of the magnitudes.
        mean_square: what the mean of ||x||^2 is brought to, exactly, by the one `factor`; None leaves factor at 1.
        seed: of the directions.
    """

    def __init__(
        self,
        features: int = 256,
        dim: int = 64,
        rate: float | Float[Tensor, " features"] = 5 / 256,
        low: float = 0.5,
        high: float = 1.5,
        *,
        mean_square: float | None = None,
        seed: int = 0,
    ) -> None:
        self.rate = torch.as_tensor(rate, dtype=torch.float32).expand(features)
        if bool(((self.rate <= 0) | (self.rate > 1)).any()):
            raise ValueError(f"rate is the chance of being on, in (0, 1]; got {rate}")
        if not 0 <= low <= high:
            raise ValueError(f"magnitudes are drawn from low to high, 0 or more; got {low} and {high}")
        if mean_square is not None and not mean_square > 0:
            raise ValueError(f"mean_square is {mean_square}; a positive mean of ||x||^2 is needed")
        self.low, self.high = low, high
        self.directions = random_directions(features, dim, torch.Generator().manual_seed(seed + _APART))
        self.factor = 1.0
        if mean_square is not None:
            self.factor = (mean_square / self.mean_square()) ** 0.5

    @property
    def dim(self) -> int:
        """Dimensions of the activations."""
        return self.directions.shape[1]

    def mean_square(self) -> float:
        """E ||x||^2 = factor^2 (sum_i p_i E[a^2] + sum over i != j of p_i p_j E[a]^2 d_i . d_j)."""
        mean = (self.low + self.high) / 2
        second = (self.low**2 + self.low * self.high + self.high**2) / 3
        rate, directions = self.rate.double(), self.directions.double()
        together = (rate @ directions).square().sum() - (rate[:, None] * directions).square().sum()
        return self.factor**2 * float(rate.sum() * second + mean**2 * together)

    def coefficients(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "count features"]:
        """Draw the magnitudes of `count` activations, factor included."""
        features = len(self.directions)
        # One draw does both jobs: u below the rate is on, and u / rate is then itself uniform on [0, 1].
        draw = torch.rand(count, features, generator=generator)
        magnitude = self.low + (self.high - self.low) / self.rate * draw
        return torch.where(draw < self.rate, self.factor * magnitude, 0.0)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "count dim"]:
        """Draw `count` activations."""
        return self.coefficients(count, generator) @ self.directions

    def batches(self, size: int, count: int, seed: int = 0) -> Iterator[Float[Tensor, "size dim"]]:
        """Draw `count` batches, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield self.draw(size, generator)


class Families(Planted):
    """Planted directions that come in families: the children of a parent are near each other, and at most one is on.

    child = unit(parent + spread * random unit vector): at the default 1, children of one parent have a cosine of 1/2.
    A family is on with a chance of `rate`, as one of its children.
    Direction i belongs to family i // children.
    """

    def __init__(
        self,
        families: int = 32,
        children: int = 4,
        dim: int = 64,
        rate: float = 3 / 32,
        spread: float = 1.0,
        *,
        seed: int = 0,
    ) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate is the chance of a family being on, in (0, 1]; got {rate}")
        super().__init__(families * children, dim, rate / children, seed=seed)
        generator = torch.Generator().manual_seed(seed + 2 * _APART)
        self.children = children
        self.parents = random_directions(families, dim, generator)
        noise = random_directions(families * children, dim, generator)
        self.directions = unit_rows(self.parents.repeat_interleave(children, dim=0) + spread * noise)

    def coefficients(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "count features"]:
        """Draw the magnitudes of `count` activations: one child of each family that is on."""
        families = len(self.parents)
        on = torch.rand(count, families, 1, generator=generator) < self.rate[0] * self.children
        magnitude = self.low + (self.high - self.low) * torch.rand(count, families, 1, generator=generator)
        child = torch.randint(self.children, (count, families, 1), generator=generator)
        chosen = torch.arange(self.children) == child
        return torch.where(on & chosen, self.factor * magnitude, 0.0).flatten(1)
