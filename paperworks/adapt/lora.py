"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), with rsLoRA's scaling (Kalajdzievski 2023)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.adapt.delta import Adapter, Delta


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """W = W0 + (alpha / rank) * up @ down, with down (rank, in) random and up (out, rank) zero at first.

    Attributes:
        rank: r of the paper.
        alpha: the scale; None means `rank` (a factor of 1).
        dropout: the share of the delta's input dropped in training.
        rank_stabilized: divide by sqrt(rank) instead of rank (arXiv:2312.03732).
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def validate(self) -> None:
        """Check rank and dropout."""
        if self.rank < 1:
            raise ValueError(f"LoRA.rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA.dropout must be in [0, 1), got {self.dropout}")

    @property
    def scale(self) -> float:
        """What up @ down is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def build(self, in_features: int, out_features: int) -> Delta:
        """Return a delta for one layer. Raises `ValueError` if the rank exceeds the layer's."""
        if self.rank > min(in_features, out_features):
            raise ValueError(
                f"LoRA.rank {self.rank} exceeds the rank a {out_features} x {in_features} layer can have "
                f"({min(in_features, out_features)}); choose a smaller rank or other targets"
            )
        return LowRankDelta(in_features, out_features, self)


class LowRankDelta(Delta):
    """scale * up(down(dropout(x)))."""

    def __init__(self, in_features: int, out_features: int, spec: LoRA) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(spec.rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, spec.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # loralib's choice; the paper draws from a normal
        self.scale, self.dropout = spec.scale, spec.dropout

    def extra_repr(self) -> str:
        """Describe the delta in `print(model)`."""
        return f"rank={len(self.down)}, scale={self.scale:g}"

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Return the low-rank change of the output, computed in the adapter's own dtype."""
        x = F.dropout(x.to(self.down.dtype), self.dropout, self.training)
        return F.linear(F.linear(x, self.down) * self.scale, self.up)

    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return scale * up @ down."""
        return self.scale * (self.up @ self.down)
