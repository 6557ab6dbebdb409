"""Blocks of weights in row-major order, each divided by its largest magnitude; and the scales quantized once more.

Double quantization is Section 3 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).
"""

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCALE_BLOCK = 256  # scales quantized together (Section 3)


def blocks_of(weight: Tensor, block: int) -> Float[Tensor, "blocks block"]:
    """Flatten row-major and cut into blocks, the last filled up with zeros."""
    flat = weight.detach().float().flatten()
    missing = -flat.numel() % block
    if missing:
        flat = torch.cat((flat, flat.new_zeros(missing)))
    return flat.view(-1, block)


def nearest_code(values: Tensor, codes: Float[Tensor, " codes"]) -> Int[Tensor, "..."]:
    """The index of the nearest entry of an ascending codebook; ties go to the lower one."""
    boundaries = (codes[1:] + codes[:-1]) / 2
    return torch.bucketize(values, boundaries)


@cache
def dynamic_code() -> Float[Tensor, "256"]:
    """The signed dynamic 8-bit code (Dettmers 2016, arXiv:1511.04561): seven decades, finer where larger."""
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    values = torch.cat(positive)
    return torch.cat((values, -values, torch.tensor([0.0, 1.0]))).sort().values


def pack_nibbles(codes: Int[Tensor, " even"]) -> Int[Tensor, " half"]:
    """Pack two 4-bit codes a byte, the first in the high nibble."""
    pairs = codes.to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack_nibbles(packed: Int[Tensor, " half"]) -> Int[Tensor, " even"]:
    """Undo `pack_nibbles`."""
    return torch.stack((packed >> 4, packed & 15), -1).flatten()


def encode_scales(scales: Float[Tensor, " blocks"]) -> dict[str, Tensor]:
    """Quantize scales to 8 bits: the mean is subtracted and kept, blocks of 256 share a float32 scale."""
    mean = scales.mean()
    centred = blocks_of(scales - mean, SCALE_BLOCK)
    top = centred.abs().amax(1)
    codes = nearest_code(centred / top.clamp(min=1e-38)[:, None], dynamic_code())
    return {
        "scale_codes": codes.flatten()[: scales.numel()].to(torch.uint8),
        "scale_scales": top,
        "scale_mean": mean,
    }


def decode_scales(stored: dict[str, Tensor]) -> Float[Tensor, " blocks"]:
    """Undo `encode_scales`, up to its rounding."""
    codes = stored["scale_codes"]
    values = dynamic_code().to(codes.device)[codes.int()]
    return values * stored["scale_scales"].repeat_interleave(SCALE_BLOCK)[: codes.numel()] + stored["scale_mean"]
