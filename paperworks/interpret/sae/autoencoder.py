"""The sparse autoencoder: what all kinds have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.spec import Spec
from paperworks.interpret.sae.evaluation.directions import along_sphere, geometric_median, random_directions

Metrics = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SparseAutoencoderSpec(Spec):
    """What kind of sparse autoencoder, and how many latents it has.

    latents: size of the dictionary.
    """

    latents: int

    def validate(self) -> None:
        """Refuse a dictionary without latents."""
        if self.latents < 1:
            raise ValueError(f"{type(self).__name__}.latents must be 1 or more, got {self.latents}")

    @abstractmethod
    def build(self, dim: int) -> SparseAutoencoder:
        """An autoencoder of activations of size `dim`, its weights drawn from torch's generator."""


@dataclass(frozen=True, kw_only=True)
class PenalizedSpec(SparseAutoencoderSpec):
    """A kind whose sparsity comes from a penalty in the loss.

    penalty: weight of the sparsity term. warmup: share of the steps over which it rises from 0.
    """

    penalty: float
    warmup: float = 0.1

    def validate(self) -> None:
        """Check both numbers."""
        super().validate()
        require_positive(self, "penalty")
        if not 0 <= self.warmup <= 1:
            raise ValueError(
                f"{type(self).__name__}.warmup must be a share of the training steps in [0, 1], got {self.warmup}"
            )

    def weight(self, progress: float) -> float:
        """The penalty's weight when `progress`, a share of the steps, is done."""
        return warmed(self.penalty, self.warmup, progress)


class SparseAutoencoder(nn.Module):
    """latents = encode(x), sparse and not negative; decode(latents) = sum_i latents_i * decoder_i + decoder_bias.

    Row i of `encoder` and of `decoder`, both (latents, dim), belong to latent i. The decoder starts as random unit
    rows, the encoder as its copy, the biases at 0.

    `steps_taken` and `idle` (inputs seen since each latent was last on) are buffers, so that training resumes.
    """

    unit_norm = True  # whether decoder rows are kept at length 1

    def __init__(self, spec: SparseAutoencoderSpec, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; activations have at least one dimension")
        self.spec = spec
        decoder = random_directions(spec.latents, dim)
        self.decoder = nn.Parameter(decoder)
        self.encoder = nn.Parameter(decoder.clone())
        self.decoder_bias = nn.Parameter(torch.zeros(dim))
        self.steps_taken: Tensor
        self.idle: Tensor
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))
        self.register_buffer("idle", torch.zeros(spec.latents, dtype=torch.int64))

    @property
    def dim(self) -> int:
        """Size of the activations."""
        return self.decoder.shape[1]

    @property
    def latents(self) -> int:
        """Size of the dictionary."""
        return self.decoder.shape[0]

    def extra_repr(self) -> str:
        """Say the sizes."""
        return f"{self.spec}, dim={self.dim}"

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch latents"]:
        """The latents of activations."""

    def decode(self, latents: Float[Tensor, "*batch latents"]) -> Float[Tensor, "*batch dim"]:
        """The activations that latents stand for."""
        return latents @ self.decoder + self.decoder_bias

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The reconstruction of activations."""
        return self.decode(self.encode(x))

    @abstractmethod
    def loss(self, x: Float[Tensor, "batch dim"], progress: float) -> tuple[Float[Tensor, ""], Metrics]:
        """The mean training loss of a batch and what to log beside it.

        progress: share of the training steps that were taken, in [0, 1], for warm-ups and annealing.
        """

    def strength(self, latents: Float[Tensor, "*batch latents"]) -> Float[Tensor, "*batch latents"]:
        """latent_i * ||decoder_i||, how much of each direction is written: what "feature activation" means."""
        out: Tensor = latents * self.decoder.norm(dim=1)
        return out

    def after_step(self) -> None:
        """Do what follows every optimizer step: count it, and bring decoder rows back to length 1."""
        with torch.no_grad():
            self.steps_taken += 1
            if self.unit_norm:
                lengths = self.decoder.norm(dim=1, keepdim=True)
                self.decoder.div_(lengths.clamp_min_(torch.finfo(lengths.dtype).tiny))

    @torch.no_grad()
    def centre(self, sample: Float[Tensor, "points dim"]) -> None:
        """Start the decoder's bias at the geometric median of a sample."""
        self.decoder_bias.copy_(geometric_median(self.check(sample)))

    @torch.no_grad()
    def recentre(self, bias: Float[Tensor, " dim"]) -> None:
        """Give the decoder another bias and leave every latent the function of x it is. In place."""
        self._shift(self.encoder @ (bias - self.decoder_bias))
        self.decoder_bias.copy_(bias)

    def _shift(self, products: Float[Tensor, " latents"]) -> None:
        """Add W_e (new b_d - old b_d) to biases, in kinds that subtract b_d from their input."""

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Make the autoencoder of x one of factor * x: f(factor * x) = factor * f(x) afterwards. In place.

        Every kind is homogeneous, so only biases and thresholds change, and directions keep their lengths. To take back
        the scalar that activations were multiplied with in training, rescale by its inverse.
        """
        if not factor > 0 or factor == float("inf"):
            raise ValueError(f"factor is {factor}; a positive, finite number is needed")
        for name in self._offsets():
            self.get_parameter(name).mul_(factor)

    def _offsets(self) -> list[str]:
        """Name the parameters that are in units of the activations."""
        return ["decoder_bias"]

    def latent_biases(self) -> list[str]:
        """Name the parameters with one number a latent that start at 0."""
        return [name for name in self._offsets() if name != "decoder_bias"]

    def check(self, x: Tensor) -> Tensor:
        """`x` in the weights' dtype. Raises ValueError when its last dimension is not this autoencoder's."""
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"this autoencoder reads activations of size {self.dim}, got shape {tuple(x.shape)}: "
                "they come from another model or another tap than it was made for"
            )
        return x.to(self.decoder.dtype)

    def trained_decoder(self) -> Float[Tensor, "latents dim"]:
        """The decoder as the loss sees it: rows of unit length get the gradient along the sphere only."""
        return along_sphere(self.decoder) if self.unit_norm else self.decoder

    @torch.no_grad()
    def see(self, on: Float[Tensor, "batch latents"]) -> None:
        """Count for each latent the inputs since it was last on; only in training mode."""
        if self.training:
            self.idle.add_(len(on)).masked_fill_((on > 0).any(dim=0), 0)


def warmed(weight: float, warmup: float, progress: float) -> float:
    """A penalty's weight, which rises linearly from 0 over the first `warmup` share of training."""
    return weight * min(1.0, progress / warmup) if warmup > 0 else weight


def require_positive(spec: Spec, name: str) -> None:
    """Raise ValueError when a spec's field is not 0 or more and finite."""
    value = getattr(spec, name)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{type(spec).__name__}.{name} must be 0 or more and finite, got {value}")


def squared_error(x: Float[Tensor, "batch dim"], reconstruction: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """The mean over inputs of ||x - reconstruction||^2, summed over dimensions."""
    return (x - reconstruction).square().sum(dim=-1).mean()
