"""One-token products straight from four-bit codes, by the kernel that PyTorch ships for bfloat16 on CPUs.

The kernel takes codes 0..15 in groups of 32, 64, 128 or 256 along a row and multiplies by

    w_ij = scale_ig (code_ij - 8) + offset_ig,    g = the group of j.

Grids of at most four bits and ggml's four-bit blocks are of this form. A codebook of sixteen values (NF4, FP4) is not,
but the sum of two such grids with other codes, a step apart, comes as near to it as bfloat16 comes to a number: two
products, which still read less than the sixteen bits of a plain weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

GROUPS = (256, 128, 64, 32)  # that the kernel has
_ROWS = 16  # it works on as many outputs at a time
_SEARCHED = 400  # candidates of each of two step sizes: finer ones gain less than bfloat16 loses


@dataclass(frozen=True)
class Grids:
    """A weight as a sum of grids: sum over terms t of scales_tig (codes_tij - 8) + offsets_tig; times `inputs_j`."""

    codes: UInt8[Tensor, "terms rows columns"]
    scales: Float[Tensor, "terms rows groups"]
    offsets: Float[Tensor, "terms rows groups"]
    inputs: Float[Tensor, " columns"] | None = None

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """The weight they stand for."""
        group = self.codes.shape[2] // self.scales.shape[2]
        terms = (self.codes.float() - 8) * self.scales.repeat_interleave(group, 2)
        weight = (terms + self.offsets.repeat_interleave(group, 2)).sum(0)
        return weight if self.inputs is None else weight * self.inputs


class Packed:
    """Grids laid out for the kernel; call it with bfloat16 inputs (rows, columns)."""

    def __init__(self, grids: Grids, group: int) -> None:
        self.group, self.terms = group, len(grids.codes)
        self.inputs = None if grids.inputs is None else grids.inputs.bfloat16()
        repeats = grids.codes.shape[2] // grids.scales.shape[2] // group
        # terms side by side, as if the inputs came once for each: their sum is then one product
        codes, scales, offsets = (torch.cat(tuple(x), 1) for x in (grids.codes, grids.scales, grids.offsets))
        self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        paired = torch.stack((scales, offsets), -1).repeat_interleave(repeats, 1)
        self.scales = paired.transpose(0, 1).bfloat16().contiguous()

    def __call__(self, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """x W^T in bfloat16."""
        x = x if self.inputs is None else x * self.inputs
        x = x.repeat(1, self.terms) if self.terms > 1 else x.contiguous()
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.scales)
        return out


def pack(grids: Grids) -> Packed | None:
    """The grids laid out for the kernel, or None where it does not take them (other groups, devices, sizes)."""
    _, rows, columns = grids.codes.shape
    shared = columns // grids.scales.shape[2]  # inputs with one scale
    group = next((size for size in GROUPS if shared % size == 0 and columns % size == 0), None)
    if group is None or rows % _ROWS or grids.codes.device.type != "cpu":
        return None
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    return Packed(grids, group)


@lru_cache(maxsize=8)
def two_grids(values: tuple[float, ...]) -> tuple[UInt8[Tensor, "2 16"], tuple[float, float]]:
    """Codes a, b of sixteen values and two steps, such that s (a - 8) + t (b - 8) is near each value.

    The steps are searched for the least squared error: for NF4 its root is 0.0007 of the largest value, where
    rounding to bfloat16 makes 0.0006.
    """
    wanted = torch.tensor(values, dtype=torch.float64)
    levels = torch.arange(-8, 8, dtype=torch.float64)
    largest = float(wanted.abs().max())
    steps = largest * torch.linspace(0.07, 0.16, _SEARCHED, dtype=torch.float64)
    best, chosen = torch.inf, (0.0, 0.0)
    for ratio in torch.linspace(0.02, 0.9, _SEARCHED, dtype=torch.float64).tolist():
        sums = (levels[:, None] + ratio * levels).flatten().sort().values
        scaled = wanted / steps[:, None]
        above = torch.searchsorted(sums, scaled).clamp(1, len(sums) - 1)
        off = torch.minimum((sums[above] - scaled).abs(), (scaled - sums[above - 1]).abs()) * steps[:, None]
        errors = off.square().sum(1)
        least, index = errors.min(0)
        if float(least) < best:
            best, chosen = float(least), (float(steps[index]), ratio * float(steps[index]))
    sums = chosen[0] * levels[:, None] + chosen[1] * levels
    nearest = (sums.flatten() - wanted[:, None]).abs().argmin(1)
    return torch.stack((nearest // 16, nearest % 16)).to(torch.uint8), chosen


def of_codebook(
    values: Sequence[float], codes: UInt8[Tensor, "rows columns"], scales: Float[Tensor, "rows groups"]
) -> Grids:
    """The grids of scale * values[code]."""
    tables, steps = two_grids(tuple(values))
    index = codes.long()
    return Grids(
        torch.stack([table[index] for table in tables]),
        torch.stack([step * scales for step in steps]),
        torch.zeros(2, *scales.shape),
    )
