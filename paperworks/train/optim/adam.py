"""Adam (Kingma & Ba 2014, arXiv:1412.6980)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paperworks.train.optim.optimizer import OptimizerSpec, ParameterGroups

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Adam(OptimizerSpec):
    """w -= lr * m_hat / (sqrt(v_hat) + eps), m and v the running means of g and g^2 (Algorithm 1).

    `weight_decay` adds weight_decay * w to the gradient (an L2 penalty), which v then rescales; `AdamW` does not.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Build torch's Adam, with its fused kernel where there is one."""
        import torch

        from paperworks.train.optim.fused import has_fused_kernels

        fused = has_fused_kernels(groups) or None
        return torch.optim.Adam(groups, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused)
