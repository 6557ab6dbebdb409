"""Derivatives clipped on their way back, inside the network (Graves 2013, arXiv:1308.0850, Section 2.1)."""

from typing import Any

import torch
from torch import Tensor


def clipped_backward(x: Tensor, limit: float) -> Tensor:
    """x; the derivative of the loss with respect to it comes back within [-limit, limit], number by number."""
    clipped: Tensor = _Clipped.apply(x, limit)  # type: ignore[no-untyped-call]
    return clipped


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        return above[0].clamp(-ctx.limit, ctx.limit), None
