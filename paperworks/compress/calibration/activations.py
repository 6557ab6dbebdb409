"""Quantizers of activations: ranges fixed from calibration samples, or found anew for each token.

Static: one range for all tokens, by `static_range`. Dynamic: `dynamic_int8`, a scale a token at run time.
After "A Visual Guide to Quantization" (Grootendorst 2024) and TensorRT's entropy calibration for KL.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from paperworks.compress.formats.grids import Grid, grid_of_range
from paperworks.core.errors import unknown

RangeMethod = Literal["minmax", "percentile", "mse", "kl"]
CANDIDATES = 100  # ranges tried by the searches
BINS = 2048  # of the histogram for KL, as in TensorRT


def dynamic_int8(
    x: Float[Tensor, "... features"], per_token: bool = True
) -> tuple[Int8[Tensor, "... features"], Float[Tensor, "... 1"]]:
    """(codes, scale) of absmax rounding: a scale for each token, or one for all. x is near codes * scale."""
    x = x.float()
    top = x.abs().amax(-1, keepdim=True) if per_token else x.abs().amax().reshape([1] * x.dim())
    scale = torch.where(top > 0, top / 127, 1.0)
    return static_int8(x, scale), scale


def static_int8(x: Float[Tensor, "... features"], scale: Float[Tensor, "..."]) -> Int8[Tensor, "... features"]:
    """The codes -127..127 for a scale known beforehand; what lies outside is clipped."""
    return torch.round(x.float() / scale).clamp_(-127, 127).to(torch.int8)


def static_range(
    samples: Float[Tensor, "..."],
    method: RangeMethod = "minmax",
    bits: int = 8,
    symmetric: bool = True,
    percentile: float = 99.9,
) -> tuple[float, float]:
    """The (low, high) that a static quantizer should cover.

    Args:
        samples: activations seen in calibration.
        method: "minmax" takes all; "percentile" all but the outermost; "mse" the range of least squared error; "kl" the
            one whose rounded histogram diverges least from the histogram itself.
        bits: of the grid that "mse" and "kl" judge by.
        symmetric: whether the range is (-top, top).
        percentile: between 50 and 100, for "percentile"; two-sided if asymmetric.
    """
    if method not in get_args(RangeMethod):
        raise ValueError(unknown("range method", method, get_args(RangeMethod)))
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
    x = samples.detach().float().flatten()
    if not len(x) or not bool(torch.isfinite(x).all()):
        raise ValueError(f"static_range needs finite samples, got {len(x)} of them")
    low, high = float(x.min()), float(x.max())
    if symmetric:
        high = max(abs(low), abs(high))
        low = -high
    if method == "minmax" or low == high:
        return low, high
    if method == "percentile":
        # kthvalue instead of quantile, which refuses more than 2^24 numbers
        if symmetric:
            top = _order_statistic(x.abs(), percentile)
            return -top, top
        return _order_statistic(x, 100 - percentile), _order_statistic(x, percentile)
    shrinks = [step / CANDIDATES for step in range(CANDIDATES, 0, -1)]
    judge = _squared_error if method == "mse" else _divergence
    best = min(shrinks, key=lambda shrink: judge(x, low * shrink, high * shrink, bits, symmetric))
    return low * best, high * best


def static_grid(low: float, high: float, bits: int = 8, symmetric: bool = True) -> Grid:
    """The grid that covers a range, with one scale for everything."""
    return grid_of_range(torch.tensor([low]), torch.tensor([high]), bits, symmetric)


def _order_statistic(x: Tensor, percentile: float) -> float:
    return float(x.kthvalue(1 + round((len(x) - 1) * percentile / 100)).values)


def _squared_error(x: Tensor, low: float, high: float, bits: int, symmetric: bool) -> float:
    return float((static_grid(low, high, bits, symmetric).nearest(x) - x).square().mean())


def _divergence(x: Tensor, low: float, high: float, bits: int, symmetric: bool) -> float:
    """KL(histogram of the clipped numbers || the same spread evenly inside each level of the grid)."""
    clipped = x.clamp(low, high)
    counts = torch.histc(clipped, BINS, low, high)
    inside = torch.histc(x[(x > low) & (x < high)], BINS, low, high)
    centres = torch.linspace(low, high, BINS + 1)[:-1] + (high - low) / BINS / 2
    grid = static_grid(low, high, bits, symmetric)
    level = (grid.codes(centres) - grid.low).long()
    levels = grid.high - grid.low + 1
    used = (inside > 0).float()
    mass = torch.zeros(levels).index_add_(0, level, inside)
    bins = torch.zeros(levels).index_add_(0, level, used).clamp(min=1)
    spread = (mass / bins)[level] * used
    p, q = counts / counts.sum(), spread / spread.sum().clamp(min=1e-12)
    some = p > 0
    # a bin that only clipped numbers fill has no counterpart: a floor keeps the divergence finite
    return float((p[some] * (p[some] / q[some].clamp(min=1e-9)).log()).sum())
