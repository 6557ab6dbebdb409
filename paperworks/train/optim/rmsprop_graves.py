"""RMSProp with momentum and a running mean of the gradient (Graves 2013, arXiv:1308.0850)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RMSPropGraves(Optimizer):
    """n = d n + (1 - d) g^2; m = d m + (1 - d) g; v = momentum v - lr g / sqrt(n - m^2 + eps); w += v.

    The gradient is divided by its standard deviation over time, not by its size: a steady gradient is taken as sure.
    Where it never changes, n - m^2 is 0 but for the start, and eps alone keeps the step finite; gradients far below
    sqrt(eps) move little, so losses should be sums over a sequence, as in the paper, not means.

    Args:
        params: parameters or groups.
        lr: 1e-4 in the paper; with the momentum, ten times that a step.
        decay, momentum, eps: 0.95, 0.9 and 1e-4 there.

    Raises ValueError for a number out of its range.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, decay: float = 0.95, momentum: float = 0.9, eps: float = 1e-4
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        if not 0 <= decay < 1 or not 0 <= momentum < 1:
            raise ValueError(f"decay and momentum must be in [0, 1), got {decay} and {momentum}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}: a gradient that never changes would be divided by 0")
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            decay = group["decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                square, mean, velocity = self._state(parameter)
                square.mul_(decay).addcmul_(parameter.grad, parameter.grad, value=1 - decay)
                mean.mul_(decay).add_(parameter.grad, alpha=1 - decay)
                # rounding may take the variance a hair below 0
                spread = (square - mean.square()).clamp_(min=0).add_(group["eps"]).sqrt_()
                velocity.mul_(group["momentum"]).addcdiv_(parameter.grad, spread, value=-group["lr"])
                parameter.add_(velocity)
        return loss

    def _state(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[parameter]
        if not state:
            for name in ("square", "mean", "velocity"):
                state[name] = torch.zeros_like(parameter)
        return state["square"], state["mean"], state["velocity"]
