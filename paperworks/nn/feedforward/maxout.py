"""Maxout units (Goodfellow et al. 2013, arXiv:1302.4389)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from paperworks.nn.feedforward.mlp import Feedforward


@dataclass(frozen=True, kw_only=True)
class Maxout(Feedforward):
    """y_i = max_j (W x + b)_ij, the largest of `pieces` linear maps of x, unit by unit."""

    pieces: int = 2

    def validate(self) -> None:
        """Check that there is something to choose from."""
        if self.pieces < 2:
            raise ValueError(f"Maxout.pieces must be at least 2, got {self.pieces}: of one piece there is no maximum")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return MaxoutModule(dim, self)


class MaxoutModule(nn.Module):
    """The module of `Maxout`; rows i * pieces to (i + 1) * pieces of the weight are the pieces of unit i."""

    def __init__(self, dim: int, spec: Maxout) -> None:
        super().__init__()
        self.pieces = spec.pieces
        self.linear = nn.Linear(dim, dim * spec.pieces)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Apply the units to each position."""
        out: Tensor = self.linear(x).unflatten(-1, (-1, self.pieces)).amax(-1)
        return out
