"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), with rsLoRA's scaling (Kalajdzievski 2023)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.adapt.contract import Adapter, Delta
from paperworks.adapt.layer_info import LayerInfo


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """W = W0 + (alpha / rank) * up @ down, with down (rank, in) random and up (out, rank) zero at first.

    On an embedding, whose inputs are one-hot vectors, down is zero and up random at first, as in loralib and peft. On a
    stack of experts each has matrices of its own.

    Attributes:
        rank: r of the paper; may exceed what the layer's sizes can use.
        alpha: the scale; None means `rank` (a factor of 1).
        dropout: the share of the delta's input dropped in training.
        rank_stabilized: divide by sqrt(rank) instead of rank (arXiv:2312.03732).
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "patches", "lookup", "stacked")

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def validate(self) -> None:
        """Check rank and dropout."""
        if self.rank < 1:
            raise ValueError(f"{type(self).__name__}.rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{type(self).__name__}.dropout must be in [0, 1), got {self.dropout}")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ValueError(f"{type(self).__name__}.alpha must be finite, got {self.alpha}")

    @property
    def scale(self) -> float:
        """What up @ down is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def build(self, layer: LayerInfo) -> Delta:
        """A fresh delta for one layer, which changes nothing yet."""
        if layer.kind == "stacked":
            if self.dropout:
                raise ValueError("a stack of experts is adapted through its weight: its inputs cannot be dropped")
            return StackedLowRankDelta(layer, self)
        return (EmbeddingDelta if layer.kind == "lookup" else LowRankDelta)(layer, self)

    def to_peft(self) -> dict[str, Any]:
        """The fields of peft's configuration."""
        alpha = self.rank if self.alpha is None else self.alpha
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
            "use_dora": False,
            "init_lora_weights": True,
        }


class LowRankDelta(Delta):
    """scale * up(down(dropout(x)))."""

    names: ClassVar[dict[str, str]] = {"lora_A.weight": "down", "lora_B.weight": "up"}  # in peft's files

    def __init__(self, layer: LayerInfo, spec: LoRA) -> None:
        super().__init__()
        self.layer, self.scale, self.dropout = layer, spec.scale, spec.dropout
        stack = (layer.experts,) if layer.kind == "stacked" else ()
        self.down = nn.Parameter(torch.empty(*stack, spec.rank, layer.in_features, dtype=layer.trained_dtype))
        self.up = nn.Parameter(torch.zeros(*stack, layer.out_features, spec.rank, dtype=layer.trained_dtype))
        self._initialize()

    def _initialize(self) -> None:
        # uniform in +-1/sqrt(in): loralib's choice; the paper draws from a normal distribution
        nn.init.uniform_(self.down, -(self.down.shape[-1] ** -0.5), self.down.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        """Describe the delta in `print(model)`."""
        return f"rank={self.down.shape[-2]}, scale={self.scale:g}"

    def change(
        self, x: Float[Tensor, "... in_features"], base_output: Float[Tensor, "... out_features"]
    ) -> Float[Tensor, "... out_features"]:
        """The low-rank change of the output, computed in the adapter's own dtype."""
        x = F.dropout(x.to(self.down.dtype), self.dropout, self.training)
        return F.linear(F.linear(x, self.down) * self.scale, self.up)

    def weight(self) -> Float[Tensor, "... out_features in_features"]:
        """scale * up @ down."""
        return self.scale * (self.up @ self.down)

    def to_peft(self) -> dict[str, Tensor]:
        """The matrices under peft's names."""
        return {theirs: getattr(self, ours) for theirs, ours in self.names.items()}

    def read_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the matrices under peft's names."""
        wanted = {theirs: getattr(self, ours).shape for theirs, ours in self.names.items()}
        if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
            found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            needed = ", ".join(f"{name} {tuple(shape)}" for name, shape in wanted.items())
            raise ValueError(f"the file has {found}, the layer needs {needed}")
        for theirs, ours in self.names.items():
            setattr(self, ours, nn.Parameter(tensors[theirs].clone()))


class EmbeddingDelta(LowRankDelta):
    """scale * up @ down[:, token]: a change of an embedding table (vocabulary, dim) by its transpose."""

    names: ClassVar[dict[str, str]] = {"lora_embedding_A": "down", "lora_embedding_B": "up"}

    def _initialize(self) -> None:
        nn.init.zeros_(self.down)
        nn.init.normal_(self.up)

    def change(self, x: Int[Tensor, "..."], base_output: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """The change of the embeddings; dropout acts on linear layers only."""
        return F.linear(F.embedding(x, self.down.t()) * self.scale, self.up)


class StackedLowRankDelta(LowRankDelta):
    """A low-rank change for each matrix of a stack (experts, out, in), used through `weight`."""

    def to_peft(self) -> dict[str, Tensor]:
        """A is (experts * rank, in), B is (out, rank * experts) with the expert as the faster index, as in peft."""
        return {"lora_A.weight": self.down.flatten(0, 1), "lora_B.weight": self.up.permute(1, 2, 0).flatten(1)}

    def read_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the matrices under peft's names."""
        wanted = {name: value.shape for name, value in self.to_peft().items()}
        if wanted != {name: value.shape for name, value in tensors.items()}:
            raise ValueError(
                f"the file's matrices do not fit a stack of {self.down.shape[0]} experts: {wanted} is needed"
            )
        self.down = nn.Parameter(tensors["lora_A.weight"].view(self.down.shape).clone())
        flat = tensors["lora_B.weight"].unflatten(1, (-1, self.down.shape[0]))  # (out, rank, experts)
        self.up = nn.Parameter(flat.permute(2, 0, 1).contiguous())
