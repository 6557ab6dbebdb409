"""Linear layers trained with weights of -1, 0 and 1: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.nn.linear_kind import LinearKind

SMALLEST = 1e-5  # what scales are clamped at, as in the reference


@dataclass(frozen=True, kw_only=True)
class BitLinear(LinearKind):
    """y = Q8(norm(x)) W~^T, W~ = RoundClip(W / mean|W|, -1, 1) * mean|W|; gradients pass straight through both.

    Weights in full precision are what is trained; only their ternary form is multiplied by. Inputs are rounded to
    eight bits a token, by its largest magnitude.

    Attributes:
        norm: an RMSNorm without gain before the rounding, in every layer (BitNet, MatMul-free LM), or none, where the
            block's own norm does.
        eps: of that norm.
        straight_through: whether gradients pass; without, nothing can be learned (a control).
    """

    norm: bool = True
    eps: float = 1e-8
    straight_through: bool = True

    def convert(self, linear: nn.Linear) -> nn.Module:
        """The module, with the weights of `linear`."""
        return TernaryLinear(linear, self)


def ternary(weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out in"], Float[Tensor, ""]]:
    """(signs in {-1, 0, 1}, scale): round(W / scale) clipped, scale = mean |W|, at least 1e-5."""
    scale = weight.abs().mean().clamp(min=SMALLEST)
    return (weight / scale).round().clamp(-1, 1), scale


def eight_bits(x: Float[Tensor, "... dim"]) -> tuple[Float[Tensor, "... dim"], Float[Tensor, "... one"]]:
    """(integers from -128 to 127, step): round(x / step), step = the token's largest magnitude / 127."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / 127
    return (x / step).round().clamp(-128, 127), step


class _IntegerProduct(torch.autograd.Function):
    """(x^ W~^T) * step * scale with integers x^, W~; backwards as if nothing had been rounded but the other factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (integers, step), (signs, scale) = eight_bits(x), ternary(weight)
        ctx.save_for_backward(integers, step, signs, scale)
        return F.linear(integers, signs.to(integers.dtype)).mul_(step).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, Tensor]:
        integers, step, signs, scale = ctx.saved_tensors
        gradient = above[0].to(signs.dtype)  # which autocast may have made narrower
        to_weight = (gradient * step).flatten(0, -2).t() @ integers.to(signs.dtype).flatten(0, -2)
        return (gradient @ signs).mul_(scale).to(integers.dtype), to_weight


class TernaryLinear(nn.Module):
    """The module of `BitLinear`; `weight` is the one in full precision."""

    def __init__(self, linear: nn.Linear, spec: BitLinear) -> None:
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        for mark in ("writes_residual",):
            if hasattr(linear, mark):
                setattr(self, mark, getattr(linear, mark))

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, ternary, bias={self.bias is not None}"

    @property
    def input_norm(self) -> float | None:
        """The eps of the norm that inputs pass before they are rounded, or None: what takes its place needs it too."""
        return self.spec.eps if self.spec.norm else None

    @torch.no_grad()
    def decoded_weight(self) -> Float[Tensor, "out_features in_features"]:
        """The ternary weight, which is what inputs are multiplied by."""
        signs, scale = ternary(self.weight)
        return signs * scale

    @torch.no_grad()
    def encode_weight(self, weight: Float[Tensor, "out_features in_features"]) -> None:
        """Train on from another weight in full precision; its ternary form is multiplied by from now on."""
        self.weight.copy_(weight)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Multiply by the ternary weight."""
        if self.spec.norm:
            x = F.rms_norm(x, (self.in_features,), None, self.spec.eps)
        if self.spec.straight_through:
            product: Tensor = _IntegerProduct.apply(x, self.weight)  # type: ignore[no-untyped-call]
            return product if self.bias is None else product + self.bias
        (signs, scale), (integers, step) = ternary(self.weight), eight_bits(x)
        return F.linear(integers * step, signs * scale, self.bias)

    @torch.no_grad()
    def accumulated(self, x: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows out_features"]:
        """The same by additions and subtractions of integers alone, and one multiplication at the end."""
        if self.spec.norm:
            x = F.rms_norm(x, (self.in_features,), None, self.spec.eps)
        signs, scale = ternary(self.weight)
        integers, step = eight_bits(x)
        counted = integers.long()
        added = torch.stack([counted[:, row > 0].sum(1) - counted[:, row < 0].sum(1) for row in signs], 1)
        out = added.to(x.dtype) * step * scale
        return out if self.bias is None else out + self.bias


_POWERS = (81, 27, 9, 3, 1)  # five ternary digits a byte: 3^5 = 243


def pack(signs: Int8[Tensor, "out in"]) -> UInt8[Tensor, "out bytes"]:
    """Five ternary digits a byte, row by row: 1.6 bits a weight, padded with zeros.

    Raises ValueError where a value is not -1, 0 or 1.
    """
    if not bool(((signs >= -1) & (signs <= 1) & (signs == signs.round())).all()):
        raise ValueError(f"only -1, 0 and 1 can be packed, got values from {signs.min()} to {signs.max()}")
    digits = F.pad(signs.to(torch.int16) + 1, (0, -signs.shape[1] % 5), value=1).unflatten(1, (-1, 5))
    out: UInt8[Tensor, "out bytes"] = (
        (digits * torch.tensor(_POWERS, dtype=torch.int16, device=signs.device)).sum(-1).to(torch.uint8)
    )
    return out


def unpack(packed: UInt8[Tensor, "out bytes"], columns: int) -> Int8[Tensor, "out in"]:
    """What `pack` packed. Raises ValueError for bytes above 242, or too few of them."""
    if packed.shape[1] != -(-columns // 5):
        raise ValueError(f"{columns} columns take {-(-columns // 5)} bytes a row, got {packed.shape[1]}")
    if packed.numel() and int(packed.max()) > 242:
        raise ValueError(f"a byte of five ternary digits is at most 242, got {int(packed.max())}")
    digits = packed[..., None].to(torch.int16) // torch.tensor(_POWERS, dtype=torch.int16, device=packed.device) % 3
    return (digits - 1).flatten(1)[:, :columns].to(torch.int8)
