"""JumpReLU autoencoders: a learned threshold a latent, and a count as the penalty (Rajamanoharan et al. 2024).

arXiv:2407.14435. Both have no gradient almost everywhere; it is estimated from the inputs near the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paperworks.interpret.sae.autoencoder import (
    Metrics,
    PenalizedSpec,
    SparseAutoencoder,
    squared_error,
)


@dataclass(frozen=True, kw_only=True)
class JumpReLU(PenalizedSpec):
    """f = pre * 1[pre > theta], pre = ReLU(W_e x + b_e), x' = W_d f + b_d; loss = mean ||x - x'||^2 + penalty * L0.

    theta = exp(log_threshold) a latent, L0 the mean number of latents that are on. The paper's activations have a mean
    ||x||^2 of 1; threshold and bandwidth are in units of the activations and must fit them.

    penalty: weight of the number of latents that are on.
    threshold: where theta starts. bandwidth: width of the window around theta in which inputs move it.
        0.001 both in the paper, for long training; log theta cannot travel far in a short one, which needs some 0.1.
    warmup: share of the steps over which the penalty rises from 0.
    Train with Adam's beta1 at 0, as its authors do.
    """

    threshold: float = 0.001
    bandwidth: float = 0.001

    def validate(self) -> None:
        """Check the numbers."""
        super().validate()
        for name in ("threshold", "bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"JumpReLU.{name} must be positive and finite, got {getattr(self, name)}")

    def build(self, dim: int) -> JumpReLUAutoencoder:
        """An untrained autoencoder."""
        return JumpReLUAutoencoder(self, dim)


class JumpReLUAutoencoder(SparseAutoencoder):
    """See `JumpReLU`."""

    spec: JumpReLU

    def __init__(self, spec: JumpReLU, dim: int) -> None:
        super().__init__(spec, dim)
        self.encoder_bias = nn.Parameter(torch.zeros(spec.latents))
        self.log_threshold = nn.Parameter(torch.full((spec.latents,), math.log(spec.threshold)))

    def _offsets(self) -> list[str]:
        return [*super()._offsets(), "encoder_bias"]

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Make the autoencoder of x one of factor * x, thresholds included."""
        super().rescale(factor)
        self.log_threshold.add_(math.log(factor))

    @property
    def threshold(self) -> Float[Tensor, " latents"]:
        """theta, positive."""
        return self.log_threshold.exp()

    def _before(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.check(x), self.encoder, self.encoder_bias).relu()

    def encode(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch latents"]:
        """The pre-activations above their thresholds, unchanged, and 0 for the others."""
        return jump_relu(self._before(x), self.threshold, self.spec.bandwidth)

    def loss(self, x: Float[Tensor, "batch dim"], progress: float) -> tuple[Float[Tensor, ""], Metrics]:
        """Mean ||x - x'||^2 + penalty * mean number of latents on; see `JumpReLU`."""
        before, threshold = self._before(x), self.threshold
        latents = jump_relu(before, threshold, self.spec.bandwidth)
        self.see(latents)
        error = squared_error(x, latents @ self.trained_decoder() + self.decoder_bias)
        count = step(before, threshold, self.spec.bandwidth).sum(dim=-1).mean()
        penalty = self.spec.weight(progress)
        return error + penalty * count, {"error": error.detach(), "l0": count.detach()}


def jump_relu(
    before: Float[Tensor, "*batch latents"], threshold: Float[Tensor, " latents"], bandwidth: float
) -> Float[Tensor, "*batch latents"]:
    """z = before where it is above the threshold, else 0.

    dz/dbefore = 1[before > theta]; dz/dtheta is estimated as -(theta / bandwidth) 1[|before - theta| < bandwidth / 2].
    """
    jumped: Tensor = _JumpReLU.apply(before, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return jumped


def step(
    before: Float[Tensor, "*batch latents"], threshold: Float[Tensor, " latents"], bandwidth: float
) -> Float[Tensor, "*batch latents"]:
    """1 where `before` is above the threshold, else 0.

    d/dbefore = 0, so what counts latents moves thresholds only; d/dtheta is estimated as
    -(1 / bandwidth) 1[|before - theta| < bandwidth / 2].
    """
    stepped: Tensor = _Step.apply(before, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return stepped


def _near(before: Tensor, threshold: Tensor, bandwidth: float, above: Tensor) -> Tensor:
    """The sum over inputs of the gradient from above where an input is in the threshold's window."""
    window = (before - threshold).abs() < bandwidth / 2
    return torch.where(window, above, 0).flatten(0, -2).sum(dim=0)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(before, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(before > threshold, before, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, Tensor, None]:
        before, threshold = ctx.saved_tensors
        near = _near(before, threshold, ctx.bandwidth, above[0])
        return torch.where(before > threshold, above[0], 0), near * threshold / -ctx.bandwidth, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(before, threshold)
        ctx.bandwidth = bandwidth
        return (before > threshold).to(before.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[None, Tensor, None]:
        before, threshold = ctx.saved_tensors
        return None, _near(before, threshold, ctx.bandwidth, above[0]) / -ctx.bandwidth, None
