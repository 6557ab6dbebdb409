"""E8P (QuIP#, Tseng et al. 2024, arXiv:2402.04396, Section 4): 2^16 points of the E8 lattice for eight weights at once.

A point is s with signs, plus 1/4 or -1/4 on all coordinates. s is one of 256 vectors of magnitudes 1/2, 3/2, 5/2; the
signs are any for which the coordinates (before the shift) add up to an even number, so seven of them are free. The code
is 16 bits: which s (8), the first seven signs (7), the shift (1). Decoding looks into 256 vectors, not into 65,536.
"""

import itertools
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The 29 vectors of squared norm 12 that fill 227 up to 256: where their three 1/2 stand (the other five are 3/2).
_PADDING = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 "
    "146 045 067 057 047 056 046 014 237"
)
_SHIFT = 0.25
_CPU = torch.device("cpu")
# Magnitudes of each kind of the 227 vectors of squared norm up to 10, in falling order.
_KINDS = [
    *([1.5] * count + [0.5] * (8 - count) for count in range(5)),
    [2.5] + [0.5] * 7,
    [2.5, 1.5] + [0.5] * 6,
]
_CHUNK = 1 << 16  # vectors searched at once: keeps the intermediate tensors in the processor's cache


@lru_cache(maxsize=8)
def magnitudes(device: torch.device = _CPU) -> Float[Tensor, "256 8"]:
    """The 256 vectors s: the 227 of squared norm up to 10, then the 29 of norm 12."""
    inner = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in v) <= 10]
    outer = [tuple(0.5 if str(place) in word else 1.5 for place in range(8)) for word in _PADDING.split()]
    return torch.tensor(inner + outer, device=device)


@lru_cache(maxsize=8)
def table(device: torch.device = _CPU) -> Float[Tensor, "65536 8"]:
    """The points by code: two megabytes, read by `index_select`."""
    codes = torch.arange(1 << 16, device=device)
    size = magnitudes(device)[codes >> 8]
    negative = ((codes[:, None] >> torch.arange(1, 8, device=device)) & 1).bool()
    odd = (size.sum(1).long() + negative.sum(1)) % 2 == 1  # a flipped sign changes the sum by an odd number
    signs = 1.0 - 2.0 * torch.cat((negative, odd[:, None]), 1).float()
    return size * signs + torch.where(codes & 1 == 1, _SHIFT, -_SHIFT)[:, None]


def nearest(x: Float[Tensor, "vectors 8"]) -> Int[Tensor, " vectors"]:
    """The codes of the nearest points, exactly, in float32.

    For each shift: the best signs are those of x - shift, unless their parity is wrong; then the coordinate where a
    flip costs least is flipped. Of the vectors of one kind, the best pairs the largest magnitudes with the largest
    coordinates, so 7 kinds and 29 vectors are compared instead of 256.
    """
    return torch.cat([_nearest(chunk) for chunk in x.float().split(_CHUNK)]) if len(x) else x.new_zeros(0).long()


def _nearest(x: Tensor) -> Tensor:
    size_up, negative_up, distance_up = _nearest_unshifted(x - _SHIFT)
    size_down, negative_down, distance_down = _nearest_unshifted(x + _SHIFT)
    up = distance_up <= distance_down
    negative = torch.where(up[:, None], negative_up, negative_down)
    bits = (negative[:, :7].long() << torch.arange(1, 8, device=x.device)).sum(1)
    digits = torch.where(up[:, None], size_up, size_down).long()  # 0, 1, 2 for 1/2, 3/2, 5/2: truncation of s
    index = _index_of(x.device)[(digits * _powers(x.device)).sum(1)]
    return (index << 8) | bits | up.long()


def _nearest_unshifted(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes, which of them are negative, and the squared distance."""
    size, negative = y.abs(), y < 0
    ordered, order = size.sort(1, descending=True)
    flipped = negative.sum(1) % 2 == 1
    kinds = torch.tensor(_KINDS, device=y.device)
    # For a vector whose coordinates add up to an odd number, an odd number of signs must be negative.
    kinds_wrong = flipped[:, None] ^ (kinds.sum(1) % 2 == 1)
    # Flipping costs 2 s_i |y_i|; within a kind the smallest coordinate meets s_i = 1/2.
    kinds_score = ordered @ kinds.T - kinds.square().sum(1) / 2 - kinds_wrong * ordered[:, 7:]
    padding = magnitudes(y.device)[227:]
    cheapest = torch.full((len(y), len(padding)), torch.inf, device=y.device)
    for place in range(8):
        cheapest = torch.minimum(cheapest, size[:, place, None] * padding[:, place])
    padding_wrong = ~flipped  # 5 * 3/2 + 3 * 1/2 = 9 is odd
    padding_score = size @ padding.T - 6 - 2 * cheapest * padding_wrong[:, None]
    score, best = torch.cat((kinds_score, padding_score), 1).max(1)
    of_kind = torch.zeros_like(size).scatter_(1, order, kinds[best.clamp(max=len(kinds) - 1)])
    chosen = torch.where((best < len(kinds))[:, None], of_kind, padding[(best - len(kinds)).clamp(min=0)])
    wrong = flipped ^ (chosen.sum(1) % 2 == 1)
    cost = chosen * size
    # Among equal costs within a kind the one counted above is the smallest coordinate; any of them is as near.
    flip = cost.argmin(1, keepdim=True)
    negative = negative ^ (torch.zeros_like(negative).scatter_(1, flip, True) & wrong[:, None])
    return chosen, negative, y.square().sum(1) - 2 * score


@lru_cache(maxsize=8)
def _index_of(device: torch.device) -> Int[Tensor, "6561"]:
    """The index of s by its magnitudes read as digits of base 3; -1 for those that are no s."""
    index = torch.full((3**8,), -1, dtype=torch.long, device=device)
    index[(magnitudes(device).long() * _powers(device)).sum(1)] = torch.arange(256, device=device)
    return index


@lru_cache(maxsize=8)
def _powers(device: torch.device) -> Int[Tensor, "8"]:
    return 3 ** torch.arange(8, device=device)


@lru_cache(maxsize=8)
def residual_table(device: torch.device = _CPU) -> Float[Tensor, "256 8"]:
    """The one-bit codebook for residuals: the 241 points of E8 of squared norm up to 2, and 15 of +-2 e_i."""
    whole = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(x * x for x in v) in (0.0, 2.0)]
    half = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    axes = [
        tuple(sign * 2.0 * (place == axis) for place in range(8))
        for sign in (1.0, -1.0)
        for axis in range(8)
        if (sign, axis) != (-1.0, 7)
    ]
    return torch.tensor(whole + half + axes, device=device)


def nearest_residual(x: Float[Tensor, "vectors 8"]) -> Int[Tensor, " vectors"]:
    """The codes of the nearest of the 256 points for residuals."""
    points = residual_table(x.device)
    return (x.float() @ points.T - points.square().sum(1) / 2).max(1).indices
