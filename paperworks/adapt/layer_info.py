"""What an adapter may know of the layer it is built for."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.core.linear import Kind, bias_of, features, linear_kind, weight_of


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """A layer: its place and sizes, and its weight for methods that read it.

    Attributes:
        path: where it stands in the model.
        in_features, out_features: its sizes; of an embedding, the size of the vocabulary and the dimension.
        dtype, device: of the base's weight.
        kind: what it is called with (see `core.linear.register_linear`).
        experts: matrices in a stacked expert parameter; 0 for layers.
        source: the layer; None for a description alone, whose `weight` has a shape and no values.
    """

    in_features: int
    out_features: int
    path: str = "the layer"
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    kind: Kind = "linear"
    experts: int = 0
    source: nn.Module | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, module: nn.Module, path: str = "the layer") -> Self:
        """The description of a linear-like module, plain, compressed or adapted; nothing is decoded."""
        kind = linear_kind(module)
        if kind is None:
            raise ValueError(f"{path}, a {type(module).__name__}, is not linear-like")
        inputs, outputs = features(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        return cls(
            path=path,
            in_features=inputs,
            out_features=outputs,
            dtype=weight.dtype,
            device=weight.device,
            kind=kind,
            source=module,
        )

    def described(self) -> Self:
        """The same without values: building for it costs no memory, on torch's meta device."""
        return replace(self, source=None, device=torch.device("meta"))

    @property
    def trained_dtype(self) -> torch.dtype:
        """What an adapter computes in unless told otherwise: float32, or float64 over a float64 base."""
        return torch.promote_types(self.dtype, torch.float32)

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The base's weight without any adapter, decoded now; a view of the parameter where it is plain."""
        if self.source is None:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        whole = getattr(self.source, "original_weight", None)
        return whole() if callable(whole) else weight_of(self.source).detach()

    def bias(self) -> Tensor | None:
        """The base's bias."""
        return None if self.source is None else bias_of(getattr(self.source, "base", self.source))

    def multiply(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """The base's product with other inputs, without bias; gradients reach `x` only."""
        return F.linear(x, self.weight().to(x.dtype))
