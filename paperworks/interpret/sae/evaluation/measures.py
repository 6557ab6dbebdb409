"""What a sparse autoencoder is judged by: how few latents it uses, how much it explains, what it recovers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.sae.evaluation.directions import unit_rows


@dataclass(frozen=True)
class Quality:
    """Measured on some activations.

    l0: latents that are on for an input, mean.
    mse: mean of ||x - x'||^2, summed over dimensions.
    fvu: fraction of variance unexplained, mse divided by that of predicting the mean.
    bias: E ||x'||^2 / E [x' . x], the factor that reconstructions are too small (below 1: shrinkage) or too large by
        (Rajamanoharan et al. 2024, arXiv:2404.16014).
    density: for each latent, the share of inputs for which it is on, (latents,).
    """

    l0: float
    mse: float
    fvu: float
    bias: float
    density: Float[Tensor, " latents"]
    inputs: int

    @property
    def explained_variance(self) -> float:
        """1 - fvu."""
        return 1.0 - self.fvu

    @property
    def dead(self) -> float:
        """Share of the latents that were never on."""
        return float((self.density == 0).double().mean())

    def dense(self, above: float = 0.1) -> float:
        """The share of the latents that are on for more than `above` of the inputs."""
        return float((self.density > above).double().mean())

    def histogram(
        self, bins: int = 40, lowest: float = -6.0
    ) -> tuple[Int[Tensor, " bins"], Float[Tensor, " edges"], int]:
        """Counts and edges over log10 of the density from `lowest` to 0, and how many latents are dead.

        Latents on more seldom than 10^lowest are counted in the first bin; dead ones have no logarithm and are apart.
        """
        edges = torch.linspace(lowest, 0.0, bins + 1, dtype=torch.float64)
        alive = self.density[self.density > 0].double().log10().clamp(lowest, 0.0)
        counts = torch.histc(alive, bins, min=lowest, max=0.0).long() if len(alive) else torch.zeros(bins).long()
        return counts, edges, int((self.density == 0).sum())


@torch.no_grad()
def measure(sae: SparseAutoencoder, batches: Iterable[Float[Tensor, "batch dim"]]) -> Quality:
    """Run the autoencoder over batches and return its quality; sums are kept in float64."""
    inputs, error, square, along = 0, 0.0, 0.0, 0.0
    total: Tensor | None = None
    energy = 0.0
    on = torch.zeros(sae.latents, dtype=torch.int64, device=sae.decoder.device)
    for x in batches:
        x = sae.check(x)
        latents = sae.encode(x)
        on += (latents > 0).sum(dim=0)
        wide, reconstruction = x.double(), sae.decode(latents).double()
        error += float((wide - reconstruction).square().sum())
        square += float(reconstruction.square().sum())
        along += float((wide * reconstruction).sum())
        energy += float(wide.square().sum())
        total = wide.sum(dim=0) if total is None else total + wide.sum(dim=0)
        inputs += len(x)
    if total is None or inputs < 2:
        raise ValueError(f"quality needs two inputs or more, got {inputs}")
    variance = energy - float(total.square().sum()) / inputs
    if not variance > 0:
        raise ValueError("all inputs are equal: there is no variance to explain")
    return Quality(
        l0=float(on.sum()) / inputs,
        mse=error / inputs,
        fvu=error / variance,
        bias=square / along if along else float("nan"),
        density=on.double() / inputs,
        inputs=inputs,
    )


def best_cosines(
    directions: Float[Tensor, "features dim"], decoder: Float[Tensor, "latents dim"]
) -> Float[Tensor, " features"]:
    """For each known direction its cosine with the nearest decoder row, lengths left aside."""
    if directions.shape[1] != decoder.shape[1]:
        raise ValueError(
            f"directions of size {directions.shape[1]} cannot be found among decoder rows of size {decoder.shape[1]}"
        )
    return (unit_rows(directions) @ unit_rows(decoder.detach().to(directions.dtype)).T).amax(dim=1)


@dataclass(frozen=True)
class Recovery:
    """How many known directions a dictionary holds.

    mmcs: mean over the directions of the largest cosine with a decoder row.
    share: share of the directions with one above the threshold.
    """

    mmcs: float
    share: float


def recovery(directions: Float[Tensor, "features dim"], sae: SparseAutoencoder, threshold: float = 0.9) -> Recovery:
    """Compare an autoencoder's decoder with known directions."""
    found = best_cosines(directions, sae.decoder)
    return Recovery(mmcs=float(found.mean()), share=float((found > threshold).double().mean()))
