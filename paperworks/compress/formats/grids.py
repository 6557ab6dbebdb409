"""Evenly spaced grids: the quantizer that the other methods share, as pure functions.

A grid belongs to a slice of numbers (the last dimension): x is rounded to scale * (q - zero) with a whole q.
Symmetric (absmax):      scale = max|x| / (2^(bits-1) - 1), q between -(2^(bits-1) - 1) and 2^(bits-1) - 1, zero = 0.
Asymmetric (zero point): scale = (max - min) / (2^bits - 1), zero = round(-min / scale), q between 0 and 2^bits - 1.
Halves round to even. The range of an asymmetric grid always takes in 0, so that zeros stay zeros and the zero point is
a code; a slice of zeros gets the scale 1.

After "Introduction to Weight Quantization" (Labonne 2023) and "A Visual Guide to Quantization" (Grootendorst 2024).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # of float16: a slice with less than this a step is noise
SHRINK_STEPS = 80  # candidates of the clipping search: 1, 0.99, ..., 0.21 of the range, as in GPTQ's code


@dataclass(frozen=True)
class Grid:
    """Scales, zero points (float, whole numbers) and the lowest and highest q; broadcasts over slices."""

    scale: Float[Tensor, "*slices 1"]
    zero: Float[Tensor, "*slices 1"]
    low: int
    high: int

    def codes(self, x: Float[Tensor, "*slices members"]) -> Float[Tensor, "*slices members"]:
        """The whole q of the nearest grid points, as floats."""
        return (x / self.scale).round_().add_(self.zero).clamp_(self.low, self.high)

    def values(self, codes: Float[Tensor, "*slices members"]) -> Float[Tensor, "*slices members"]:
        """The grid points of codes."""
        return (codes - self.zero) * self.scale

    def nearest(self, x: Float[Tensor, "*slices members"]) -> Float[Tensor, "*slices members"]:
        """Round to the grid."""
        return self.values(self.codes(x))


def find_grid(
    x: Float[Tensor, "*slices members"],
    bits: int,
    symmetric: bool,
    clip: float | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Grid:
    """The grid of each slice (the last dimension).

    Args:
        x: the numbers.
        bits: 2..8.
        symmetric: absmax; else zero point.
        clip: None keeps the whole range; an exponent p shrinks it to where the sum of |error|^p is least.
        scale_dtype: what the scale is rounded to before codes are chosen, so that they suit the stored scale.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    best = grid_of_range(low, high, bits, symmetric, scale_dtype)
    if clip is None:
        return best
    least = _error(x, best, clip)
    for step in range(1, SHRINK_STEPS):
        shrink = 1 - step / 100
        candidate = grid_of_range(low * shrink, high * shrink, bits, symmetric, scale_dtype)
        error = _error(x, candidate, clip)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, candidate.scale, best.scale), torch.where(better, candidate.zero, best.zero)
        best = Grid(scale, zero, best.low, best.high)
    return best


def grid_of_range(
    low: Float[Tensor, "*slices 1"],
    high: Float[Tensor, "*slices 1"],
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float32,
) -> Grid:
    """The grids that span ranges. Raises `ValueError` for bits outside 2..8 and scales that overflow."""
    if not 2 <= bits <= 8:
        raise ValueError(f"a grid has 2 to 8 bits, got {bits}")
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = _stored(torch.maximum(low.abs(), high.abs()) / top, scale_dtype)
        return Grid(scale, torch.zeros_like(scale), -top, top)
    levels = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _stored((high - low) / levels, scale_dtype)
    return Grid(scale, torch.round(-low / scale).clamp_(0, levels), 0, levels)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    # rounding through float16 can overflow: the caller hears of it instead of getting infinities
    scale = torch.where(scale > 0, scale.clamp(min=SMALLEST_SCALE), 1.0).to(dtype).to(scale.dtype)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"a scale does not fit {dtype}: the numbers are too large; store scales as float32")
    return scale


def _error(x: Tensor, grid: Grid, power: float) -> Tensor:
    return (grid.nearest(x) - x).abs_().pow_(power).sum(-1, keepdim=True)


class _StraightThrough(torch.autograd.Function):
    """Round to a grid; the gradient is 1 where the number is inside the range and 0 where it was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        codes = torch.round(x / scale) + zero
        ctx.save_for_backward((codes >= low) & (codes <= high))
        return (codes.clamp(low, high) - zero) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None


def fake_quantize(x: Float[Tensor, "..."], grid: Grid) -> Float[Tensor, "..."]:
    """Round to the grid in quantization-aware training: the straight-through gradient passes inside the range."""
    out: Tensor = _StraightThrough.apply(x, grid.scale, grid.zero, grid.low, grid.high)  # type: ignore[no-untyped-call]
    return out


def ternary(weight: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, ""]]:
    """(codes of -1, 0 and 1, scale): absmean rounding, gamma = mean|w|, q = clamp(round(w / gamma), -1, 1)."""
    gamma = weight.abs().mean().clamp(min=SMALLEST_SCALE)
    return torch.round(weight / gamma).clamp_(-1, 1), gamma


def round_to_bfloat16(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Round float32 to bfloat16 by its bits: 16 low bits of the mantissa go, halves to even. Finite numbers only."""
    bits = x.float().contiguous().view(torch.int32)
    odd = (bits >> 16) & 1
    return ((bits + 0x7FFF + odd) & ~0xFFFF).view(torch.float32)
