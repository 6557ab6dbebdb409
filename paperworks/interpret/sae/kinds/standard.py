"""ReLU autoencoders with a penalty on how strongly latents are on: the first kind, and its later form.

Bricken et al. 2023, "Towards Monosemanticity", transformer-circuits.pub/2023/monosemantic-features; Templeton et al.
2024, "Scaling Monosemanticity", and the Circuits Updates of April 2024; Karvonen et al. 2024, arXiv:2408.00113.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

FREE_NORM = 0.1  # length of decoder rows at the start where it is free (Circuits Updates, April 2024)


@dataclass(frozen=True, kw_only=True)
class Standard(PenalizedSpec):
    """f = ReLU(W_e (x - b_d) + b_e), x' = W_d f + b_d; loss = mean ||x - x'||^2 + penalty * mean sum_i f_i ||W_d,i||.

    decoder: "unit" keeps every ||W_d,i|| at 1 (Bricken et al. 2023). "weighted" leaves the lengths free, for they are
        in the penalty, and does not subtract b_d from the input (Templeton et al. 2024): the loss is then the same
        for any trade of length between a latent's encoder and decoder.
    penalty: weight of the sparsity term. It means something only together with the scale of the activations:
        3 for "unit" and 5 for "weighted" go with a mean ||x||^2 equal to dim.
    warmup: share of the steps over which the penalty rises from 0.
    annealing: replaces f_i by f_i^p with p falling from 1 (Karvonen et al. 2024); "unit" only.
    """

    decoder: Literal["unit", "weighted"] = "unit"
    warmup: float = 0.05  # Circuits Updates, April 2024
    annealing: Annealing | None = None

    def validate(self) -> None:
        """Check the numbers, and that annealing meets the decoder it is defined for."""
        super().validate()
        if self.annealing is not None and self.decoder != "unit":
            raise ValueError("Standard.annealing needs decoder='unit': powers of f are no longer a length times f")

    def build(self, dim: int) -> StandardAutoencoder:
        """An untrained autoencoder."""
        return StandardAutoencoder(self, dim)


class StandardAutoencoder(SparseAutoencoder):
    """See `Standard`."""

    spec: Standard

    def __init__(self, spec: Standard, dim: int) -> None:
        super().__init__(spec, dim)
        self.encoder_bias = nn.Parameter(torch.zeros(spec.latents))
        self.annealed = AnnealedPenalty(spec.annealing) if spec.annealing is not None else None
        if not self.unit_norm:
            with torch.no_grad():
                self.decoder.mul_(FREE_NORM)
                self.encoder.mul_(FREE_NORM)

    @property
    def unit_norm(self) -> bool:  # type: ignore[override]
        """Whether decoder rows are kept at length 1."""
        return self.spec.decoder == "unit"

    def _offsets(self) -> list[str]:
        return [*super()._offsets(), "encoder_bias"]

    def _shift(self, products: Tensor) -> None:
        if self.unit_norm:
            self.encoder_bias.add_(products)

    def encode(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch latents"]:
        """ReLU(W_e (x - b_d) + b_e); without b_d where the decoder is weighted."""
        x = self.check(x)
        if self.unit_norm:
            x = x - self.decoder_bias
        return nn.functional.linear(x, self.encoder, self.encoder_bias).relu()

    def loss(self, x: Float[Tensor, "batch dim"], progress: float) -> tuple[Float[Tensor, ""], Metrics]:
        """Mean ||x - x'||^2 + penalty * sparsity; see `Standard`."""
        latents = self.encode(x)
        self.see(latents)
        decoder = self.trained_decoder()
        error = squared_error(x, latents @ decoder + self.decoder_bias)
        penalty = self.spec.weight(progress)
        if self.annealed is not None:
            sparsity = self.annealed(latents, progress)
        elif self.unit_norm:
            sparsity = latents.sum(dim=-1).mean()
        else:
            sparsity = (latents @ decoder.norm(dim=1)).mean()
        metrics = {
            "error": error.detach(),
            "sparsity": sparsity.detach(),
            "l0": (latents > 0).sum(dim=-1).float().mean(),
        }
        return error + penalty * sparsity, metrics

    def after_step(self) -> None:
        """Count the step, keep unit rows, and lower p where it is time."""
        super().after_step()
        if self.annealed is not None:
            self.annealed.after_step()

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Give every decoder row length 1 without changing the function: W_e,i and b_e,i take over the length."""
        norms = self.decoder.norm(dim=1)
        if bool((norms == 0).any()):
            raise ValueError(f"{int((norms == 0).sum())} decoder rows are zero and have no direction to keep")
        self.encoder.mul_(norms[:, None])
        self.encoder_bias.mul_(norms)
        self.decoder.div_(norms[:, None])
