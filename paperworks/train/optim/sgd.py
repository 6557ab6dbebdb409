"""Stochastic gradient descent, with momentum if wanted (Robbins & Monro 1951; Polyak 1964; Nesterov 1983)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paperworks.train.optim.optimizer import OptimizerSpec, ParameterGroups

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerSpec):
    """w -= lr * v, v = momentum * v + g; without momentum, w -= lr * g.

    `weight_decay` adds weight_decay * w to the gradient. `nesterov` steps by g + momentum * v instead of v.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def validate(self) -> None:
        """Raise `ValueError` for a field out of its range, or for Nesterov's step without momentum."""
        super().validate()
        self._require("nesterov", not self.nesterov or self.momentum > 0, "False where momentum is 0")

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Build torch's SGD."""
        import torch

        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay)
