"""Optimizers that are one update rule per parameter: a method is its equations, written on tensors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paperworks.train.optim.optimizer import OptimizerSpec, ParameterGroups

if TYPE_CHECKING:
    import torch
    from torch import Tensor

State = dict[str, "Tensor"]


@dataclass(frozen=True, kw_only=True)
class UpdateRule(OptimizerSpec):
    """Base of optimizers that update each parameter by itself, from its gradient and running state.

    A subclass names its state in `state`, each entry a tensor of the parameter's shape that starts at 0, and writes
    `update`. Everything else (groups, rates, checkpoints) is done by `RuleOptimizer`.
    """

    state: ClassVar[tuple[str, ...]]

    @abstractmethod
    def update(self, weight: Tensor, gradient: Tensor, state: State, lr: float, weight_decay: float) -> None:
        """Update `weight` and `state` in place. All tensors have one shape; the gradient must stay as it is."""

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Build an optimizer that applies the rule to every parameter with a gradient."""
        from paperworks.train.optim.rule_optimizer import RuleOptimizer

        return RuleOptimizer(groups, self)
