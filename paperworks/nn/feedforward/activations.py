"""The Gaussian error linear unit in all its forms (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def gelu(x: Float[Tensor, "*shape"], mean: float = 0.0, std: float = 1.0) -> Float[Tensor, "*shape"]:
    """GELU(x) = x * Phi((x - mean) / std), Phi the normal distribution function (Section 2).

    (0, 1) is the GELU of every model; std -> 0 is x * 1(x > mean), with mean 0 the ReLU. Raises ValueError unless std
    is positive.
    """
    _check_std(std)
    if mean == 0.0 and std == 1.0:
        return F.gelu(x)
    return x * keep_probability(x, mean, std)


def keep_probability(x: Float[Tensor, "*shape"], mean: float = 0.0, std: float = 1.0) -> Float[Tensor, "*shape"]:
    """Phi((x - mean) / std): how likely the stochastic map keeps each input."""
    _check_std(std)
    return 0.5 * torch.erfc((mean - x) * (math.sqrt(0.5) / std))


def stochastic_gelu(
    x: Float[Tensor, "*shape"],
    mean: float = 0.0,
    std: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """x * m with m ~ Bernoulli(Phi((x - mean) / std)): the stochastic 0-I map, whose expectation is `gelu`.

    The mask is a constant in the backward pass, so the gradient is m. Raises ValueError unless std is positive.
    """
    mask = torch.bernoulli(keep_probability(x.detach(), mean, std), generator=generator)
    return x * mask


class GELU(nn.Module):
    """x * Phi((x - mean) / std) as a module, any shape; with `stochastic` the 0-I map while training.

    The stochastic map is an adaptive dropout that replaces the nonlinearity: evaluation takes its expectation.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, *, stochastic: bool = False) -> None:
        super().__init__()
        _check_std(std)
        self.mean, self.std, self.stochastic = mean, std, stochastic

    def extra_repr(self) -> str:
        """Describe the unit in `print(model)`."""
        return f"mean={self.mean}, std={self.std}{', stochastic' if self.stochastic else ''}"

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the unit to each number."""
        if self.stochastic and self.training:
            return stochastic_gelu(x, self.mean, self.std)
        return gelu(x, self.mean, self.std)


def _check_std(std: float) -> None:
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"std must be a positive number (the width of the Gaussian), got {std}")
