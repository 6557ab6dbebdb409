"""The torch optimizer of every `UpdateRule`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from paperworks.train.optim.update_rule import UpdateRule


class RuleOptimizer(Optimizer):
    """Applies `rule.update` to each parameter that has a gradient."""

    def __init__(self, params: Any, rule: UpdateRule, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": getattr(rule, "weight_decay", 0.0)})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; `closure` computes the loss and the gradients again, as in torch's own optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update({name: torch.zeros_like(weight) for name in self.rule.state})
                self.rule.update(weight, weight.grad, state, group["lr"], group["weight_decay"])
        return loss
