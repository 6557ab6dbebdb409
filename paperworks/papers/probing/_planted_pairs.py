"""Contrast pairs with planted directions: what the answer's token adds, what is true, and what else the pair says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Both sides of contrast pairs; `true` says whose positive side is the true one."""

    positive: Float[Tensor, "n dim"]
    negative: Float[Tensor, "n dim"]
    true: Bool[Tensor, " n"]
    distractor: Bool[Tensor, " n"]


def planted_pairs(
    seed: int,
    n: int = 500,
    *,
    truth: float,
    token: float,
    distractor: float = 0.0,
    noise: float = 0.3,
    own: float = 0.3,
    dim: int = 64,
) -> Pairs:
    """Draw base +- (truth y t + token u + distractor h d) + noise, with y, h = +-1 and orthogonal unit t, u, d.

    The base is shared by a pair: `noise` in every dimension; each side adds `own`.
    """
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    axes = torch.linalg.qr(normal(dim, 3)).Q.T
    true, other = (torch.rand(n, generator=draws) < 0.5 for _ in range(2))
    y, h = (side.double()[:, None] * 2 - 1 for side in (true, other))
    base = noise * normal(n, dim)
    shift = truth * y * axes[0] + token * axes[1] + distractor * h * axes[2]
    return Pairs(base + own * normal(n, dim) + shift, base + own * normal(n, dim) - shift, true, other)
