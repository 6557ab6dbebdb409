"""Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paperworks.train.optim.optimizer import OptimizerSpec, ParameterGroups

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerSpec):
    """w -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w).

    m = b1 m + (1 - b1) g, m_hat = m / (1 - b1^t); v = b2 v + (1 - b2) g^2, v_hat = v / (1 - b2^t).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Build torch's AdamW, with its fused kernel where there is one."""
        import torch

        from paperworks.train.optim.fused import has_fused_kernels

        fused = has_fused_kernels(groups) or None
        return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused)
