"""The contract of a weight format: how a matrix is stored, and what one weight costs."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.nn.spec import Spec

Stored = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class WeightFormat(Spec):
    """How a weight matrix is stored. Formats know neither the layer they serve nor what sits on top of it."""

    def encode(self, weight: Float[Tensor, "rows columns"]) -> Stored:
        """Return the plain tensors that stand for the weight. Raises `ValueError` for what it cannot hold."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it encodes")

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Return the weight that the tensors stand for, in float32."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it decodes")

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Return the exact storage of a matrix of this shape in bits per weight, scales and codebooks included."""
        stored = self.encode(torch.zeros(shape))
        return 8 * sum(tensor.nbytes for tensor in stored.values()) / math.prod(shape)


def check_weight(weight: Tensor, owner: str) -> None:
    """Raise `ValueError` unless `weight` is a finite matrix."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{owner} encodes a floating-point matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{owner} cannot encode NaN or infinity; this weight holds {int((~torch.isfinite(weight)).sum())}"
        )
