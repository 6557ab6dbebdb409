"""Which features lie near which, and what each does to a model's output.

Templeton et al. 2024, "Scaling Monosemanticity": feature neighbourhoods, features as computational intermediates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.sae.evaluation.directions import unit_rows
from paperworks.interpret.taps import edit

Metric = Callable[[Any], Tensor]


class Neighbours(NamedTuple):
    """For each feature, the nearest ones of a dictionary, nearest first."""

    indices: Int[Tensor, "features k"]
    cosines: Float[Tensor, "features k"]


def neighbours(
    decoder: Float[Tensor, "features dim"],
    among: Float[Tensor, "latents dim"] | None = None,
    k: int = 5,
    *,
    alive: Bool[Tensor, " latents"] | None = None,
) -> Neighbours:
    """The k features with the largest cosine to each decoder row.

    Args:
        decoder: rows whose neighbours are wanted; their lengths do not matter.
        among: another dictionary's decoder (a larger one shows how features split); None is the same one, where a
            feature is not its own neighbour.
        k: how many.
        alive: which latents of the dictionary that is searched may be neighbours; dead ones point anywhere.

    Raises ValueError when sizes do not fit, or fewer than k may be neighbours.
    """
    other = decoder if among is None else among
    if decoder.shape[1] != other.shape[1]:
        raise ValueError(f"rows of size {decoder.shape[1]} have no neighbours among rows of size {other.shape[1]}")
    if alive is not None and alive.shape != (len(other),):
        raise ValueError(f"alive has shape {tuple(alive.shape)}, the dictionary that is searched has {len(other)} rows")
    available = int(alive.sum()) if alive is not None else len(other)
    if not 1 <= k <= available - (among is None):
        raise ValueError(f"k is {k}, but only {available - (among is None)} rows can be neighbours")
    cosines = unit_rows(decoder.detach()) @ unit_rows(other.detach()).T
    if among is None:
        cosines.fill_diagonal_(-torch.inf)
    if alive is not None:
        cosines[:, ~alive] = -torch.inf
    values, indices = cosines.topk(k, dim=1)
    return Neighbours(indices, values)


def project(decoder: Float[Tensor, "features dim"], dimensions: int = 2) -> Float[Tensor, "features dimensions"]:
    """A map of decoder directions: the principal components of their unit rows, which keep cosines best."""
    unit = unit_rows(decoder.detach().double())
    centred = unit - unit.mean(dim=0)
    if not 1 <= dimensions <= min(centred.shape):
        raise ValueError(f"{tuple(centred.shape)} rows have no {dimensions} principal components")
    left, lengths, _ = torch.linalg.svd(centred, full_matrices=False)
    out: Tensor = (left[:, :dimensions] * lengths[:dimensions]).to(decoder.dtype)
    return out


class Attribution(NamedTuple):
    """What each part of the activations adds to a metric, to first order.

    The three add up to x . dm/dx at every position.

    latents: f_i(x_t) * (decoder_i . dm/dx_t). error: (x_t - x'_t) . dm/dx_t. bias: decoder_bias . dm/dx_t.
    """

    latents: Float[Tensor, "batch time latents"]
    error: Float[Tensor, "batch time"]
    bias: Float[Tensor, "batch time"]


def attribute(model: nn.Module, tap: str, sae: SparseAutoencoder, batch: Any, metric: Metric) -> Attribution:
    """Attribute a metric of the model's output to an autoencoder's latents, by the gradient of the clean run.

    Args:
        model, tap: any module, and the path where the autoencoder reads; nothing is replaced there.
        sae: its latents are attributed to.
        batch: what the model is called with.
        metric: metric(output) -> a scalar, such as a logit difference.

    Raises ValueError when the metric is no scalar or does not depend on the tap, or sizes do not fit.
    """
    x, gradient = _gradient_at(model, tap, batch, metric)
    x = sae.check(x)
    with torch.no_grad():
        latents = sae.encode(x)
        gradient = gradient.to(sae.decoder.dtype)
        along = gradient @ sae.decoder.T
        error = ((x - sae.decode(latents)) * gradient).sum(dim=-1)
        return Attribution(latents * along, error, gradient @ sae.decoder_bias)


def _gradient_at(model: nn.Module, tap: str, batch: Any, metric: Metric) -> tuple[Tensor, Tensor]:
    """A tap's value and the metric's gradient there, whether or not the model's weights are trained."""
    held: list[Tensor] = []

    def hold(x: Tensor) -> Tensor:
        held.append(x.detach().requires_grad_())
        return held[-1]

    with torch.enable_grad(), edit(model, {tap: hold}):
        value = metric(model(batch))
        if value.dim() != 0:
            raise ValueError(f"the metric has shape {tuple(value.shape)}; a scalar is attributed")
        if not held:
            raise ValueError(f"the model ran, but not through {tap}")
        try:
            (gradient,) = torch.autograd.grad(value, held[-1])
        except RuntimeError as error:
            raise ValueError(f"the metric does not depend on {tap}: {error}") from error
    return held[-1].detach(), gradient


@torch.no_grad()
def ablate(
    model: nn.Module, tap: str, sae: SparseAutoencoder, batch: Any, metric: Metric, latent: int, position: int
) -> float:
    """How much a metric falls when one latent is set to 0 at one position; everything else of x is kept.

    Batches of one input only: the metric is of all of them.
    """
    if not 0 <= latent < sae.latents:
        raise ValueError(f"latent {latent} is not one of the {sae.latents}, counted from 0")
    clean = metric(model(batch))

    def without(x: Tensor) -> Tensor:
        changed = x.clone()
        at = sae.encode(sae.check(x[:, position]))[:, latent]
        changed[:, position] -= (at[:, None] * sae.decoder[latent]).to(x.dtype)
        return changed

    with edit(model, {tap: without}):
        return float(clean - metric(model(batch)))
