"""Eight bits for weights and activations, and SmoothQuant, which divides the difficulty between them.

SmoothQuant: Xiao et al. 2022, arXiv:2211.10438.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.compress.calibration.activations import dynamic_int8, static_int8
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.formats.grids import SMALLEST_SCALE, find_grid
from paperworks.kernels.integer_product import int8_product


@dataclass(frozen=True, kw_only=True)
class W8A8(WeightFormat):
    """y = (int8 x)(int8 W)^T, summed in int32, times both scales. Absmax rounding on both sides.

    Attributes:
        weights: one scale a "row" (output feature) or one for the whole "tensor".
        activations: one scale a "token" or one for the "tensor" of the call, found at run time; or "static", learned
            from the calibration inputs (what exceeds them is clipped).
    """

    weights: Literal["row", "tensor"] = "row"
    activations: Literal["token", "tensor", "static"] = "token"

    # static scales are learned, the others found at run time
    needs: ClassVar[Any] = property(lambda self: ("absolute_max",) if self.activations == "static" else ())

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """int8 codes, float32 scales, and with static activations their one scale."""
        check_weight(weight, type(self).__name__)
        weight = weight.detach().float()
        channel = self.channel_scales(weight, statistics)
        stored = self._rounded(weight if channel is None else weight * channel)
        if channel is not None:
            stored["channel_scales"] = channel
        if self.activations == "static":
            top = self.learned(statistics).required("absolute_max").to(weight.device)
            top = (top if channel is None else top / channel).amax().reshape(1)
            stored["activation_scale"] = torch.where(top > 0, top / 127, 1.0)
        return stored

    def channel_scales(self, weight: Tensor, statistics: Statistics | None) -> Float[Tensor, " columns"] | None:
        """What the inputs are divided by and the weight's columns multiplied with; None for nothing."""
        return None

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """The weight that the unrounded inputs are multiplied by."""
        weight = stored["codes"].float() * stored["scales"][:, None]
        return weight / stored["channel_scales"] if "channel_scales" in stored else weight

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Round to nearest; channel and activation scales stay."""
        check_weight(weight, type(self).__name__)
        kept = {name: stored[name] for name in ("channel_scales", "activation_scale") if name in stored}
        channel = kept.get("channel_scales")
        return self._rounded(weight.detach().float() * (1.0 if channel is None else channel)) | kept

    def multiply(
        self, x: Float[Tensor, "... columns"], stored: Stored, shape: tuple[int, int]
    ) -> Float[Tensor, "... rows"]:
        """Round the inputs to int8 as well, and multiply integers."""
        flat = x.reshape(-1, shape[1]).float()
        if "channel_scales" in stored:
            flat = flat / stored["channel_scales"]
        if "activation_scale" in stored:
            scale = stored["activation_scale"]
            codes = static_int8(flat, scale)
        else:
            codes, scale = dynamic_int8(flat, per_token=self.activations == "token")
        out = int8_product(codes, stored["codes"]).float() * scale * stored["scales"]
        return out.to(x.dtype).view(*x.shape[:-1], shape[0])

    def _rounded(self, weight: Tensor) -> Stored:
        slices = weight if self.weights == "row" else weight.reshape(1, -1)
        grid = find_grid(slices, 8, symmetric=True)
        return {"codes": grid.codes(slices).view(weight.shape).to(torch.int8), "scales": grid.scale.flatten()}


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(W8A8):
    """W8A8 of (x / s)(W diag(s))^T with s_j = max|x_j|^alpha / max_o|W_oj|^(1 - alpha), equation 4.

    The scales are stored with the layer, 32 bits an input, and the inputs divided by them at run time: that takes one
    multiplication an input more than `fold_into_norm` (see `awq`), and works behind anything.

    Attributes:
        alpha: how much of the difficulty moves to the weight; 0.5 shares it equally.
    """

    alpha: float = 0.5

    needs: ClassVar[Any] = ("absolute_max",)

    def validate(self) -> None:
        """Check alpha."""
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuant.alpha must be between 0 and 1, got {self.alpha}")

    def channel_scales(self, weight: Tensor, statistics: Statistics | None) -> Float[Tensor, " columns"]:
        """The scale s of each input."""
        top = self.learned(statistics).required("absolute_max").to(weight.device)
        return smoothing_scales(top, weight.abs().amax(0), self.alpha)


def smoothing_scales(
    inputs: Float[Tensor, " columns"], weights: Float[Tensor, " columns"], alpha: float
) -> Float[Tensor, " columns"]:
    """s_j = inputs_j^alpha / weights_j^(1 - alpha) of the largest magnitudes; at least 1e-5, as in the code.

    For layers that share the norm into which s is folded, `weights` is the largest over all of them.
    """
    scales = inputs.clamp(min=1e-5).pow(alpha) / weights.clamp(min=1e-5).pow(1 - alpha)
    return scales.clamp(min=max(1e-5, SMALLEST_SCALE))
