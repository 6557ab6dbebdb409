"""(IA)^3: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.adapt.contract import Adapter, Delta
from paperworks.adapt.layer_info import LayerInfo
from paperworks.core.selection import matching


@dataclass(frozen=True, kw_only=True)
class IA3(Adapter):
    """y = l * (W0 x + b), or W0 (l * x) + b where a feed-forward part leads back; l is one at first.

    The paper rescales keys, values and the inner activations of feed-forward parts: targets such as
    `"*.{key,value,down}"`.

    Attributes:
        feedforward: patterns of layers whose inputs are rescaled rather than their outputs.
    """

    feedforward: tuple[str, ...] = (
        "*.down",
        "*.{down_proj,fc2,dense_4h_to_h,wo,lin2}",  # Llama and its relatives, OPT, BLOOM and GPT-NeoX, T5, DistilBERT
        "*.mlp.c_proj",  # GPT-2
    )

    def build(self, layer: LayerInfo) -> Delta:
        """A fresh delta for one layer, which changes nothing yet."""
        inputs = any(matching(pattern, (layer.path, f".{layer.path}")) for pattern in self.feedforward)
        return RescalingDelta(layer, inputs)

    def to_peft(self) -> dict[str, Any]:
        """The fields of peft's configuration."""
        return {"peft_type": "IA3", "init_ia3_weights": True}


class RescalingDelta(Delta):
    """(l - 1) * base output, or the base's product with (l - 1) * x."""

    def __init__(self, layer: LayerInfo, inputs: bool) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs
        self.scale = nn.Parameter(
            torch.ones(layer.in_features if inputs else layer.out_features, dtype=layer.trained_dtype)
        )

    def extra_repr(self) -> str:
        """Describe the delta in `print(model)`."""
        return "of the inputs" if self.inputs else "of the outputs"

    def change(
        self, x: Float[Tensor, "... in_features"], base_output: Float[Tensor, "... out_features"]
    ) -> Float[Tensor, "... out_features"]:
        """The change of the output, in the adapter's own dtype."""
        change = self.scale - 1
        if self.inputs:
            return self.layer.multiply(x.to(change.dtype) * change)
        return base_output.to(change.dtype) * change

    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The columns of the base's weight, or its rows, times l - 1."""
        change = self.scale - 1
        return self.layer.weight().to(change) * (change if self.inputs else change[:, None])

    def bias(self) -> Float[Tensor, " out_features"] | None:
        """The bias times l - 1 where outputs are rescaled."""
        held = self.layer.bias()
        return None if self.inputs or held is None else (self.scale - 1) * held.detach()

    def to_peft(self) -> dict[str, Tensor]:
        """l as (1, in) or (out, 1)."""
        return {"ia3_l": self.scale[None] if self.inputs else self.scale[:, None]}

    def read_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Take l from (1, in) or (out, 1)."""
        wanted = self.to_peft()["ia3_l"].shape
        if set(tensors) != {"ia3_l"} or tensors["ia3_l"].shape != wanted:
            found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise ValueError(f"the file has {found}, the layer needs ia3_l {tuple(wanted)}")
        self.scale = nn.Parameter(tensors["ia3_l"].flatten().clone())
