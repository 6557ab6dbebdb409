"""Round to nearest on evenly spaced grids: the plain integer formats, and the storage of those that round better.

See `grids` for the equations and the sources.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.formats.grids import Grid, find_grid
from paperworks.kernels.bit_packing import pack_codes, packed_bytes, unpack_codes
from paperworks.kernels.packed import Grids


@dataclass(frozen=True, kw_only=True)
class Uniform(WeightFormat):
    """Codes of `bits` bits, packed; a float16 scale, and a zero point of `bits` bits if asymmetric, for each slice.

    A slice is `group` inputs of a row (output feature); with `group=None` the whole row, or what `granularity` says.
    At 4 bits and groups of 128 a weight takes 4 + (16 + 4)/128 = 4.156 bits; symmetric, 4.125.

    Attributes:
        bits: 2..8.
        group: inputs that share a scale, a divisor of the layer's inputs; None for all of them.
        granularity: "row", or with `group=None` also "column" (one scale an input) or "tensor" (one in all).
        symmetric: levels -top..top around zero (absmax) instead of min..max with a zero point.
        clip: exponent of the error that a shrunk range should minimise (2 is the mean squared error, GPTQ's code takes
            2.4); None keeps the whole range.
        scale_dtype: of the stored scales.

    Raises:
        ValueError: for a group that does not divide the row; lists those that do.
    """

    bits: int = 4
    group: int | None = 128
    granularity: Literal["row", "column", "tensor"] = "row"
    symmetric: bool = False
    clip: float | None = None
    scale_dtype: Literal["float16", "float32"] = "float16"

    continuous: ClassVar[tuple[str, ...]] = ("scales",)

    def validate(self) -> None:
        """Check the bits, the group and the clipping exponent."""
        name = type(self).__name__
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{name}.bits must be 2 to 8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"{name}.group must be at least 1, or None for whole rows, got {self.group}")
        if self.group is not None and self.granularity != "row":
            raise ValueError(
                f"{name}.group={self.group} cuts rows, which granularity={self.granularity!r} does not have: "
                "set group=None"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"{name}.clip is the exponent of an error, such as 2.0, got {self.clip}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """The packed codes, the scales and (asymmetric) the packed zero points."""
        check_weight(weight, type(self).__name__)
        slices = self.slices(weight.detach().float())
        grid = self.grid(slices)
        return self.store(grid.codes(slices), grid, (weight.shape[0], weight.shape[1]))

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """(code - zero) * scale."""
        slices = self.slices(self.unpack(stored["codes"], shape[1]))
        centred = slices.float() - self._zeros(stored, len(slices))
        return self._matrix(centred * stored["scales"].float()[:, None], shape).contiguous()

    def grids(self, stored: Stored, shape: tuple[int, int]) -> Grids | None:
        """The grid itself, if it has at most four bits and its scales belong to rows."""
        if self.bits > 4 or self.granularity != "row":
            return None
        codes = self.unpack(stored["codes"], shape[1])
        scales = stored["scales"].float().view(shape[0], -1)
        zeros = self._zeros(stored, scales.numel())
        zeros = zeros.view_as(scales) if isinstance(zeros, Tensor) else zeros
        middle = 2 ** (self.bits - 1)  # brought to the kernel's 8: offsets stay small, and so does their rounding
        return Grids((codes + (8 - middle))[None], scales[None], (scales * (middle - zeros))[None])

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Round to nearest on the scales held now; slices that have outgrown theirs get new ones."""
        check_weight(weight, type(self).__name__)
        shape = (weight.shape[0], weight.shape[1])
        slices = self.slices(weight.detach().float())
        fresh = self.grid(slices)
        scale = stored["scales"].float()[:, None]
        zero = torch.zeros_like(scale)
        if not self.symmetric:
            zero = zero + fresh.low + self._zeros(stored, len(slices))
        held = Grid(scale, zero, fresh.low, fresh.high)
        # beyond half a step outside the range, keeping the scale costs more than rounding
        outgrown = ((held.nearest(slices) - slices).abs() > 0.51 * scale).any(-1, keepdim=True)
        scale, zero = torch.where(outgrown, fresh.scale, scale), torch.where(outgrown, fresh.zero, zero)
        grid = Grid(scale, zero, fresh.low, fresh.high)
        return self.store(grid.codes(slices), grid, shape)

    def slices(self, matrix: Tensor) -> Float[Tensor, "slices members"]:
        """Cut a matrix into the slices that share a scale."""
        if self.granularity == "tensor":
            return matrix.reshape(1, -1)
        if self.granularity == "column":
            return matrix.t()
        return matrix.reshape(-1, self.group_of(matrix.shape[1]))

    def group_of(self, columns: int) -> int:
        """The group for a row of so many inputs. Raises `ValueError` if it does not divide it."""
        if self.group is None or columns == 0:
            return max(columns, 1)
        if columns % self.group:
            fitting = [size for size in range(1, columns + 1) if columns % size == 0 and size >= 8] or [columns]
            raise ValueError(
                f"{type(self).__name__}.group={self.group} does not divide a row of {columns} inputs; "
                f"these do: {', '.join(map(str, fitting))}; or set group=None for whole rows"
            )
        return self.group

    def grid(self, slices: Float[Tensor, "slices members"]) -> Grid:
        """The grids of slices, their scales rounded to what is stored."""
        return find_grid(slices, self.bits, self.symmetric, self.clip, getattr(torch, self.scale_dtype))

    def store(self, codes: Float[Tensor, "slices members"], grid: Grid, shape: tuple[int, int]) -> Stored:
        """The stored tensors of codes chosen on grids."""
        matrix = self._matrix(codes, shape)
        stored: Stored = {
            "codes": self.pack(matrix, grid.low),
            "scales": grid.scale.flatten().to(getattr(torch, self.scale_dtype)),
        }
        if not self.symmetric:
            stored["zeros"] = pack_codes(grid.zero.to(torch.uint8).view(1, -1), self.bits)[0]
        return stored

    def pack(self, codes: Float[Tensor, "rows columns"], low: int) -> Int[Tensor, "rows bytes"]:
        """The stored form of codes, of which `low` is the lowest possible."""
        return pack_codes((codes - low).to(torch.uint8), self.bits)

    def unpack(self, packed: Int[Tensor, "rows bytes"], columns: int) -> Int[Tensor, "rows columns"]:
        """Stored codes, counted from the lowest."""
        return unpack_codes(packed, self.bits, columns)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Codes, scales and zero points over weights, without encoding anything."""
        rows, columns = shape
        slices = {"tensor": 1, "column": columns, "row": rows * columns // self.group_of(columns)}[self.granularity]
        scale = 2 if self.scale_dtype == "float16" else 4
        zeros = 0 if self.symmetric else packed_bytes(slices, self.bits)
        return 8 * (rows * packed_bytes(columns, self.bits) + slices * scale + zeros) / (rows * columns)

    def _matrix(self, slices: Tensor, shape: tuple[int, int]) -> Tensor:
        return slices.t() if self.granularity == "column" else slices.reshape(shape)

    def _zeros(self, stored: Stored, slices: int) -> Tensor | float:
        """What to subtract from codes counted from the lowest."""
        if self.symmetric:
            return float(2 ** (self.bits - 1) - 1)
        return unpack_codes(stored["zeros"][None], self.bits, slices)[0].float()[:, None]


@dataclass(frozen=True, kw_only=True)
class Int8(Uniform):
    """Eight bits and one scale a row, absmax: the codes are a torch.int8 matrix, ready for integer products."""

    bits: int = 8
    group: int | None = None
    symmetric: bool = True

    def validate(self) -> None:
        """Refuse anything but eight symmetric bits."""
        super().validate()
        if self.bits != 8 or not self.symmetric:
            raise ValueError(
                f"{type(self).__name__} has 8 bits and is symmetric, got bits={self.bits}, symmetric={self.symmetric}; "
                "Uniform takes others"
            )

    def pack(self, codes: Float[Tensor, "rows columns"], low: int) -> Int[Tensor, "rows columns"]:
        """The codes as torch.int8."""
        return codes.to(torch.int8).contiguous()

    def unpack(self, packed: Int[Tensor, "rows columns"], columns: int) -> Int[Tensor, "rows columns"]:
        """The codes as they are: zero is zero."""
        return packed

    def _zeros(self, stored: Stored, slices: int) -> Tensor | float:
        return 0.0
