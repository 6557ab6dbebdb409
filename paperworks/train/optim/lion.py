"""Lion: evolved sign momentum (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paperworks.train.optim.update_rule import State, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Lion(UpdateRule):
    """w -= lr * (sign(b1 m + (1 - b1) g) + weight_decay * w), then m = b2 m + (1 - b2) g.

    Every number moves by `lr`, whatever the size of its gradient, so the paper takes a rate 3 to 10 times smaller than
    AdamW's and a decay as many times larger (Section 5). One running mean is kept instead of AdamW's two.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    state = ("mean",)

    def update(self, weight: Tensor, gradient: Tensor, state: State, lr: float, weight_decay: float) -> None:
        """Update one weight and its running mean of gradients."""
        mean = state["mean"]
        direction = mean.lerp(gradient, 1 - self.betas[0]).sign_()
        weight.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)
        mean.lerp_(gradient, 1 - self.betas[1])
