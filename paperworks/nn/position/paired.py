"""Two positions a token: where it stands, and which one its logits are about (sigma-GPT, arXiv:2404.09562)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.nn.placement import Placement, require_token_shape
from paperworks.nn.position.absolute import AbsolutePositions


@dataclass(kw_only=True)
class TargetPlacement(Placement):
    """A placement for sequences in any order.

    Attributes:
        target_positions: int64 (batch or 1, time), the position whose token each of these is to predict, where that is
            not simply the next one.
        attention_mask: bool (time, time), which of these tokens (rows) see which others of them (columns), instead of
            the earlier ones; all see what the cache holds.
    """

    target_positions: Int[Tensor, "batch time"] | None = None
    attention_mask: Bool[Tensor, "time time"] | None = None

    @property
    def attention_only(self) -> bool:  # type: ignore[override]
        """Whether only attention can obey it: no recurrence can look at tokens in another order."""
        return self.attention_mask is not None

    def check(self, batch: int, time: int) -> None:
        """Raise `ValueError` where a shape does not fit `batch` rows of `time` tokens."""
        super().check(batch, time)
        require_token_shape("target_positions", self.target_positions, batch, time)
        mask = self.attention_mask
        if mask is not None and (mask.shape != (time, time) or mask.dtype != torch.bool):
            raise ValueError(f"attention_mask must be bool ({time}, {time}), got {mask.dtype} {tuple(mask.shape)}")

    def require(self, model: Any) -> None:
        """Raise `ValueError` where the model cannot be told which position to predict."""
        if self.target_positions is not None and not isinstance(model.position, PairedPositionTable):
            raise ValueError(
                "this model cannot be told a target position: build it with position=PairedPositions(length=...)"
            )

    def visible(self, keys: Int[Tensor, " keys"]) -> Bool[Tensor, "time keys"] | None:
        """The mask between these tokens; everything in the cache."""
        if self.attention_mask is None:
            return None
        seen = torch.ones(self.time, len(keys), dtype=torch.bool, device=keys.device)
        here = keys >= self.start
        seen[:, here] = self.attention_mask[:, keys[here] - self.start]
        return seen


@dataclass(frozen=True, kw_only=True)
class PairedPositions(AbsolutePositions):
    """Where a token stands and which position it predicts: [table[position]; table[target]] (arXiv:2404.09562).

    Both halves read one trained table of vectors of dim / 2 numbers, so a model trained on shuffled sequences can
    predict the token of any position (`TargetPlacement`). Without a target it is the position that follows; the one
    after the last has its vector too.
    """

    length: int

    def build(self, dim: int) -> nn.Module:
        """The table as a module; raises `ValueError` for an odd `dim`."""
        return PairedPositionTable(self.length, dim)


class PairedPositionTable(nn.Embedding):
    """The module of `PairedPositions`: x + [table[position]; table[target]]."""

    def __init__(self, length: int, dim: int) -> None:
        if dim % 2:
            raise ValueError(f"PairedPositions needs an even dim, half for each of two positions, got {dim}")
        super().__init__(length + 1, dim // 2)
        self.length = length

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:  # type: ignore[override]
        """Add the vectors of each token's position and of its target."""
        here = placement.positions
        assert here is not None
        targets = getattr(placement, "target_positions", None)
        targets = here + 1 if targets is None else targets
        for name, positions, end in (("position", here, self.length), ("target position", targets, self.length + 1)):
            low, high = (int(bound) for bound in positions.aminmax())
            if low < 0 or high >= end:
                raise ValueError(f"{name} {low if low < 0 else high} is beyond the {self.length} learned positions")
        both = torch.cat(torch.broadcast_tensors(super().forward(here), super().forward(targets)), -1)
        return x + both
