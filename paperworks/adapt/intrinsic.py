"""Training in a random subspace: DID (Li et al. 2018, arXiv:1804.08838) and SAID (Aghajanyan et al. 2020).

Aghajanyan, Zettlemoyer, Gupta 2020, arXiv:2012.13255, give each layer a weight of its own. The projection is Fastfood
(Le, Sarlos, Smola 2013), which is never written down as a matrix.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.adapt.contract import Adapter, Delta
from paperworks.adapt.layer_info import LayerInfo
from paperworks.kernels.hadamard import transform


@dataclass(frozen=True, kw_only=True)
class DID(Adapter):
    """W_i = W0_i + P_i theta: one trained vector for all layers, and a fixed random projection for each.

    Attributes:
        dimension: d of the paper, the number of trained parameters of all layers together.
        seed: what the projections are drawn from.
    """

    dimension: int = 1000
    seed: int = 0

    def validate(self) -> None:
        """Check the dimension."""
        if self.dimension < 1:
            raise ValueError(f"{type(self).__name__}.dimension must be at least 1, got {self.dimension}")

    def build(self, layer: LayerInfo) -> Delta:
        """A delta for a layer that shares its vector with no other."""
        return self.build_all({layer.path: layer})[layer.path]

    def build_all(self, layers: Mapping[str, LayerInfo]) -> dict[str, Delta]:
        """Deltas that share one vector. Raises `ValueError` if the dimension is too small for them."""
        for layer in layers.values():
            self.require_kind(layer)
        theta = nn.Parameter(torch.zeros(self._shared(len(layers))))
        draws = torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (len(layers),), generator=draws, device="cpu").tolist()
        return {
            path: FastfoodDelta(layer, theta, seed, self._scale())
            for (path, layer), seed in zip(layers.items(), seeds, strict=True)
        }

    def _shared(self, layers: int) -> int:
        """How many of the trained parameters all layers share."""
        return self.dimension

    def _scale(self) -> nn.Parameter | None:
        return None


@dataclass(frozen=True, kw_only=True)
class SAID(DID):
    """W_i = W0_i + lambda_i P_i theta: structure-aware, the m scalars of the m layers are trained and counted in d."""

    def _shared(self, layers: int) -> int:
        if self.dimension <= layers:
            raise ValueError(
                f"SAID.dimension {self.dimension} leaves nothing to share: {layers} layers take a scalar each; "
                f"choose at least {layers + 1}, or fewer targets"
            )
        return self.dimension - layers

    def _scale(self) -> nn.Parameter | None:
        return nn.Parameter(torch.ones(()))  # theta starts at zero: were this zero too, neither had a gradient


class FastfoodDelta(Delta):
    """scale * P theta, as a matrix; P is drawn from a seed when it is first used, which alone is stored."""

    seed: Tensor
    scale: nn.Parameter | None

    def __init__(self, layer: LayerInfo, theta: nn.Parameter, seed: int, scale: nn.Parameter | None) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.theta = theta
        self.register_parameter("scale", scale)
        self.register_buffer("seed", torch.tensor(seed))
        self._drawn: tuple[Any, Fastfood] | None = None

    def extra_repr(self) -> str:
        """Describe the delta in `print(model)`."""
        return f"dimension={len(self.theta)}, {self.in_features} -> {self.out_features}"

    @property
    def projection(self) -> "Fastfood":
        """P, drawn anew where the seed has changed or moved to another device."""
        key = (self.seed.device, self.seed.data_ptr(), self.seed._version)
        if self._drawn is None or self._drawn[0] != key:
            size = self.in_features * self.out_features
            self._drawn = key, Fastfood.draw(len(self.theta), size, int(self.seed), self.seed.device)
        return self._drawn[1]

    def redraw(self, seed: int) -> None:
        """Take another projection."""
        self.seed.fill_(seed)

    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """Scale * P theta."""
        change = self.projection(self.theta).view(self.out_features, self.in_features)
        return change if self.scale is None else self.scale * change

    def change(
        self, x: Float[Tensor, "... in_features"], base_output: Float[Tensor, "... out_features"]
    ) -> Float[Tensor, "... out_features"]:
        """x times the change of the weight."""
        return F.linear(x.to(self.theta.dtype), self.weight().to(x.device))


@dataclass(frozen=True)
class Fastfood:
    """P theta = first D entries of H G Pi H B theta sqrt(L^2 / (sum(G^2) D)), with theta filled up to L = 2^k >= D.

    H is the orthogonal Walsh-Hadamard matrix (see `nn.hadamard`), B random signs, Pi a permutation, G normal. The
    columns of P have norms near 1. It takes O(L log L) time; kept are 8 bytes for each of the L and one for each sign.
    Where theta is longer than L only its first L entries are used.
    """

    signs: Float[Tensor, " used"]
    order: Tensor  # (L,) int32
    gauss: Float[Tensor, " L"]
    size: int
    factor: float

    @classmethod
    def draw(cls, dimension: int, size: int, seed: int, device: torch.device | str = "cpu") -> "Fastfood":
        """Draw a projection from `dimension` to `size` numbers; the same on every device."""
        length = 1 << max(0, (size - 1).bit_length())
        draws = torch.Generator().manual_seed(seed)
        gauss = torch.randn(length, generator=draws, device="cpu")
        order = torch.randperm(length, generator=draws, device="cpu").int()
        signs = (2 * torch.randint(2, (length,), generator=draws, device="cpu") - 1).to(torch.int8)
        # sqrt(L / sum G^2) makes the columns of all L rows unit vectors, sqrt(L / D) those of the first D
        factor = length / math.sqrt(gauss.double().square().sum().item() * size)
        used = signs[: min(dimension, length)].clone()
        return cls(used.to(device), order.to(device), gauss.to(device), size, factor)

    def __call__(self, theta: Float[Tensor, " dimension"]) -> Float[Tensor, " size"]:
        """P theta; differentiable."""
        theta = theta.to(self.gauss.device)
        x = theta[: len(self.signs)] * self.signs
        x = transform(F.pad(x, (0, len(self.gauss) - len(x))))
        x = transform(x.index_select(0, self.order) * self.gauss.to(x.dtype))
        return x[: self.size] * self.factor
