"""k bits a weight by any of four data types, as compared by Dettmers & Zettlemoyer (2022, arXiv:2212.09720)."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.formats.blockwise import blocks_of, nearest_code
from paperworks.kernels.bit_packing import pack_codes, packed_bytes, unpack_codes

DataType = Literal["int", "float", "dynamic", "quantile"]


@dataclass(frozen=True, kw_only=True)
class KBit(WeightFormat):
    """Blocks of weights over their largest magnitude, rounded to 2^bits values in [-1, 1].

    A weight takes bits + 16/block: codes are packed, a block's constant is a float16.

    Attributes:
        bits: 2..8.
        kind: "int" evenly spaced, 2^bits - 1 levels; "float" with 2 exponent bits up to 4 bits and 3 above; "dynamic",
            whose exponent is as long as it is small; "quantile", values that are used equally often, estimated from the
            matrix and stored with it (2^bits float16 numbers).
        block: weights that share a constant, in row-major order; None for the whole matrix.
    """

    bits: int = 4
    kind: DataType = "int"
    block: int | None = 64

    continuous: ClassVar[tuple[str, ...]] = ("scales",)

    def validate(self) -> None:
        """Check bits and block."""
        if not 2 <= self.bits <= 8:
            raise ValueError(f"KBit.bits must be 2 to 8, got {self.bits}")
        if self.kind == "float" and self.bits < 3:
            raise ValueError("KBit with kind='float' has a sign and two exponent bits: bits must be 3 to 8")
        if self.block is not None and self.block < 2:
            raise ValueError(f"KBit.block must be at least 2, or None for the whole matrix, got {self.block}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Packed codes, the blocks' constants and, for quantiles, the codebook."""
        check_weight(weight, "KBit")
        blocks = blocks_of(weight, self.block or weight.numel())
        scales = blocks.abs().amax(1).to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("KBit stores float16 constants (at most 65504), which these weights exceed")
        shares = blocks / torch.where(scales > 0, scales, 1).float()[:, None]
        stored: Stored = {"scales": scales}
        if self.kind == "quantile":
            stored["codebook"] = quantiles(shares.flatten()[: weight.numel()], self.bits).to(torch.float16)
        codes = nearest_code(shares, self._values(stored))
        return {"codes": pack_codes(codes.flatten()[None, : weight.numel()], self.bits)[0]} | stored

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """codebook[code] * constant."""
        count = shape[0] * shape[1]
        codes = unpack_codes(stored["codes"][None], self.bits, count)[0]
        values = self._values(stored)[codes.int()]
        blocks = blocks_of(values, self.block or count)
        return (blocks * stored["scales"].float()[:, None]).flatten()[:count].view(shape)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Codes, constants and codebook over weights."""
        count = shape[0] * shape[1]
        blocks = -(-count // (self.block or count))
        book = 2 * 2**self.bits if self.kind == "quantile" else 0
        return 8 * (packed_bytes(count, self.bits) + 2 * blocks + book) / count

    def _values(self, stored: Stored) -> Float[Tensor, " values"]:
        if self.kind == "quantile":
            return stored["codebook"].float()
        return codebook(self.kind, self.bits).to(stored["scales"].device)


@cache
def codebook(kind: DataType, bits: int) -> Float[Tensor, " values"]:
    """The ascending values in [-1, 1] of a data type that does not depend on the weights."""
    if kind == "int":
        top = 2 ** (bits - 1) - 1
        steps: Tensor = torch.arange(-top, top + 1) / top  # zero exactly
        return steps
    positive = _float_values(bits) if kind == "float" else _dynamic_values(bits)
    edges = torch.tensor([0.0, 1.0] if kind == "dynamic" else [0.0])
    values: Tensor = torch.cat((-positive, positive, edges)).unique()
    return values


def _float_values(bits: int) -> Float[Tensor, " values"]:
    """The positive values of sign, exponent and mantissa bits, subnormals included, over the largest."""
    exponent_bits = 2 if bits <= 4 else 3
    mantissa_bits = bits - 1 - exponent_bits
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            values.append(2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction))
    positive = torch.tensor([value for value in values if value > 0])
    return positive / positive.max()


def _dynamic_values(bits: int) -> Float[Tensor, " values"]:
    """The positive values of the dynamic exponent type but 1: decades, finer where larger."""
    parts = []
    for decade in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        parts.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - bits + 2))
    return torch.cat(parts)


def quantiles(values: Float[Tensor, " count"], bits: int) -> Float[Tensor, " values"]:
    """q_i = (Q(i/(2^k + 1)) + Q((i + 1)/(2^k + 1))) / 2 for i = 0 .. 2^k - 1, over the largest magnitude."""
    ordered = values.float().sort().values
    places = torch.arange(2**bits + 1, device=values.device) / (2**bits + 1) * (len(ordered) - 1)
    below = places.floor().long()
    edges = torch.lerp(ordered[below], ordered[(below + 1).clamp(max=len(ordered) - 1)], places - below)
    middles = (edges[:-1] + edges[1:]) / 2
    return middles / middles.abs().max().clamp(min=1e-12)
