"""Absolute positions, added to the token embeddings: learned tables, and sinusoids (Vaswani et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.spec import Spec
from paperworks.nn.placement import Stream


@dataclass(frozen=True, kw_only=True)
class AbsolutePositions(Spec):
    """What is added to the embeddings: `build(dim)` gives a module with `forward(x, stream) -> x`.

    Attributes:
        length: positions there are, from 0; None where there is no end.
    """

    length: int | None = None

    def validate(self) -> None:
        """Check the length."""
        if self.length is not None and self.length < 1:
            raise ValueError(f"{type(self).__name__}.length must be at least 1, got {self.length}")

    def build(self, dim: int) -> nn.Module:
        """Return the module for embeddings of `dim` numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@dataclass(frozen=True, kw_only=True)
class LearnedPositions(AbsolutePositions):
    """A trained vector for each position, added to the token embeddings (GPT-2, BERT)."""

    length: int  # a table ends somewhere

    def build(self, dim: int) -> nn.Module:
        """Return the table as a module."""
        return LearnedPositionTable(self.length, dim)


class LearnedPositionTable(nn.Embedding):
    """The module of `LearnedPositions`: x + table[position]."""

    def forward(self, x: Float[Tensor, "batch time dim"], stream: Stream) -> Float[Tensor, "batch time dim"]:  # type: ignore[override]
        """Add each token's position vector."""
        if stream.default_positions:
            end = stream.start + stream.time
            if end > self.num_embeddings:
                raise ValueError(f"position {end - 1} is beyond the {self.num_embeddings} learned positions")
            return x + self.weight[stream.start : end]
        largest = int(stream.positions.max())
        if largest >= self.num_embeddings or int(stream.positions.min()) < 0:
            raise ValueError(f"position {largest} is beyond the {self.num_embeddings} learned positions (from 0)")
        return x + super().forward(stream.positions)


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
        """Return the module; raises `ValueError` for an odd `dim`."""
        return Sinusoids(dim, self)

    def table(self, positions: Int[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape dim"]:
        """Return the vectors of these positions, in float64."""
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

    def forward(self, x: Float[Tensor, "batch time dim"], stream: Stream) -> Float[Tensor, "batch time dim"]:
        """Add each token's position vector."""
        return x + self.spec.table(stream.positions, self.dim).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class PairedPositions(AbsolutePositions):
    """Where a token stands and where the next one will: [table[position]; table[asked]] (sigma-GPT, arXiv:2404.09562).

    Both halves read one trained table of vectors of dim / 2 numbers, so a model trained on shuffled sequences can be
    asked for the token of any position. What is not asked about otherwise is the position that follows; the one
    after the last has its vector too.
    """

    length: int

    def build(self, dim: int) -> nn.Module:
        """Return the table as a module; raises `ValueError` for an odd `dim`."""
        return PairedPositionTable(self.length, dim)


class PairedPositionTable(nn.Embedding):
    """The module of `PairedPositions`: x + [table[position]; table[asked]]."""

    def __init__(self, length: int, dim: int) -> None:
        if dim % 2:
            raise ValueError(f"PairedPositions needs an even dim, half for each of two positions, got {dim}")
        super().__init__(length + 1, dim // 2)
        self.length = length

    def forward(self, x: Float[Tensor, "batch time dim"], stream: Stream) -> Float[Tensor, "batch time dim"]:  # type: ignore[override]
        """Add the vectors of each token's position and of the one asked for."""
        here = stream.positions
        asked = here + 1 if stream.asked is None else stream.asked
        for name, positions, end in (("position", here, self.length), ("asked position", asked, self.length + 1)):
            low, high = (int(bound) for bound in positions.aminmax())
            if low < 0 or high >= end:
                raise ValueError(f"{name} {low if low < 0 else high} is beyond the {self.length} learned positions")
        both = torch.cat(torch.broadcast_tensors(super().forward(here), super().forward(asked)), -1)
        return x + both
