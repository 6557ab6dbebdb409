"""What can be certified about an activation: bounds of its derivatives, where it is flat, where it breaks.

The properties that Lee (2023, arXiv:2305.12073) proves of the GELU, found numerically for any function of one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Function = Callable[[Tensor], Tensor]

GOLDEN = (math.sqrt(5) - 1) / 2
SAME = 1e-8  # two places nearer than this are one, and so are two slopes across it that differ by less than `JUMP`
JUMP = 1e-4


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What `certify` found between two ends.

    Attributes:
        slope: sup |f'|, the Lipschitz constant; slope_at: where.
        lowest_slope, highest_slope: inf f' and sup f'.
        curvature: sup |f''|, infinite where f' jumps; curvature_at: where.
        stationary: where f' changes its sign through a zero.
        kinks: where f' jumps; bends: where f' does not, but f'' does.
    """

    slope: float
    slope_at: float
    lowest_slope: float
    highest_slope: float
    curvature: float
    curvature_at: float
    stationary: tuple[float, ...]
    kinks: tuple[float, ...]
    bends: tuple[float, ...]

    @property
    def smoothness(self) -> int:
        """Continuous derivatives there are: 0, 1, or 2 for two and more."""
        return 0 if self.kinks else 1 if self.bends else 2


def certify(function: Function, low: float = -10.0, high: float = 10.0, points: int = 20_001) -> Certificate:
    """Certify a function elementwise on [low, high], in float64, from its first and second derivatives by autograd.

    A grid of `points` finds candidates, golden-section search refines extrema and bisection zeros and jumps, to 1e-9
    in x. What is narrower than the grid is not seen. Raises ValueError for an empty interval, fewer than 10 points, or
    a function that is not finite there.
    """
    if not low < high or points < 10:
        raise ValueError(f"certify needs low < high and at least 10 points, got [{low}, {high}] and {points}")
    # An irrational offset keeps the grid off 0, 3 and other likely places of a kink, where autograd takes one side.
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    grid[1:-1] += (high - low) / points * 0.1 * math.sqrt(2)
    first, second = derivatives(function, grid)
    with torch.no_grad():
        value = function(grid)
    if not all(bool(torch.isfinite(each).all()) for each in (value, first, second)):
        raise ValueError(f"the function or a derivative is not finite somewhere on [{low}, {high}]")

    def slope(x: float) -> float:
        return _at(function, x)[0]

    def curvature(x: float) -> float:
        return _at(function, x)[1]

    kinks = _jumps(lambda x: derivatives(function, x)[0], grid, first)
    breaks = _jumps(lambda x: derivatives(function, x)[1], grid, second)
    bends = tuple(x for x in breaks if all(abs(x - kink) > 1e-6 for kink in kinks))
    top_at, top = _maximum(slope, grid, first)
    bottom_at, bottom = _maximum(lambda x: -slope(x), grid, -first)
    bend_at, bend = _maximum(lambda x: abs(curvature(x)), grid, second.abs())
    if kinks:
        bend_at, bend = kinks[0], math.inf
    return Certificate(
        slope=max(top, bottom),
        slope_at=top_at if top >= bottom else bottom_at,
        lowest_slope=-bottom,
        highest_slope=top,
        curvature=bend,
        curvature_at=bend_at,
        stationary=_sign_changes(slope, grid, first),
        kinks=kinks,
        bends=bends,
    )


def derivatives(function: Function, x: Float[Tensor, " points"]) -> tuple[Tensor, Tensor]:
    """Return (f'(x), f''(x)) of an elementwise function, by autograd."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        if not first.requires_grad:  # piecewise linear
            return first.detach(), torch.zeros_like(x)
        (second,) = torch.autograd.grad(first.sum(), leaf, allow_unused=True)
    return first.detach(), torch.zeros_like(x) if second is None else second.detach()


def _at(function: Function, x: float) -> tuple[float, float]:
    first, second = derivatives(function, torch.tensor([x], dtype=torch.float64))
    return float(first), float(second)


def _maximum(value: Callable[[float], float], grid: Tensor, on_grid: Tensor) -> tuple[float, float]:
    """Return (where, how much), by golden-section search around the best point of the grid."""
    best = int(on_grid.argmax())
    left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    found = (float(grid[best]), float(on_grid[best]))
    a, b = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
    at_a, at_b = value(a), value(b)
    while right - left > 1e-9:
        if at_a >= at_b:
            right, b, at_b = b, a, at_a
            a = right - GOLDEN * (right - left)
            at_a = value(a)
        else:
            left, a, at_a = a, b, at_b
            b = left + GOLDEN * (right - left)
            at_b = value(b)
        found = max(found, (a, at_a), (b, at_b), key=lambda pair: pair[1])
    return found


def _sign_changes(value: Callable[[float], float], grid: Tensor, on_grid: Tensor) -> tuple[float, ...]:
    """Return the zeros at which the sign changes; what is smaller than rounding has no sign (flat tails)."""
    signed = (on_grid.abs() > 1e-12).nonzero()[:, 0]
    signs = on_grid[signed].sign()
    zeros = []
    for index in (signs[1:] != signs[:-1]).nonzero()[:, 0].tolist():
        left, right = float(grid[signed[index]]), float(grid[signed[index + 1]])
        sign = float(signs[index])
        while right - left > 1e-9:
            middle = (left + right) / 2
            left, right = (middle, right) if sign * value(middle) > 0 else (left, middle)
        zeros.append((left + right) / 2)
    return tuple(zeros)


def _jumps(value: Function, grid: Tensor, on_grid: Tensor) -> tuple[float, ...]:
    """Return the places where the values on both sides differ, however near one comes: bisection, all at once."""
    where = (on_grid.diff().abs() > JUMP).nonzero()[:, 0]
    left, right, at_left, at_right = grid[where], grid[where + 1], on_grid[where], on_grid[where + 1]
    while len(where) and float((right - left).max()) > SAME:
        middle = (left + right) / 2
        at_middle = value(middle)
        nearer = (at_middle - at_left).abs() >= (at_right - at_middle).abs()
        right, at_right = torch.where(nearer, middle, right), torch.where(nearer, at_middle, at_right)
        left, at_left = torch.where(nearer, left, middle), torch.where(nearer, at_left, at_middle)
    places = ((left + right) / 2)[(at_right - at_left).abs() > JUMP].tolist()
    return tuple(x for index, x in enumerate(places) if index == 0 or x - places[index - 1] > 1e-6)
