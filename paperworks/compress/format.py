"""The contract of a weight format: how a matrix is stored, what one weight costs, and how it is multiplied by."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from paperworks.compress.calibration.statistics import Statistics
from paperworks.core.spec import Spec
from paperworks.kernels.packed import Grids

Stored = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class WeightFormat(Spec):
    """How a weight matrix is stored. Formats know neither the layer they serve nor what sits on top of it.

    A format that learns from data names in `needs` what it must know of the layer's inputs; `compress.apply` then asks
    for calibration batches, collects it and hands it to `encode`.

    Attributes:
        needs: fields of `Statistics` that `encode` reads; none for formats that look at the weight alone.
        continuous: stored tensors that could be trained while the codes stay (codebooks, scales).
    """

    needs: ClassVar[tuple[str, ...]] = ()
    continuous: ClassVar[tuple[str, ...]] = ()

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """The plain tensors that stand for the weight. Raises `ValueError` for what it cannot hold."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it encodes")

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """The weight that the tensors stand for, in float32; differentiable in the continuous ones."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it decodes")

    def decode_as(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """`decode` in another dtype; formats that can do so without the whole in float32 override this."""
        return self.decode(stored, shape).to(dtype)

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Store a weight close to the one stored now, without the data: what merging an adapter does.

        Formats that learned something from data keep it (channel scales, rotations, codebooks, the mask).
        """
        return self.encode(weight)

    def prepare(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... columns"]:
        """What `multiply` is given for a layer's inputs: differentiable, for what is done to them before."""
        return x

    def multiply(
        self, x: Float[Tensor, "... columns"], stored: Stored, shape: tuple[int, int]
    ) -> Float[Tensor, "... rows"]:
        """x W^T in the dtype of `x`. Formats with an arithmetic of their own (int8, fp8) compute it here."""
        return F.linear(x, self.decode_as(stored, shape, x.dtype))

    def grids(self, stored: Stored, shape: tuple[int, int]) -> Grids | None:
        """The weight as a sum of four-bit grids, for products without decoding (see `packed`), or None.

        May differ from `decode` by as much as bfloat16 would.
        """
        return None

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """The exact storage of a matrix of this shape in bits per weight, scales and codebooks included."""
        stored = self.encode(torch.zeros(shape), Statistics.neutral(shape[1]) if self.needs else None)
        return stored_bits(stored, shape)

    def learned(self, statistics: Statistics | None) -> Statistics:
        """The statistics, or raise `ValueError` if one of those in `needs` is missing."""
        missing = [name for name in self.needs if statistics is None or getattr(statistics, name) is None]
        if statistics is None or missing:
            raise ValueError(
                f"{type(self).__name__} learns from data ({', '.join(missing)} of the layer's inputs): "
                "pass calibration=batches to compress.apply"
            )
        return statistics


def stored_bits(stored: Stored, shape: tuple[int, int]) -> float:
    """The bits per weight that the tensors take."""
    return 8 * sum(tensor.nbytes for tensor in stored.values()) / math.prod(shape)


def check_weight(weight: Tensor, owner: str) -> None:
    """Raise `ValueError` unless `weight` is a finite matrix."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{owner} encodes a floating-point matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    # a finite sum needs finite numbers; one that overflows is looked at number by number
    if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{owner} cannot encode NaN or infinity; this weight holds {int((~torch.isfinite(weight)).sum())}"
        )
