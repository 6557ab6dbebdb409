"""Writers of ggml's k-quants, by the search of the reference quantizers (ggml project, 2023).

256 values are cut into sub-blocks of 16 or 32, each fitted by weighted least squares at several trial scales; the
sub-blocks' scales (and minima) are then quantized themselves, and the integers chosen anew for the scales that will
really be read back. Each writer takes float32 (blocks, 256) and returns uint8 (blocks, bytes).
"""

from collections.abc import Callable

import torch
from torch import Tensor

_TINY = 1e-15  # below this a sub-block counts as zeros


def _half(x: Tensor) -> Tensor:
    """(blocks,) as the two bytes of a float16, refused where it overflows."""
    half = x.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError("k-quants store float16 scales (at most 65504), but the values exceed that or are not finite")
    return half.view(torch.uint8).view(-1, 2)


def _rounded_half(x: Tensor) -> Tensor:
    return x.to(torch.float16).float()


def _safe(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones((), device=x.device), x)


def _fit_with_minimum(
    x: Tensor, weights: Tensor, levels: int, first: float, step: float, steps: int, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit x (groups, values) by scale * q - minimum with q in 0 .. levels; return (scale, minimum >= 0, q).

    Starting from the plain range, trial scales (levels + first + step * i) / range are refitted by weighted least
    squares; the one with the least weighted error is kept, and later trials round from its minimum.
    """
    low, high = x.amin(1).clamp(max=0), x.amax(1)
    flat = high <= low
    total, total_x = weights.sum(1), (weights * x).sum(1)

    def error_of(scale: Tensor, minimum: Tensor, q: Tensor) -> Tensor:
        difference = scale[:, None] * q + minimum[:, None] - x
        return (weights * (difference.abs() if absolute else difference.square())).sum(1)

    def integers(target: float) -> Tensor:
        inverse = target / _safe(high - low)
        return (inverse[:, None] * (x - low[:, None])).round_().clamp_(0, levels)

    q = integers(levels)
    scale = (high - low) / levels
    best = error_of(scale, low, q)
    for index in range(steps + 1):
        trial = integers(first + step * index + levels)
        weighted = weights * trial
        sum_q, sum_qq, sum_qx = weighted.sum(1), (weighted * trial).sum(1), (weighted * x).sum(1)
        determinant = total * sum_qq - sum_q.square()
        divisor = _safe(determinant)
        new_scale = (total * sum_qx - total_x * sum_q) / divisor
        new_low = (sum_qq * total_x - sum_q * sum_qx) / divisor
        positive = new_low > 0
        new_scale = torch.where(positive, sum_qx / _safe(sum_qq), new_scale)
        new_low = torch.where(positive, 0.0, new_low)
        error = error_of(new_scale, new_low, trial)
        better = (determinant > 0) & (error < best)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
        best, q = torch.where(better, error, best), torch.where(better[:, None], trial, q)
    zero = torch.zeros((), device=x.device)
    return torch.where(flat, zero, scale), -low, torch.where(flat[:, None], zero, q)


def _extreme(x: Tensor) -> Tensor:
    """The value of largest magnitude in each row, with its sign."""
    return x.gather(1, x.abs().argmax(1, keepdim=True)).squeeze(1)


def _fit_signed(x: Tensor, half_range: int) -> tuple[Tensor, Tensor]:
    """Fit x (groups, values) by scale * q with q in -half_range .. half_range - 1, weights x^2; return (scale, q)."""
    extreme = _extreme(x)
    zero = extreme.abs() < _TINY
    weights = x.square()

    def trial(shift: float) -> tuple[Tensor, Tensor, Tensor]:
        inverse = -(half_range + shift) / _safe(extreme)
        q = (inverse[:, None] * x).round_().clamp_(-half_range, half_range - 1)
        weighted = weights * q
        return q, (weighted * x).sum(1), (weighted * q).sum(1)

    q, product, square = trial(0.0)
    scale = torch.where(square > 0, product / _safe(square), 0.0)
    best = scale * product
    for index in [*range(-9, 0), *range(1, 10)]:
        other, product, square = trial(0.1 * index)
        better = (square > 0) & (product.square() > best * square)
        candidate = product / _safe(square)
        scale, best = torch.where(better, candidate, scale), torch.where(better, candidate * product, best)
        q = torch.where(better[:, None], other, q)
    return torch.where(zero, 0.0, scale), torch.where(zero[:, None], 0.0, q)


def _fit_by_coordinates(x: Tensor, half_range: int) -> tuple[Tensor, Tensor]:
    """As `_fit_signed`, from the plain scale by up to five passes that change one integer at a time."""
    extreme = _extreme(x)
    zero = extreme.abs() < _TINY
    weights = x.square()
    q = (-half_range / _safe(extreme))[:, None].mul(x).round_().clamp_(-half_range, half_range - 1)
    product, square = (weights * x * q).sum(1), (weights * q.square()).sum(1)
    for _ in range(5):
        before = q.clone()
        for place in range(x.shape[1]):
            weight, value, old = weights[:, place], x[:, place], q[:, place]
            rest_product, rest_square = product - weight * value * old, square - weight * old.square()
            new = (value * rest_square / _safe(rest_product)).round().clamp(-half_range, half_range - 1)
            new_product, new_square = rest_product + weight * value * new, rest_square + weight * new.square()
            better = (rest_product > 0) & (new != old) & (new_square > 0)
            better &= new_product.square() * square > product.square() * new_square
            q[:, place] = torch.where(better, new, old)
            product = torch.where(better, new_product, product)
            square = torch.where(better, new_square, square)
        if torch.equal(q, before):
            break
    scale = torch.where(square > 0, product / _safe(square), 0.0)
    return torch.where(zero, 0.0, scale), torch.where(zero[:, None], 0.0, q)


def _quantized_scales(scales: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales >= 0 (blocks, groups) as integers 0 .. levels and the float32 unit of each block."""
    top = scales.amax(1)
    inverse = torch.where(top > 0, levels / _safe(top), 0.0)
    return (inverse[:, None] * scales).round().clamp(0, levels), top / levels


def _again(x: Tensor, unit: Tensor, offset: Tensor | None, q: Tensor, low: int, high: int) -> Tensor:
    """Choose the integers anew for the scales that will be read; where the scale is 0 the first choice stays."""
    shifted = x if offset is None else x + offset[..., None]
    again = (shifted / _safe(unit)[..., None]).round().clamp(low, high)
    return torch.where((unit == 0)[..., None], q.view_as(again), again)


def _packed(fields: Tensor, bits: int) -> Tensor:
    """(blocks, ..., fields, bytes) -> (blocks, bytes in all): fields side by side in each byte, the first lowest."""
    count = fields.shape[-2]
    shifts = (torch.arange(count, device=fields.device) * bits).view(-1, 1)
    return (fields.to(torch.int32) << shifts).sum(-2).to(torch.uint8).flatten(1)


def _affine(
    x: Tensor, group: int, levels: int, scale_levels: int, search: tuple[float, float, int], absolute: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize by scale and minimum; return (q, scales, minima, unit of the scales, unit of the minima)."""
    groups = x.view(-1, group)
    weights = groups.abs()
    if not absolute:
        weights = weights + groups.square().mean(1, keepdim=True).sqrt()
    scale, minimum, q = _fit_with_minimum(groups, weights, levels, *search, absolute)
    scales, unit = _quantized_scales(scale.view(len(x), -1), scale_levels)
    minima, unit_of_minima = _quantized_scales(minimum.view(len(x), -1), scale_levels)
    offset = _rounded_half(unit_of_minima)[:, None] * minima
    shape = (len(x), 256 // group, group)
    q = _again(x.view(shape), _rounded_half(unit)[:, None] * scales, offset, q.view(shape), 0, levels)
    return q, scales.to(torch.uint8), minima.to(torch.uint8), unit, unit_of_minima


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """8 scales and 8 minima of six bits in 12 bytes, as `ggml_kquants._six_bit_scales` reads them."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return torch.cat((first, second, third), 1)


def _q2_k(x: Tensor) -> Tensor:
    q, scales, minima, unit, unit_of_minima = _affine(x, 16, 3, 15, (-0.5, 0.1, 15), absolute=True)
    packed = _packed(q.view(-1, 2, 4, 32), 2)
    return torch.cat((scales | minima << 4, packed, _half(unit), _half(unit_of_minima)), 1)


def _q4_k(x: Tensor) -> Tensor:
    q, scales, minima, unit, unit_of_minima = _affine(x, 32, 15, 63, (-1.0, 0.1, 20))
    packed = _packed(q.view(-1, 4, 2, 32), 4)
    return torch.cat((_half(unit), _half(unit_of_minima), _six_bits(scales, minima), packed), 1)


def _q5_k(x: Tensor) -> Tensor:
    q, scales, minima, unit, unit_of_minima = _affine(x, 32, 31, 63, (-0.5, 0.1, 15))
    codes = q.to(torch.uint8)
    high, low = _packed(codes >> 4, 1), _packed((codes & 15).view(-1, 4, 2, 32), 4)
    return torch.cat((_half(unit), _half(unit_of_minima), _six_bits(scales, minima), high, low), 1)


def _signed_scales(scale: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """Signed scales (blocks, groups) as integers and the unit: the scale of largest magnitude becomes `lowest`."""
    extreme = _extreme(scale)
    inverse = torch.where(extreme.abs() >= _TINY, lowest / _safe(extreme), 0.0)
    unit = torch.where(inverse != 0, 1 / _safe(inverse), 0.0)
    return (inverse[:, None] * scale).round().clamp(lowest, highest), unit


def _q3_k(x: Tensor) -> Tensor:
    scale, q = _fit_by_coordinates(x.view(-1, 16), 4)
    scales, unit = _signed_scales(scale.view(-1, 16), -32, 31)
    codes = _again(x.view(-1, 16, 16), _rounded_half(unit)[:, None] * scales, None, q.view(-1, 16, 16), -4, 3) + 4
    codes = codes.to(torch.uint8)
    high, low = _packed((codes >> 2).view(-1, 8, 32), 1), _packed((codes & 3).view(-1, 2, 4, 32), 2)
    shifted = (scales + 32).to(torch.uint8)
    below = (shifted[:, :8] & 15) | (shifted[:, 8:] & 15) << 4
    above = _packed((shifted >> 4).view(-1, 4, 4), 2)
    return torch.cat((high, low, below, above, _half(unit)), 1)


def _q6_k(x: Tensor) -> Tensor:
    scale, q = _fit_signed(x.view(-1, 16), 32)
    scales, unit = _signed_scales(scale.view(-1, 16), -128, 127)
    codes = _again(x.view(-1, 16, 16), _rounded_half(unit)[:, None] * scales, None, q.view(-1, 16, 16), -32, 31) + 32
    codes = codes.to(torch.uint8)
    low, high = _packed((codes & 15).view(-1, 2, 2, 64), 4), _packed((codes >> 4).view(-1, 2, 4, 32), 2)
    return torch.cat((low, high, scales.to(torch.int8).view(torch.uint8), _half(unit)), 1)


K_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
