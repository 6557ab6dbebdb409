"""Pruned weights: a bit for each weight that says whether it is kept, and the kept values.

Magnitude pruning (Han et al. 2015, arXiv:1506.02626) and Wanda (Sun et al. 2023, arXiv:2306.11695) choose what to keep
and leave it as it is; SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774), which also corrects it, is beside them.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.kernels.bit_packing import pack_codes, unpack_codes

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Sparse(WeightFormat):
    """Keeps a share of the weights: the others are exactly zero.

    Attributes:
        sparsity: the share that is zero.
        pattern: "n:m", such as "2:4": of every m weights along the input n are zero; sets the sparsity.
        values: how kept values are stored; None keeps the dtype of the weight.
    """

    sparsity: float = 0.5
    pattern: str | None = None
    values: Literal["float32", "float16", "bfloat16"] | None = None

    def validate(self) -> None:
        """Check sparsity and pattern."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"{type(self).__name__}.sparsity must be in [0, 1), got {self.sparsity}")
        if self.pattern is not None:
            found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
            if found is None or not 0 < int(found[1]) < int(found[2]):
                raise ValueError(
                    f"{type(self).__name__}.pattern must read n:m with 0 < n < m, such as '2:4', got {self.pattern!r}"
                )
            zeros, of = self.zeros_of
            if self.sparsity not in (0.5, zeros / of):
                raise ValueError(f"{type(self).__name__}: pattern {self.pattern} sets the sparsity; leave it out")

    @property
    def zeros_of(self) -> tuple[int, int]:
        """(n, m) of the pattern."""
        zeros, of = (self.pattern or "0:1").split(":")
        return int(zeros), int(of)

    def check_columns(self, columns: int) -> None:
        """Raise `ValueError` unless the pattern divides a row."""
        if columns % self.zeros_of[1]:
            raise ValueError(
                f"{type(self).__name__}: groups of {self.zeros_of[1]} do not divide rows of {columns}; "
                "use another pattern, or sparsity= without one"
            )

    def kept(self, shape: tuple[int, int]) -> int:
        """How many weights of a matrix of this shape are kept."""
        if self.pattern is not None:
            zeros, of = self.zeros_of
            return prod(shape) // of * (of - zeros)
        return prod(shape) - int(prod(shape) * self.sparsity)

    def choose(
        self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None
    ) -> tuple[Float[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
        """The weight, corrected or as it is, and True where it is kept."""
        raise NotImplementedError(f"{type(self).__name__} does not say which weights it keeps")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """The mask, eight weights a byte, and the kept values in row-major order."""
        check_weight(weight, type(self).__name__)
        self.check_columns(weight.shape[1])
        chosen, mask = self.choose(weight.detach().float(), statistics)
        return self._store(chosen, mask, weight.dtype)

    def _store(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Stored:
        kept = weight[mask].to(_DTYPES[self.values] if self.values is not None else dtype)
        if not bool(torch.isfinite(kept).all()):
            raise ValueError(f"{type(self).__name__}.values={self.values!r} cannot hold these weights; use 'bfloat16'")
        return {"mask": pack_codes(mask.to(torch.uint8), 1), "kept": kept}

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """The kept values in their places, and zeros."""
        mask = unpack_codes(stored["mask"], 1, shape[1]).view(shape).bool()
        return torch.zeros(shape, device=mask.device).masked_scatter(mask, stored["kept"].float())

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Store another weight under the same mask; what it changes where weights are pruned is lost."""
        mask = unpack_codes(stored["mask"], 1, weight.shape[1]).view(weight.shape).bool()
        return self._store(weight.detach().float(), mask, stored["kept"].dtype)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """A bit for the mask, rows filled up to bytes, and the kept values (float32 if `values` is None)."""
        self.check_columns(shape[1])
        size = _DTYPES[self.values or "float32"].itemsize
        return 8 * (shape[0] * -(-shape[1] // 8) + self.kept(shape) * size) / prod(shape)


def smallest(scores: Float[Tensor, "groups values"], count: int) -> Bool[Tensor, "groups values"]:
    """True for the `count` smallest scores of each row, exactly so many also where scores are equal."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if count == 0:
        return chosen
    return chosen.scatter_(1, scores.topk(count, dim=1, largest=False, sorted=False).indices, True)


def pattern_zeros(scores: Float[Tensor, "rows columns"], zeros: int, of: int) -> Bool[Tensor, "rows columns"]:
    """True for the `zeros` smallest of every `of` scores along a row."""
    return smallest(scores.reshape(-1, of), zeros).view(scores.shape)


@dataclass(frozen=True, kw_only=True)
class Magnitude(Sparse):
    """Keep the largest weights of the whole matrix, or of every m by the pattern: the baseline of all others."""

    def choose(self, weight: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """The weight as it is and what is kept of it."""
        scores = weight.abs()
        if self.pattern is not None:
            return weight, ~pattern_zeros(scores, *self.zeros_of)
        return weight, ~smallest(scores.view(1, -1), int(weight.numel() * self.sparsity)).view(weight.shape)


@dataclass(frozen=True, kw_only=True)
class Wanda(Sparse):
    """Keep the largest |W_ij| ||x_j|| of each output row: weights count by what their input brings (Section 3).

    No weight is changed, nothing is solved: the norms of the inputs are all the data it needs.
    """

    needs: ClassVar[tuple[str, ...]] = ("second_moment",)

    def choose(self, weight: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """The weight as it is and what is kept of it."""
        moment = self.learned(statistics).required("second_moment")
        scores = weight.abs() * moment.diagonal().clamp(min=0).sqrt().to(weight.device)
        if self.pattern is not None:
            return weight, ~pattern_zeros(scores, *self.zeros_of)
        return weight, ~smallest(scores, int(weight.shape[1] * self.sparsity))

    def kept(self, shape: tuple[int, int]) -> int:
        """How many weights of a matrix of this shape are kept: the same number in each row."""
        return (
            super().kept(shape) if self.pattern is not None else shape[0] * (shape[1] - int(shape[1] * self.sparsity))
        )
