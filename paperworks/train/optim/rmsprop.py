"""RMSProp (Tieleman & Hinton 2012, Coursera lecture 6.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paperworks.train.optim.optimizer import OptimizerSpec, ParameterGroups

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RMSprop(OptimizerSpec):
    """w -= lr * g / (sqrt(v) + eps), v = alpha v + (1 - alpha) g^2; `momentum` accumulates these steps.

    `weight_decay` adds weight_decay * w to the gradient.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Build torch's RMSprop."""
        import torch

        return torch.optim.RMSprop(
            groups, alpha=self.alpha, eps=self.eps, momentum=self.momentum, weight_decay=self.weight_decay
        )
