"""A short convolution along time: neighbours say what each token is part of (Wang et al. 2019, arXiv:1909.03341)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks.nn.mixer import Mixer
from paperworks.nn.placement import Placement
from paperworks.nn.recurrent.recurrence import CausalConvolution, StateCache, state_of


@dataclass(frozen=True, kw_only=True)
class ShortConvolution(Mixer):
    """y_t = bias + sum_j weight_j x_{t + j}, channel by channel (depth-wise), over `kernel` tokens of one segment.

    As the mixer of a first block without a feed-forward part it contextualizes embeddings: tokens that are parts of
    characters see the other parts before any attention does.

    Attributes:
        kernel: tokens seen.
        causal: whether they are the last ones, the present one included; otherwise it stands in their middle, for
            encoders, and `kernel` is odd.
    """

    kernel: int = 3
    causal: bool = True

    def validate(self) -> None:
        """Check the width."""
        if self.kernel < 1:
            raise ValueError(f"ShortConvolution.kernel must be at least 1, got {self.kernel}")
        if not self.causal and self.kernel % 2 == 0:
            raise ValueError(f"ShortConvolution.kernel must be odd to have a middle, got {self.kernel}")

    def build(self, dim: int) -> nn.Module:
        """The module for vectors of `dim` numbers."""
        return ShortConvolutionModule(dim, self)


class ShortConvolutionModule(nn.Module):
    """The module of `ShortConvolution`."""

    def __init__(self, dim: int, spec: ShortConvolution) -> None:
        super().__init__()
        self.spec = spec
        self.convolution = CausalConvolution(dim, spec.kernel)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """The window before the first token. Raises ValueError where tokens see those after them."""
        if not self.spec.causal:
            raise ValueError("ShortConvolution(causal=False) sees the tokens after, so it cannot decode: causal=True")
        return StateCache(window=self.convolution.new_window(batch, dtype, device))

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Mix the tokens of x along time."""
        if not self.spec.causal:
            return self._both_ways(x, placement.segments)
        cache = state_of(placement)
        out: Tensor
        out, window = self.convolution(x, None if cache is None else cache["window"], placement.begins())
        if cache is not None:
            cache["window"] = window
        return out

    def _both_ways(self, x: Tensor, segments: Int[Tensor, "batch time"] | None) -> Tensor:
        weight, bias, reach = self.convolution.weight, self.convolution.bias, self.spec.kernel // 2
        if segments is None:
            return functional.conv1d(x.transpose(1, 2), weight, bias, padding=reach, groups=x.shape[-1]).transpose(1, 2)
        time, out = x.shape[1], torch.zeros_like(x)
        padded = functional.pad(x, (0, 0, reach, reach))
        around = functional.pad(segments, (reach, reach), value=-1)
        for place in range(self.spec.kernel):
            same = around[:, place : place + time] == segments
            out = out + padded[:, place : place + time] * same[..., None] * weight[:, 0, place]
        return out if bias is None else out + bias
