"""Clipping gradients number by number, as the recurrent networks of 2010 to 2015 did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paperworks.train.optim.optimizer import OptimizerSpec, ParameterGroups

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ClipByValue(OptimizerSpec):
    """`optimizer` on gradients whose every number is clipped to [-limit, limit].

    This changes the gradient's direction, which clipping the norm (`Settings.clip`) keeps; both together are rarely
    meant:

        train.Settings(clip=None, optimizer=train.ClipByValue(optimizer=train.RMSprop(alpha=0.95), limit=5.0))
    """

    optimizer: OptimizerSpec
    limit: float

    def validate(self) -> None:
        """Raise `ValueError` for a limit that is not above 0."""
        self._require("limit", 0 < self.limit < math.inf, "above 0, and finite")

    @property
    def weight_decay(self) -> float | None:
        """Weight decay of the wrapped optimizer; None where it has none."""
        return getattr(self.optimizer, "weight_decay", None)

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Build the wrapped optimizer, with a hook that clips before each step."""
        optimizer = self.optimizer.build(groups)
        optimizer.register_step_pre_hook(self._clip)
        return optimizer

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        import torch

        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_clamp_min_(gradients, -self.limit)
        torch._foreach_clamp_max_(gradients, self.limit)
