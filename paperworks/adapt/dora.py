"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.adapt.contract import Delta
from paperworks.adapt.layer_info import LayerInfo
from paperworks.adapt.lora import LoRA, LowRankDelta


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """W = m (W0 + s B A) / ||W0 + s B A||, the norm and the trained magnitude m taken for each output.

    m is ||W0|| at first. The norm is a constant in the backward pass (Section 4.3). The paper writes its weight as
    (in, out), so that what it calls columns are rows here and in peft.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "patches")

    def build(self, layer: LayerInfo) -> Delta:
        """A fresh delta for one layer; reads its weight."""
        return WeightDecomposedDelta(layer, self)

    def to_peft(self) -> dict[str, Any]:
        """The fields of peft's configuration."""
        return super().to_peft() | {"use_dora": True}


class WeightDecomposedDelta(LowRankDelta):
    """(m / n - 1) W0 x + (m / n) s B A x, with n = ||W0 + s B A|| for each output."""

    names: ClassVar[dict[str, str]] = LowRankDelta.names | {"lora_magnitude_vector": "magnitude"}

    def __init__(self, layer: LayerInfo, spec: DoRA) -> None:
        super().__init__(layer, spec)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(layer.weight().to(self.down.dtype), dim=1))

    def _factor(self) -> Float[Tensor, " out_features"]:
        """m / n."""
        with torch.no_grad():
            weight = self.layer.weight().to(self.down.dtype) + super().weight()
            norm = torch.linalg.vector_norm(weight, dim=1)
        out: Tensor = self.magnitude / norm
        return out

    def change(
        self, x: Float[Tensor, "... in_features"], base_output: Float[Tensor, "... out_features"]
    ) -> Float[Tensor, "... out_features"]:
        """The change of the output, computed in the adapter's own dtype."""
        x = x.to(self.down.dtype)
        if self.dropout and self.training:  # on the base's product as well, as in peft
            x = F.dropout(x, self.dropout)
            product = self.layer.multiply(x)
        else:
            bias = self.layer.bias()
            product = (base_output if bias is None else base_output - bias).to(x.dtype)
        factor = self._factor()
        return (factor - 1) * product + factor * F.linear(F.linear(x, self.down) * self.scale, self.up)

    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The adapted weight less the base's."""
        factor = self._factor()[:, None]
        return (factor - 1) * self.layer.weight().to(factor) + factor * super().weight()
