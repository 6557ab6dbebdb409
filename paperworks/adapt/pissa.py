"""PiSSA: principal singular values and vectors adaptation (Meng et al. 2024, arXiv:2404.02948)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from paperworks.adapt.contract import Delta
from paperworks.adapt.layer_info import LayerInfo
from paperworks.adapt.lora import LoRA, LowRankDelta


@dataclass(frozen=True, kw_only=True)
class PiSSA(LoRA):
    """LoRA that starts from the `rank` largest singular triplets of W0; the base keeps the residual, frozen.

    s up down = U_r S_r V_r^T at first, and the base becomes W0 less that. A base in a weight format stores the residual
    in that format again (the paper's QPiSSA, whose rounding error is smaller, because the residual is).

    Switched off, the model computes with residual + first product: the base up to rounding. `adapt.remove` gives the
    base its own tensors back, bit for bit: they are kept in host memory until the adapter is removed or merged.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def validate(self) -> None:
        """Check that the scale has a square root."""
        super().validate()
        if self.scale <= 0:
            raise ValueError(f"PiSSA.alpha must be positive, got {self.alpha}")

    def build(self, layer: LayerInfo) -> Delta:
        """A delta for one layer; decomposes its weight. Raises `ValueError` if the rank exceeds the layer's."""
        most = min(layer.in_features, layer.out_features)
        if self.rank > most:
            raise ValueError(f"PiSSA.rank {self.rank} exceeds the {most} singular values that the layer has")
        return PrincipalDelta(layer, self)

    def to_peft(self) -> dict[str, Any]:
        """The fields of peft's configuration."""
        return super().to_peft() | {"init_lora_weights": "pissa"}


class PrincipalDelta(LowRankDelta):
    """scale * up(down(x)); `first_down` and `first_up` are what was taken out of the base."""

    first_down: Tensor
    first_up: Tensor

    def __init__(self, layer: LayerInfo, spec: PiSSA) -> None:
        super().__init__(layer, spec)
        u, s, vh = torch.linalg.svd(layer.weight().to(layer.trained_dtype), full_matrices=False)
        root = (s[: spec.rank] / self.scale).sqrt()
        with torch.no_grad():
            self.down.copy_(root[:, None] * vh[: spec.rank])
            self.up.copy_(u[:, : spec.rank] * root)
        self.register_buffer("first_down", self.down.detach().clone())
        self.register_buffer("first_up", self.up.detach().clone())

    def removed(self) -> Float[Tensor, "out_features in_features"]:
        """scale * first_up @ first_down."""
        return self.scale * (self.first_up @ self.first_down)

    def removed_output(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """x times `removed`."""
        return F.linear(F.linear(x.to(self.first_down.dtype), self.first_down) * self.scale, self.first_up)

    def read_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the trained matrices; the residual is found again from the base, as in peft."""
        if self.first_down.is_meta:
            raise ValueError("PiSSA starts from the base's weight, which this layer shares with others in the file")
        super().read_peft(tensors)
