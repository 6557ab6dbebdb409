"""A linear layer whose weight is stored in a format and decoded when it is used."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.compress.format import WeightFormat


class CompressedLinear(nn.Module):
    """y = x decode(stored)^T + bias; the weight is decoded in the forward and in the backward pass, never kept."""

    def __init__(self, format: WeightFormat, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.format = format
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = weight.dtype
        for name, tensor in format.encode(weight).items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_stored(cls, format: WeightFormat, stored: dict[str, Tensor], like: nn.Linear) -> "CompressedLinear":
        """Return a layer that holds tensors encoded before, with the shape, dtype and bias of `like`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.format = format
        layer.out_features, layer.in_features = like.out_features, like.in_features
        layer.compute_dtype = like.weight.dtype
        for name, tensor in stored.items():
            layer.register_buffer(name, tensor)
        layer.bias = None if like.bias is None else nn.Parameter(like.bias.detach().clone(), requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.format}"

    @property
    def stored(self) -> dict[str, Tensor]:
        """The tensors of the format."""
        return dict(self.named_buffers(recurse=False))

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @torch.no_grad()
    def decoded_weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return the dense weight, in the dtype the layer had before it was compressed."""
        return self.format.decode(self.stored, self.shape).to(self.compute_dtype)

    @torch.no_grad()
    def encode_weight(self, weight: Float[Tensor, "out_features in_features"]) -> None:
        """Store another weight of the same shape."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the layer holds a weight of shape {self.shape}, got {tuple(weight.shape)}")
        for name, tensor in self.format.encode(weight).items():
            self.register_buffer(name, tensor)

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Multiply by the decoded weight."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            out = _DecodedProduct.apply(x, self)
            return out if bias is None else out + bias
        return F.linear(x, self.decoded_weight().to(x.dtype), bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "CompressedLinear":
        """Move with `.to(device)`, but keep the stored numbers as they are under `.to(dtype)`: the format owns them."""
        kept = {name: (buffer, buffer.dtype) for name, buffer in self.stored.items()}
        super()._apply(fn, recurse)
        for name, (before, dtype) in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != dtype:
                self._buffers[name] = before.to(after.device)
        probe = fn(torch.zeros((), dtype=self.compute_dtype))
        self.compute_dtype = probe.dtype
        return self


class _DecodedProduct(torch.autograd.Function):
    """x W^T, keeping for the backward pass the layer and not the dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CompressedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.decoded_weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.decoded_weight().to(gradient.dtype), None
