"""Decoders of ggml's k-quants: 256 values in sub-blocks, whose scales are themselves quantized (ggml project, 2023).

Each decoder fills `out` (blocks, 256) in float32 from `blocks` (blocks, bytes); `ggml.decode` feeds them piecewise.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _half(bytes_: Tensor) -> Tensor:
    """Two bytes of each block as a float32 column (blocks, 1)."""
    return bytes_.view(torch.float16).float()


def _shifted(packed: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """(blocks, groups, bytes) -> (blocks, groups, shifts, bytes): the fields of each byte, lowest first."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=packed.device).view(-1, 1)
    return (packed.unsqueeze(-2) >> by) & mask


def _scale_groups(out: Tensor, scale: Tensor, minimum: Tensor | None = None) -> None:
    """out (blocks, 256) *= scale (blocks, groups), then -= minimum, each number serving 256 / groups values."""
    groups = out.view(len(out), scale.shape[1], -1)
    groups.mul_(scale.unsqueeze(-1))
    if minimum is not None:
        groups.sub_(minimum.unsqueeze(-1))


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima that Q4_K and Q5_K pack into 12 bytes: four bits below, two spread above."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 6) << 4], dim=1)
    return scales, minima


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    scales, packed = blocks[:, :16], blocks[:, 16:80].reshape(-1, 2, 32)
    out.view(-1, 2, 4, 32).copy_(_shifted(packed, (0, 2, 4, 6), 3))
    _scale_groups(out, _half(blocks[:, 80:82]) * (scales & 15), _half(blocks[:, 82:84]) * (scales >> 4))


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    high, packed, scales = blocks[:, :32], blocks[:, 32:96].reshape(-1, 2, 32), blocks[:, 96:108]
    out.view(-1, 2, 4, 32).copy_(_shifted(packed, (0, 2, 4, 6), 3))
    out.view(-1, 8, 32).add_(_shifted(high, tuple(range(8)), 1), alpha=4).sub_(4)  # a set bit spares the offset of 4
    low = torch.cat([scales[:, :8] & 15, scales[:, :8] >> 4], dim=1)
    top = _shifted(scales[:, 8:12], (0, 2, 4, 6), 3).reshape(-1, 16)
    _scale_groups(out, _half(blocks[:, 108:110]) * ((low | top << 4).to(torch.int8) - 32))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    out.view(-1, 4, 2, 32).copy_(_shifted(blocks[:, 16:144].reshape(-1, 4, 32), (0, 4), 15))
    _scale_groups(out, _half(blocks[:, 0:2]) * scales, _half(blocks[:, 2:4]) * minima)


def q4_k_parts(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes (blocks, 256), and for each 32 of them the scale and what is added: x = scale code + minimum."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    codes = _shifted(blocks[:, 16:144].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 256)
    return codes, _half(blocks[:, 0:2]) * scales, -_half(blocks[:, 2:4]) * minima


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    out.view(-1, 4, 2, 32).copy_(_shifted(blocks[:, 48:176].reshape(-1, 4, 32), (0, 4), 15))
    out.view(-1, 8, 32).add_(_shifted(blocks[:, 16:48], tuple(range(8)), 1), alpha=16)
    _scale_groups(out, _half(blocks[:, 0:2]) * scales, _half(blocks[:, 2:4]) * minima)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    out.view(-1, 2, 2, 64).copy_(_shifted(low, (0, 4), 15))
    out.view(-1, 2, 4, 32).add_(_shifted(high, (0, 2, 4, 6), 3), alpha=16).sub_(32)
    _scale_groups(out, _half(blocks[:, 208:210]) * blocks[:, 192:208].view(torch.int8))


K_DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
