"""Gated autoencoders: one map says which latents are on, another how much (Rajamanoharan et al. 2024, 2404.16014)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.interpret.sae.autoencoder import (
    Metrics,
    PenalizedSpec,
    SparseAutoencoder,
    squared_error,
)
from paperworks.interpret.sae.kinds.annealing import AnnealedPenalty, Annealing


@dataclass(frozen=True, kw_only=True)
class Gated(PenalizedSpec):
    """f = 1[pi > 0] * ReLU(W_mag (x - b_d) + b_mag) with pi = W_gate (x - b_d) + b_gate, W_mag,i = exp(r_i) W_gate,i.

    Loss = mean ||x - x'||^2 + penalty * mean sum_i ReLU(pi)_i + mean ||x - (W_d ReLU(pi) + b_d)||^2, where the last
    term's W_d and b_d are held fixed: it teaches the gate, which the step hides from the first term. Only the gate is
    penalized, so magnitudes do not shrink.

    penalty: weight of the sparsity term; 4 goes with a mean ||x||^2 equal to dim.
    warmup: share of the steps over which the penalty rises from 0.
    annealing: replaces ReLU(pi) by ReLU(pi)^p with p falling from 1 (Karvonen et al. 2024).
    Train with Adam's beta1 at 0, as its authors do.
    """

    annealing: Annealing | None = None

    def build(self, dim: int) -> GatedAutoencoder:
        """An untrained autoencoder."""
        return GatedAutoencoder(self, dim)


class GatedAutoencoder(SparseAutoencoder):
    """See `Gated`. `encoder` is W_gate."""

    spec: Gated

    def __init__(self, spec: Gated, dim: int) -> None:
        super().__init__(spec, dim)
        self.gate_bias = nn.Parameter(torch.zeros(spec.latents))
        self.magnitude_bias = nn.Parameter(torch.zeros(spec.latents))
        self.log_magnitude = nn.Parameter(torch.zeros(spec.latents))
        self.annealed = AnnealedPenalty(spec.annealing) if spec.annealing is not None else None

    def _offsets(self) -> list[str]:
        return [*super()._offsets(), "gate_bias", "magnitude_bias"]

    def latent_biases(self) -> list[str]:
        """Name the parameters with one number a latent that start at 0."""
        return [*super().latent_biases(), "log_magnitude"]

    def _shift(self, products: Tensor) -> None:
        self.gate_bias.add_(products)
        self.magnitude_bias.add_(products * self.log_magnitude.exp())

    def encode(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch latents"]:
        """The latents that the gate lets through, at the magnitude of the other map."""
        return self._paths(x)[0]

    def _paths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the gate's pre-activations pi; both maps share one product."""
        products = nn.functional.linear(self.check(x) - self.decoder_bias, self.encoder)
        gate = products + self.gate_bias
        magnitude = (products * self.log_magnitude.exp() + self.magnitude_bias).relu()
        return torch.where(gate > 0, magnitude, 0), gate

    def thresholds(self) -> Float[Tensor, " latents"]:
        """Theta = b_mag - exp(r) b_gate: where it is not negative, f is JumpReLU_theta of the magnitudes."""
        return self.magnitude_bias - self.log_magnitude.exp() * self.gate_bias

    def loss(self, x: Float[Tensor, "batch dim"], progress: float) -> tuple[Float[Tensor, ""], Metrics]:
        """The sum of reconstruction, sparsity and auxiliary reconstruction; see `Gated`."""
        latents, gate = self._paths(x)
        self.see(latents)
        opened = gate.relu()
        error = squared_error(x, latents @ self.trained_decoder() + self.decoder_bias)
        auxiliary = squared_error(x, opened @ self.decoder.detach() + self.decoder_bias.detach())
        sparsity = opened.sum(dim=-1).mean() if self.annealed is None else self.annealed(opened, progress)
        penalty = self.spec.weight(progress)
        metrics = {
            "error": error.detach(),
            "auxiliary": auxiliary.detach(),
            "sparsity": sparsity.detach(),
            "l0": (latents > 0).sum(dim=-1).float().mean(),
        }
        return error + penalty * sparsity + auxiliary, metrics

    def after_step(self) -> None:
        """Count the step, keep unit rows, and lower p where it is time."""
        super().after_step()
        if self.annealed is not None:
            self.annealed.after_step()
