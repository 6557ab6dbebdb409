"""Writing ggml's block formats, byte for byte like the reference quantizers (ggml project, 2023).

A 32-value block picks its scale from the extreme values alone. Integers are computed with the float32 reciprocal of
the unrounded scale; only the stored scale is rounded to float16.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from paperworks.compress.ggml.kquant_encode import K_ENCODERS
from paperworks.compress.ggml.layouts import block_format


def encode(x: Float[Tensor, "*rows values"], type: str) -> UInt8[Tensor, "*rows bytes"]:
    """Turn rows of numbers into stored bytes.

    Args:
        x: any floating dtype; the last dimension is the row the blocks run along.
        type: one of `WRITABLE`.

    Raises:
        ValueError: a type that cannot be written, a row that is not whole blocks, or values the type cannot hold.
    """
    block = block_format(type)
    if type not in WRITABLE:
        raise ValueError(f"{type} can be read but not written here; what can be written: {', '.join(WRITABLE)}")
    if x.ndim == 0 or x.shape[-1] % block.values:
        raise ValueError(f"{type} needs rows of a multiple of {block.values} values, got shape {tuple(x.shape)}")
    rows = x.detach().to(torch.float32).contiguous()
    step = max(1, (1 << 20) // block.values)  # bounds the temporaries to some 4 MiB each
    pieces = [_ENCODERS[type](piece) for piece in rows.view(-1, block.values).split(step)] if rows.numel() else []
    stored = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=x.device)
    return stored.view(*x.shape[:-1], x.shape[-1] // block.values * block.bytes)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _half(x: Tensor, name: str) -> Tensor:
    """Round to float16 and refuse what overflows it, since such a block would read back as infinities."""
    half = x.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(f"{name} stores float16 scales (at most 65504), but the values exceed that or are not finite")
    return _bytes(half)


def _f32(x: Tensor) -> Tensor:
    return _bytes(x)


def _f16(x: Tensor) -> Tensor:
    half = x.to(torch.float16)
    if (torch.isinf(half) & torch.isfinite(x)).any():
        raise ValueError(f"F16 holds at most 65504 in magnitude, got {x.abs().max().item():g}; write BF16 or F32")
    return _bytes(half)


def _bf16(x: Tensor) -> Tensor:
    """Upper 16 bits, rounded to nearest even; a NaN stays a NaN, made quiet, with its sign."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return _bytes(torch.where(torch.isnan(x), (bits >> 16) | 64, rounded).to(torch.int16))


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or too small for its reciprocal to be finite."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def _divided(x: Tensor, divisor: float) -> Tensor:
    """Divide exactly; dividing by a Python number may become a multiplication by its rounded reciprocal."""
    return x / torch.full_like(x, divisor)


def _signed_extreme(x: Tensor) -> Tensor:
    """Take the value of largest magnitude in each block, with its sign; the first of equals."""
    return x.gather(1, x.abs().argmax(dim=1, keepdim=True))


def _truncated(x: Tensor, most: int) -> Tensor:
    return x.trunc().clamp(0, most).to(torch.uint8)


def _nibbles(q: Tensor) -> Tensor:
    return (q[:, :16] & 15) | q[:, 16:] << 4


def _fifth_bits(q: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=q.device)
    return ((q >> 4).view(-1, 4, 8) << places).sum(dim=-1, dtype=torch.uint8)


def _q8_0(x: Tensor) -> Tensor:
    scale = _divided(x.abs().amax(dim=1, keepdim=True), 127)
    scaled = x * _reciprocal(scale)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = whole + (2 * (magnitude - whole)).floor()  # half away from zero, which torch.round is not
    return torch.cat([_half(scale, "Q8_0"), _bytes((scaled.sign() * rounded).to(torch.int8))], dim=1)


def _q4_0(x: Tensor) -> Tensor:
    scale = _divided(_signed_extreme(x), -8)
    q = _truncated(x * _reciprocal(scale) + 8.5, 15)
    return torch.cat([_half(scale, "Q4_0"), _nibbles(q)], dim=1)


def _q5_0(x: Tensor) -> Tensor:
    scale = _divided(_signed_extreme(x), -16)
    q = _truncated(x * _reciprocal(scale) + 16.5, 31)
    return torch.cat([_half(scale, "Q5_0"), _fifth_bits(q), _nibbles(q)], dim=1)


def _ranged(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Spread `levels` steps from the smallest to the largest value; return (scale, minimum, integers)."""
    minimum = x.amin(dim=1, keepdim=True)
    scale = _divided(x.amax(dim=1, keepdim=True) - minimum, levels)
    return scale, minimum, _truncated((x - minimum) * _reciprocal(scale) + 0.5, levels)


def _q4_1(x: Tensor) -> Tensor:
    scale, minimum, q = _ranged(x, 15)
    return torch.cat([_half(scale, "Q4_1"), _half(minimum, "Q4_1"), _nibbles(q)], dim=1)


def _q5_1(x: Tensor) -> Tensor:
    scale, minimum, q = _ranged(x, 31)
    return torch.cat([_half(scale, "Q5_1"), _half(minimum, "Q5_1"), _fifth_bits(q), _nibbles(q)], dim=1)


_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    **K_ENCODERS,
}

WRITABLE: tuple[str, ...] = tuple(_ENCODERS)
