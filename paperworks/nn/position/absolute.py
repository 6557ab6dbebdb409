"""Absolute positions, added to the token embeddings: learned tables, and sinusoids (Vaswani et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.spec import Spec
from paperworks.nn.placement import Placement


@dataclass(frozen=True, kw_only=True)
class AbsolutePositions(Spec):
    """What is added to the embeddings: `build(dim)` gives a module with `forward(x, placement) -> x`.

    Attributes:
        length: positions there are, from 0; None where there is no end.
    """

    length: int | None = None

    def validate(self) -> None:
        """Check the length."""
        if self.length is not None and self.length < 1:
            raise ValueError(f"{type(self).__name__}.length must be at least 1, got {self.length}")

    def build(self, dim: int) -> nn.Module:
        """The module for embeddings of `dim` numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@dataclass(frozen=True, kw_only=True)
class LearnedPositions(AbsolutePositions):
    """A trained vector for each position, added to the token embeddings (GPT-2, BERT)."""

    length: int  # a table ends somewhere

    def build(self, dim: int) -> nn.Module:
        """The table as a module."""
        return LearnedPositionTable(self.length, dim)


class LearnedPositionTable(nn.Embedding):
    """The module of `LearnedPositions`: x + table[position]."""

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:  # type: ignore[override]
        """Add each token's position vector."""
        positions = placement.positions
        assert positions is not None
        if placement.default_positions:
            end = placement.start + placement.time
            if end > self.num_embeddings:
                raise ValueError(f"position {end - 1} is beyond the {self.num_embeddings} learned positions")
            return x + self.weight[placement.start : end]
        largest = int(positions.max())
        if largest >= self.num_embeddings or int(positions.min()) < 0:
            raise ValueError(f"position {largest} is beyond the {self.num_embeddings} learned positions (from 0)")
        return x + super().forward(positions)


@dataclass(frozen=True, kw_only=True)
class SinusoidalPositions(AbsolutePositions):
    """sin(pos / base^(2i/dim)) and cos of the same, added to the embeddings (Vaswani et al. 2017, Section 3.5).

    Attributes:
        base: 10,000 in the paper.
        layout: "interleaved", sine and cosine in turn (the paper), or "halves", all sines before all cosines
            (tensor2tensor, Marian).
    """

    base: float = 10_000.0
    layout: Literal["interleaved", "halves"] = "interleaved"

    def build(self, dim: int) -> nn.Module:
        """The module; raises `ValueError` for an odd `dim`."""
        return Sinusoids(dim, self)

    def table(self, positions: Int[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape dim"]:
        """The vectors of these positions, in float64."""
        if dim % 2:
            raise ValueError(f"SinusoidalPositions needs an even dim, a sine and a cosine each, got {dim}")
        rates = self.base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles = positions[..., None] * rates
        pair = (angles.sin(), angles.cos())
        return torch.cat(pair, -1) if self.layout == "halves" else torch.stack(pair, -1).flatten(-2)


class Sinusoids(nn.Module):
    """The module of `SinusoidalPositions`: nothing is learned, and nothing is kept."""

    def __init__(self, dim: int, spec: SinusoidalPositions) -> None:
        super().__init__()
        self.spec, self.dim = spec, dim
        spec.table(torch.zeros(1), dim)  # refuses an odd dim

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Add each token's position vector."""
        assert placement.positions is not None
        return x + self.spec.table(placement.positions, self.dim).to(x.dtype)
