"""Eight-bit floating point, E4M3 and E5M2, for weights and activations (Micikevicius et al. 2022, arXiv:2209.05433)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from paperworks.compress.format import Stored, WeightFormat, check_weight

Kind = Literal["e4m3", "e5m2"]
DTYPES: dict[Kind, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST: dict[Kind, float] = {"e4m3": 448.0, "e5m2": 57344.0}  # Table 1
_MANTISSA: dict[Kind, int] = {"e4m3": 3, "e5m2": 2}
_LOWEST_EXPONENT: dict[Kind, int] = {"e4m3": -6, "e5m2": -14}  # of normal numbers


@dataclass(frozen=True, kw_only=True)
class FP8(WeightFormat):
    """x8 = cast(x / scale), scale = max|x| / largest number of the format; y = (x8 W8^T) times both scales.

    The product of two such numbers is exact in float32, in which they are added up.

    Attributes:
        kind: "e4m3" (the paper's choice for weights and activations) or "e5m2" (more range, for gradients).
        weights: one scale a "row" (output feature) or one for the whole "tensor".
        activations: one scale a "token" or for the "tensor" of a call, found at run time; None leaves inputs alone.
    """

    kind: Kind = "e4m3"
    weights: Literal["row", "tensor"] = "row"
    activations: Literal["token", "tensor"] | None = "token"

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: object | None = None) -> Stored:
        """float8 codes and float32 scales."""
        check_weight(weight, type(self).__name__)
        codes, scale = to_fp8(weight.detach(), self.kind, per_row=self.weights == "row")
        return {"codes": codes, "scales": scale.flatten()}

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Code * scale."""
        return stored["codes"].float() * stored["scales"][:, None]

    def multiply(
        self, x: Float[Tensor, "... columns"], stored: Stored, shape: tuple[int, int]
    ) -> Float[Tensor, "... rows"]:
        """Round the inputs to float8 as well, unless told not to."""
        if self.activations is None:
            return super().multiply(x, stored, shape)
        codes, scale = to_fp8(x.reshape(-1, shape[1]), self.kind, per_row=self.activations == "token")
        out = F.linear(codes.float(), stored["codes"].float()) * scale * stored["scales"]
        return out.to(x.dtype).view(*x.shape[:-1], shape[0])


def to_fp8(
    x: Float[Tensor, "rows columns"], kind: Kind = "e4m3", per_row: bool = True
) -> tuple[Tensor, Float[Tensor, "rows|1 1"]]:
    """(float8 codes, scale) with x near codes * scale; a scale a row, or one in all."""
    x = x.float()
    top = x.abs().amax(1, keepdim=True) if per_row else x.abs().amax().view(1, 1)
    scale = torch.where(top > 0, (top / LARGEST[kind]).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return cast(x / scale, kind), scale


def cast(x: Float[Tensor, "..."], kind: Kind = "e4m3") -> Tensor:
    """Round to float8, clamped first: what the cast does beyond the largest number differs by version of torch."""
    return x.clamp(-LARGEST[kind], LARGEST[kind]).to(DTYPES[kind])


def round_in_software(x: Float[Tensor, "..."], kind: Kind = "e4m3") -> Float[Tensor, "..."]:
    """Round to the numbers of the format by arithmetic, halves to even: for machines that lack the type.

    Equal to `cast` bit by bit, also on subnormal numbers. NaN stays NaN.
    """
    x = x.float().clamp(-LARGEST[kind], LARGEST[kind])
    _, exponent = torch.frexp(x)  # x = m 2^exponent with 0.5 <= |m| < 1: the leading bit stands at exponent - 1
    leading = (exponent - 1).clamp(min=_LOWEST_EXPONENT[kind])
    step = torch.ldexp(torch.ones_like(x), leading - _MANTISSA[kind])
    return torch.copysign(torch.round(x / step) * step, x)
