"""RMSProp with momentum and a running mean of the gradient (Graves 2013, arXiv:1308.0850)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paperworks.train.optim.update_rule import State, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RMSPropGraves(UpdateRule):
    """n = d n + (1 - d) g^2; m = d m + (1 - d) g; v = momentum v - lr g / sqrt(n - m^2 + eps); w += v.

    The gradient is divided by its standard deviation over time, not by its size. Where it never changes, n - m^2 is 0
    but for the start, and eps alone keeps the step finite; gradients far below sqrt(eps) move little, so losses should
    be sums over a sequence, as in the paper, not means.

    decay, momentum, eps: the paper's values; its lr is 1e-4, with the momentum ten times that a step.
    """

    decay: float = 0.95
    momentum: float = 0.9
    eps: float = 1e-4

    state = ("square", "mean", "velocity")

    def validate(self) -> None:
        """Raise `ValueError` for a field out of its range; `eps` must be above 0."""
        super().validate()
        self._require("eps", self.eps > 0, "above 0: a gradient that never changes would be divided by 0")

    def update(self, weight: Tensor, gradient: Tensor, state: State, lr: float, weight_decay: float) -> None:
        """Update one weight, the running means and the velocity; there is no weight decay."""
        square, mean, velocity = (state[name] for name in self.state)
        square.mul_(self.decay).addcmul_(gradient, gradient, value=1 - self.decay)
        mean.mul_(self.decay).add_(gradient, alpha=1 - self.decay)
        variance = (square - mean.square()).clamp_(min=0)  # rounding may take it below 0
        velocity.mul_(self.momentum).addcdiv_(gradient, variance.add_(self.eps).sqrt_(), value=-lr)
        weight.add_(velocity)
