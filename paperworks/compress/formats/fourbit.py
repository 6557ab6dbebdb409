"""Four bits a weight with a codebook of 16 values and a scale a block: NF4 (QLoRA, arXiv:2305.14314), FP4, int4."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.formats.blockwise import (
    blocks_of,
    decode_scales,
    encode_scales,
    nearest_code,
    pack_nibbles,
    unpack_nibbles,
)
from paperworks.kernels.packed import Grids, of_codebook

# On a CPU a piece stays below 32,768 values, the size from which torch wakes its threads: for such short steps that
# costs more than it brings, and a piece stays in the cache. Elsewhere one step does everything.
STEP_VALUES = {"cpu": 31_744}

# Appendix E of the paper: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.
NF4_CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Sign, two bits of exponent, one of mantissa, in bitsandbytes' order of codes; code 8 is minus zero.
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)


@dataclass(frozen=True, kw_only=True)
class FourBit(WeightFormat):
    """Blocks of `block` weights, row-major: a float32 scale (the largest magnitude) and a 4-bit code each.

    With `double_quantization` the scales take 8 bits (see `blockwise.encode_scales`).
    """

    block: int = 64
    double_quantization: bool = False

    values: ClassVar[tuple[float, ...]]  # by code

    def validate(self) -> None:
        """Check the block."""
        if self.block < 2 or self.block % 2:
            raise ValueError(f"{type(self).__name__}.block must be even (two codes a byte), got {self.block}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """The packed codes and the scales."""
        check_weight(weight, type(self).__name__)
        blocks = blocks_of(weight, self.block)
        scales = blocks.abs().amax(1)
        order, ascending = self._ascending(weight.device)
        # a block of zeros has no scale: any divisor leaves its weights at zero
        codes = order[nearest_code(blocks / torch.where(scales > 0, scales, 1.0)[:, None], ascending)]
        used = weight.numel() + weight.numel() % 2
        stored: Stored = {"codes": pack_nibbles(codes.flatten()[:used])}
        return stored | (encode_scales(scales) if self.double_quantization else {"scales": scales})

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """codebook[code] * scale."""
        return self.decode_as(stored, shape, torch.float32)

    def decode_as(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """The weight in `dtype`, rounded once; only a piece of it is ever in float32."""
        packed = stored["codes"]
        scales = (decode_scales(stored) if self.double_quantization else stored["scales"])[:, None]
        pairs, count, rest = _pairs(self.values, packed.device), math.prod(shape), math.prod(shape) % self.block
        out = torch.empty(len(scales), self.block, dtype=dtype, device=packed.device)
        step = max(1, STEP_VALUES.get(packed.device.type, count) // self.block)
        for start in range(0, len(scales), step):
            piece = slice(start, start + step)
            bytes_ = packed[start * self.block // 2 : (start + step) * self.block // 2]
            values = pairs.index_select(0, bytes_.int()).view(torch.float32)
            if values.numel() % self.block:  # the last block of a matrix that is no whole number of blocks
                values = torch.cat((values, values.new_zeros(-values.numel() % self.block)))
            values = values.view(-1, self.block)
            if dtype == torch.float32:
                torch.mul(values, scales[piece], out=out[piece])
            else:
                out[piece] = values.mul_(scales[piece])
        return (out.flatten()[:count] if rest else out).view(shape)

    def grids(self, stored: Stored, shape: tuple[int, int]) -> Grids | None:
        """Two grids whose sum is within bfloat16's rounding of the codebook; None where blocks cross rows."""
        if shape[1] % self.block:
            return None
        scales = decode_scales(stored) if self.double_quantization else stored["scales"]
        codes = unpack_nibbles(stored["codes"])[: math.prod(shape)].view(shape)
        return of_codebook(self.values, codes, scales.view(shape[0], -1))

    def _ascending(self, device: torch.device) -> tuple[Tensor, Tensor]:
        values = torch.tensor(self.values, device=device)
        ascending, order = torch.sort(values, stable=True)
        keep = torch.ones_like(ascending, dtype=torch.bool)
        keep[1:] = ascending[1:] != ascending[:-1]  # minus zero is never written
        return order[keep], ascending[keep]


_PAIRS: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _pairs(values: tuple[float, ...], device: torch.device) -> Int[Tensor, "256"]:
    """The two float32 values of every byte as one 64-bit number: one look-up decodes two weights."""
    if (values, device) not in _PAIRS:
        codes = unpack_nibbles(torch.arange(256, dtype=torch.uint8)).int()
        _PAIRS[values, device] = torch.tensor(values)[codes].view(torch.int64).to(device)
    return _PAIRS[values, device]


@dataclass(frozen=True, kw_only=True)
class NF4(FourBit):
    """NormalFloat: codes at the quantiles of a normal distribution, so that each is used equally often."""

    values: ClassVar[tuple[float, ...]] = NF4_CODES


@dataclass(frozen=True, kw_only=True)
class FP4(FourBit):
    """Four-bit floating point (E2M1 with a subnormal), as bitsandbytes codes it."""

    values: ClassVar[tuple[float, ...]] = (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES))


@dataclass(frozen=True, kw_only=True)
class Int4(FourBit):
    """Round to nearest on 15 evenly spaced levels, -7 .. 7 (code 8 is unused): the plain baseline."""

    values: ClassVar[tuple[float, ...]] = (*((code - 7) / 7 for code in range(15)), 1.0)
