"""Normalization: LayerNorm (Ba et al. 2016, arXiv:1607.06450), RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Norm(Spec):
    """A normalization over the last dimension: `build(dim)` gives a module (..., dim) -> (..., dim)."""

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias, over the last dimension."""

    eps: float = 1e-5
    bias: bool = True
    gain: bool = True

    def build(self, dim: int) -> nn.Module:
        """torch's LayerNorm."""
        return nn.LayerNorm(dim, eps=self.eps, elementwise_affine=self.gain, bias=self.bias)


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * gain, over the last dimension, computed in float32 for half precision inputs.

    Re-centering is dropped from LayerNorm; invariance to the scale of x is kept.

    Attributes:
        eps: added to the mean square, inside the root.
        offset: Gemma's form: multiply by (1 + gain), the gain starting at 0, before casting back.
        fraction: pRMSNorm: the mean square is that of the first ceil(fraction * dim) elements (Section 3).
    """

    eps: float = 1e-6
    offset: bool = False
    fraction: float = 1.0

    def validate(self) -> None:
        """Check the fraction."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RMSNorm.fraction must be in (0, 1], got {self.fraction}")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return RootMeanSquareNorm(dim, self)


class RootMeanSquareNorm(nn.Module):
    """The module of `RMSNorm`; `weight` is the gain (or, with `offset`, the gain minus 1)."""

    def __init__(self, dim: int, spec: RMSNorm) -> None:
        super().__init__()
        self.dim, self.eps, self.offset = dim, spec.eps, spec.offset
        self.used = math.ceil(dim * spec.fraction)
        self.weight = nn.Parameter(torch.zeros(dim) if spec.offset else torch.ones(dim))

    def extra_repr(self) -> str:
        """Describe the norm in `print(model)`."""
        part = f", first {self.used} of the elements" if self.used < self.dim else ""
        return f"{self.dim}, eps={self.eps}{', gain 1 + weight' if self.offset else ''}{part}"

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Normalize the last dimension."""
        if self.used < self.dim:
            wide = x.double() if x.dtype == torch.float64 else x.float()
            normal = wide * torch.rsqrt(wide[..., : self.used].square().mean(-1, keepdim=True) + self.eps)
            return (normal * (1 + self.weight) if self.offset else normal * self.weight).type_as(x)
        if self.offset:
            if x.dtype in (torch.float32, torch.float64):
                return F.rms_norm(x, (self.dim,), 1 + self.weight, self.eps)
            return F.rms_norm(x.float(), (self.dim,), 1 + self.weight.float(), self.eps).type_as(x)
        if x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            if x.device.type == "cpu":  # torch has no fused kernel there, and its composition is the slower one
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
            return F.rms_norm(x, (self.dim,), self.weight, self.eps)
        # LLaMA's order: normalize in float32, cast back, then multiply by the gain.
        return F.rms_norm(x.float(), (self.dim,), None, self.eps).type_as(x) * self.weight.to(x.dtype)
