"""Effort: skip the products that matter least, as many as one likes at run time (Kolinko 2024).

As described at kolinko.github.io/effort: y = W v is a sum of products v_i W_ij. Each input's row of weights is cut into
buckets of neighbouring outputs and sorted by magnitude in each, so that slice r of input i holds the r-th largest
weight of every bucket. Slices are taken whole: those whose typical product |v_i| mean|w| lies above a cutoff, which is
read off one probe |v_i W_ij| an input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.compress.linear import CompressedLinear

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Effort(WeightFormat):
    """The weights sorted in buckets of outputs, and the share of products to compute.

    Decoding gives the weight back exactly (up to `values`); only `multiply` approximates, and not at effort 1. The
    gradient is that of the whole product.

    Attributes:
        effort: share of the products v_i W_ij computed, in (0, 1]; `at_effort(model, share)` sets it for a whole model.
        bucket: neighbouring outputs sorted together, at most 16 (a position takes four bits).
        values: how weights are stored; None keeps their dtype.
    """

    effort: float = 1.0
    bucket: int = 16
    values: Literal["float32", "float16", "bfloat16"] | None = None

    continuous: ClassVar[tuple[str, ...]] = ()

    def validate(self) -> None:
        """Check effort and bucket."""
        if not 0 < self.effort <= 1:
            raise ValueError(f"Effort.effort is a share of the products in (0, 1], got {self.effort}")
        if not 2 <= self.bucket <= 16:
            raise ValueError(f"Effort.bucket must be 2 to 16, got {self.bucket}")

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Slices (bucket, inputs, buckets), positions in their buckets, slice means and probes."""
        check_weight(weight, "Effort")
        rows, columns = weight.shape
        if rows % (2 * self.bucket):
            raise ValueError(
                f"Effort.bucket={self.bucket} needs a multiple of {2 * self.bucket} outputs (two positions a byte), "
                f"the layer has {rows}; choose another bucket"
            )
        by_input = weight.detach().t().reshape(columns, rows // self.bucket, self.bucket)
        order = by_input.abs().argsort(dim=-1, descending=True, stable=True)
        slices = by_input.gather(-1, order).permute(2, 0, 1).contiguous()
        pairs = order.permute(2, 0, 1).to(torch.uint8).unflatten(-1, (-1, 2))
        inputs = torch.arange(columns, device=weight.device)
        return {
            "slices": slices.to(_DTYPES[self.values] if self.values else weight.dtype),
            "positions": (pairs[..., 0] | pairs[..., 1] << 4).contiguous(),
            "means": slices.float().abs().mean(-1),
            "probes": weight.detach()[inputs % rows, inputs].float().abs(),
        }

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Every weight in its place."""
        slices = stored["slices"].float().permute(1, 2, 0)
        sorted_back = torch.zeros_like(slices).scatter_(-1, _positions(stored).permute(1, 2, 0), slices)
        return sorted_back.reshape(shape[1], shape[0]).t().contiguous()

    def chosen(self, v: Float[Tensor, "tokens columns"], stored: Stored) -> Bool[Tensor, "tokens slices columns"]:
        """Which slices each token multiplies."""
        magnitude = v.float().abs()
        probes = (magnitude * stored["probes"]).sort(-1, descending=True).values
        rank = min(int(self.effort * v.shape[-1]), v.shape[-1] - 1)
        return stored["means"] * magnitude[:, None] > probes[:, rank, None, None]

    def multiply(
        self, x: Float[Tensor, "... columns"], stored: Stored, shape: tuple[int, int]
    ) -> Float[Tensor, "... rows"]:
        """x W^T, of which only the chosen slices are computed."""
        if self.effort == 1:
            return super().multiply(x, stored, shape)
        tokens = x.reshape(-1, shape[1])
        chosen = self.chosen(tokens, stored)
        if len(tokens) == 1:
            out = self._one_token(tokens[0].float(), chosen[0], stored, shape[0])[None]
        else:
            out = self._many_tokens(tokens.float(), chosen, stored, shape)
        return out.to(x.dtype).view(*x.shape[:-1], shape[0])

    def _one_token(self, v: Tensor, chosen: Tensor, stored: Stored, rows: int) -> Tensor:
        """Read only the chosen slices: the memory traffic is what effort saves when decoding."""
        rank, inputs = chosen.nonzero(as_tuple=True)
        products = stored["slices"][rank, inputs].float() * v[inputs, None]
        packed = stored["positions"][rank, inputs]
        positions = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
        places = positions + torch.arange(0, rows, self.bucket, device=v.device)
        return torch.zeros(rows, device=v.device).index_add_(0, places.flatten(), products.flatten())

    def _many_tokens(self, x: Tensor, chosen: Tensor, stored: Stored, shape: tuple[int, int]) -> Tensor:
        """The same sums slice by slice, as dense products: for texts, where nothing is saved."""
        out = x.new_zeros(len(x), shape[0])
        positions = _positions(stored)
        for rank in range(self.bucket):
            dense = x.new_zeros(shape[1], shape[0] // self.bucket, self.bucket)
            dense.scatter_(-1, positions[rank, ..., None], stored["slices"][rank].float()[..., None])
            out += (x * chosen[:, rank]) @ dense.view(shape[1], shape[0])
        return out


def _positions(stored: Stored) -> Tensor:
    packed = stored["positions"]
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()


@contextmanager
def at_effort(model: nn.Module, share: float) -> Iterator[nn.Module]:
    """Compute so large a share of the products in every layer stored as `Effort`, inside the block.

    Raises `ValueError` when the model has no such layer, or the share is not in (0, 1].
    """
    layers: dict[CompressedLinear, Any] = {
        layer: layer.format
        for layer in model.modules()
        if isinstance(layer, CompressedLinear) and isinstance(layer.format, Effort)
    }
    if not layers:
        raise ValueError("the model has no layer stored as Effort; make some with compress.apply(model, Effort())")
    changed = {layer: replace(format, effort=share) for layer, format in layers.items()}
    try:
        for layer, format in changed.items():
            layer.format = format
        yield model
    finally:
        for layer, format in layers.items():
            layer.format = format
