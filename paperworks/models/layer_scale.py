"""LayerScale: a learned gain on each channel of what a part adds (Touvron et al. 2021, arXiv:2103.17239)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.models.arrangement import Arrangement, BlockModule
from paperworks.nn import Placement

if TYPE_CHECKING:
    from paperworks.models.block import Block


@dataclass(frozen=True, kw_only=True)
class LayerScale(Arrangement):
    """x + gain * f(norm(x)), gain a trained vector for each part, small at first so that deep stacks start near x.

    Attributes:
        start: the gains at first (the paper: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond).
    """

    start: float = 1e-5

    def build(self, dim: int, block: Block) -> BlockModule:
        """The module of the block."""
        return LayerScaleBlock(dim, block, self.start)


class LayerScaleBlock(BlockModule):
    """The module of a block with `LayerScale`; the gains stand where other arrangements have a norm after the part."""

    def __init__(self, dim: int, spec: Block, start: float) -> None:
        super().__init__(dim, spec)
        self.mixer_post_norm = Gain(dim, start)
        self.cross_post_norm = Gain(dim, start) if spec.cross is not None else None
        self.feedforward_post_norm = Gain(dim, start) if spec.feedforward is not None else None

    def add(
        self, x: Tensor, part: nn.Module, norm: nn.Module, post_norm: nn.Module | None, *placement: Placement
    ) -> Float[Tensor, "batch time dim"]:
        """x + gain * f(norm(x))."""
        assert post_norm is not None
        out: Tensor = x + self.dropout(post_norm(part(norm(x), *placement)))
        return out


class Gain(nn.Module):
    """x times a trained vector, (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Multiply each channel by its gain."""
        return x * self.weight
