"""Decoder rows of unit length: how they are kept so, and what else is known about directions."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit_rows(rows: Float[Tensor, "latents dim"]) -> Float[Tensor, "latents dim"]:
    """Each row divided by its length; a row of zeros stays one."""
    out: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return out


def random_directions(
    count: int, dim: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "count dim"]:
    """Draw unit vectors, uniform on the sphere."""
    return unit_rows(torch.randn(count, dim, generator=generator, dtype=dtype))


def along_sphere(rows: Float[Tensor, "latents dim"]) -> Float[Tensor, "latents dim"]:
    """Rows of unit length unchanged; their gradient loses the part that would only change the length.

    gradient_i <- gradient_i - (gradient_i . row_i) row_i, so that an optimizer's moments never hold the part that
    renormalization would undo (Bricken et al. 2023).
    """
    projected: Tensor = _AlongSphere.apply(rows)  # type: ignore[no-untyped-call]
    return projected


class _AlongSphere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        along = torch.linalg.vecdot(above[0], rows).unsqueeze(-1)
        return torch.addcmul(above[0], along, rows, value=-1)


def geometric_median(
    points: Float[Tensor, "points dim"], steps: int = 100, tolerance: float = 1e-7
) -> Float[Tensor, " dim"]:
    """The point with the least sum of distances to all points, by Weiszfeld's iteration in float64.

    Unlike the mean it is not drawn along by a few points far away. Stops after `steps`, or when a step moves it by less
    than `tolerance` of the points' typical distance.
    """
    if points.dim() != 2 or not len(points):
        raise ValueError(f"points must be (points, dim) and not empty, got shape {tuple(points.shape)}")
    wide = points.double()
    median = wide.mean(dim=0)
    for _ in range(steps):
        distances = (wide - median).norm(dim=1)
        weights = 1 / distances.clamp_min(1e-12 * float(distances.mean()) + 1e-300)
        moved = (weights @ wide) / weights.sum()
        if (moved - median).norm() <= tolerance * distances.mean():
            out: Tensor = moved.to(points.dtype)
            return out
        median = moved
    return median.to(points.dtype)
