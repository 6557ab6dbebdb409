"""A linear layer whose weight is stored in a format and decoded when it is used."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.error import LayerError
from paperworks.compress.format import Stored, WeightFormat
from paperworks.core.linear import LazyWeight


class CompressedLinear(nn.Module):
    """y = x decode(stored)^T + bias; the weight is decoded in the forward and in the backward pass, never kept.

    The stored tensors are buffers under the format's names. Where one of them requires a gradient (a codebook being
    tuned), the product is differentiated through `decode` as well.
    """

    def __init__(
        self,
        format: WeightFormat,
        weight: Tensor,
        bias: Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__()
        self._hold(format, format.encode(weight, statistics), (weight.shape[0], weight.shape[1]), weight.dtype, bias)

    @classmethod
    def from_stored(
        cls,
        format: WeightFormat,
        stored: Stored,
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        bias: Tensor | None = None,
    ) -> "CompressedLinear":
        """A layer that holds tensors encoded before; `dtype` is what it decodes to."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(format, stored, shape, dtype, bias)
        return layer

    def _hold(
        self, format: WeightFormat, stored: Stored, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        self.format = format
        self.error: LayerError | None = None  # noted by compress.apply
        self.out_features, self.in_features = shape
        self.compute_dtype = dtype
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.format}"

    @property
    def stored(self) -> Stored:
        """The tensors of the format."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """What the layer decodes to: the dtype it had before it was compressed."""
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return next(iter(self.stored.values())).device

    @property
    def weight(self) -> LazyWeight:
        """The dense weight, for owners that read it: decoded when something is computed with it, and not kept."""
        trained = any(tensor.requires_grad for tensor in self.stored.values())
        return LazyWeight.of(self.shape, self.dtype, self.device, self._dense, trained)

    def _dense(self) -> Tensor:
        return self.format.decode_as(self.stored, self.shape, self.compute_dtype)

    @torch.no_grad()
    def decoded_weight(self) -> Float[Tensor, "out_features in_features"]:
        """The dense weight, in the dtype the layer had before it was compressed."""
        return self.format.decode_as(self.stored, self.shape, self.compute_dtype)

    @torch.no_grad()
    def encode_weight(self, weight: Float[Tensor, "out_features in_features"]) -> None:
        """Store another weight of the same shape, close to the one held now (see `WeightFormat.reencode`)."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the layer holds a weight of shape {self.shape}, got {tuple(weight.shape)}")
        for name, tensor in self.format.reencode(weight, self.stored).items():
            self.register_buffer(name, tensor)

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Multiply by the stored weight."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        stored, x = self.stored, self.format.prepare(x)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in stored.values()):
            return F.linear(x, self.format.decode_as(stored, self.shape, x.dtype), bias)
        if torch.is_grad_enabled() and x.requires_grad:
            out = _DecodedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            out = self.format.multiply(x, stored, self.shape)
        result: Tensor = out if bias is None else out + bias
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> "CompressedLinear":
        """Move with `.to(device)`, but keep the stored numbers as they are under `.to(dtype)`: the format owns them."""
        kept = {name: (buffer, buffer.dtype) for name, buffer in self.stored.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, (before, dtype) in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != dtype:
                self._buffers[name] = before.to(after.device)
        probe = fn(torch.zeros((), dtype=self.compute_dtype))
        self.compute_dtype = probe.dtype
        return self


class _DecodedProduct(torch.autograd.Function):
    """x W^T, keeping for the backward pass the layer and not the dense weight.

    Where the format rounds activations as well, the gradient passes straight through that rounding.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CompressedLinear) -> Tensor:
        ctx.layer = layer
        return layer.format.multiply(x, layer.stored, layer.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        with torch.no_grad():
            return gradient @ layer.format.decode_as(layer.stored, layer.shape, gradient.dtype), None
