"""TopK autoencoders: exactly the k largest pre-activations stay (Gao et al. 2024, arXiv:2406.04093)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.interpret.sae.autoencoder import Metrics, SparseAutoencoder, SparseAutoencoderSpec, require_positive
from paperworks.interpret.sae.kinds import sparse
from paperworks.interpret.sae.kinds.jumprelu import JumpReLU, JumpReLUAutoencoder
from paperworks.interpret.sae.kinds.sparse import Latents

# Four times k in the second term, at an eighth of the weight (Gao et al., section 6.2).
MULTI_K, MULTI_WEIGHT = 4, 1 / 8


@dataclass(frozen=True, kw_only=True)
class TopK(SparseAutoencoderSpec):
    """z = ReLU(the k largest of W_e (x - b) + b_e), x' = W_d z + b; loss = NMSE(x, x') + aux * NMSE(e, W_d z_aux).

    NMSE divides the squared error by that of predicting the batch's mean, so 1 is the error of knowing nothing (the
    authors' public code divides each input's error by that input's own mean square instead). The second term teaches
    latents that are dead: e = x - x' as it stands, z_aux the `aux_k` largest pre-activations among the dead.

    k: latents that may be on for each input.
    aux: weight of the auxiliary loss, 0 for none.
    aux_k: dead latents that answer for each input; a power of two near dim / 2 in the paper.
    dead_after: inputs after which a latent that was never on counts as dead (10 million tokens in the paper).
    multi: adds an eighth of the loss at 4k latents (Multi-TopK), so that more latents may be used later.
    """

    k: int
    aux: float = 1 / 32
    aux_k: int = 512
    dead_after: int = 10_000_000
    multi: bool = False

    def validate(self) -> None:
        """Check that there are as many latents as are to be on."""
        super().validate()
        require_positive(self, "aux")
        most = self.k * MULTI_K if self.multi else self.k
        if self.k < 1 or most > self.latents:
            raise ValueError(f"TopK.k must be 1 or more and need no more than the {self.latents} latents, got {self.k}")
        for name in ("aux_k", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"TopK.{name} must be 1 or more, got {getattr(self, name)}")

    def build(self, dim: int) -> TopKAutoencoder:
        """An untrained autoencoder."""
        return TopKAutoencoder(self, dim)


class TopKAutoencoder(SparseAutoencoder):
    """See `TopK`. Its own path is sparse: only `encode` and `decode`, which other tools call, know all latents."""

    spec: TopK

    def __init__(self, spec: TopK, dim: int) -> None:
        super().__init__(spec, dim)
        self.encoder_bias = nn.Parameter(torch.zeros(spec.latents))

    def _offsets(self) -> list[str]:
        return [*super()._offsets(), "encoder_bias"]

    def _shift(self, products: Tensor) -> None:
        self.encoder_bias.add_(products)

    def encode_sparse(self, x: Float[Tensor, "batch dim"]) -> Latents:
        """The k latents of each input that may be on."""
        return self._largest(self.check(x), self.spec.k)

    def _largest(self, x: Tensor, k: int, among: Tensor | None = None) -> Latents:
        return sparse.largest(x - self.decoder_bias, self.encoder, self.encoder_bias, k, among)

    def _decoded(self, latents: Latents) -> Tensor:
        return sparse.decode(latents, self.decoder, along_sphere=True)

    def encode(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch latents"]:
        """All latents, of which at most k an input are not 0."""
        rows = self.check(x).reshape(-1, self.dim)
        return self.encode_sparse(rows).dense(self.latents).view(*x.shape[:-1], self.latents)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The reconstruction, without the dense latents."""
        rows = self.check(x).reshape(-1, self.dim)
        return sparse.decode(self.encode_sparse(rows), self.decoder, self.decoder_bias).view(x.shape)

    def dead(self) -> Tensor:
        """The indices of latents that were not on for the last `dead_after` inputs."""
        return (self.idle >= self.spec.dead_after).nonzero().flatten()

    def loss(self, x: Float[Tensor, "batch dim"], progress: float) -> tuple[Float[Tensor, ""], Metrics]:
        """NMSE + aux * AuxK (+ Multi-TopK); see `TopK`."""
        x = self.check(x)
        candidates = self._largest(x, self.spec.k * (MULTI_K if self.spec.multi else 1))
        latents = _narrowed(candidates, self.spec.k) if self.spec.multi else candidates
        reconstruction = self._decoded(latents) + self.decoder_bias
        error = normalized_error(x, reconstruction)
        total = error
        if self.spec.multi:
            wide = self._decoded(candidates) + self.decoder_bias
            total = total + MULTI_WEIGHT * normalized_error(x, wide)
        dead = self.dead() if self.spec.aux else self.idle[:0]
        if len(dead):
            total = total + self.spec.aux * self._auxiliary(x, (x - reconstruction).detach(), dead)
        self._see(latents)
        on = (latents.values.detach() > 0).sum(dim=1).float().mean()
        return total, {"error": error.detach(), "l0": on, "dead": float(len(dead)) / self.latents}

    def _auxiliary(self, x: Tensor, missing: Tensor, dead: Tensor) -> Tensor:
        """The error of dead latents at predicting what is missing; 0 where that cannot be said."""
        latents = self._largest(x, min(self.spec.aux_k, len(dead)), dead)
        return normalized_error(missing, self._decoded(latents)).nan_to_num(0.0)

    @torch.no_grad()
    def _see(self, latents: Latents) -> None:
        if self.training:
            self.idle.add_(len(latents.values))
            self.idle[latents.indices[latents.values > 0]] = 0


@torch.no_grad()
def with_fixed_threshold(model: TopKAutoencoder, sample: Float[Tensor, "inputs dim"]) -> JumpReLUAutoencoder:
    """The JumpReLU autoencoder that keeps as many latents on average, by one threshold instead of a ranking.

    The threshold is the mean over the sample of the smallest activation that TopK kept: how many latents are on then
    depends on the input again, and a latent on itself alone.

    Raises ValueError when no latent is on for any of the sample.
    """
    kept = model.encode_sparse(sample).values
    smallest = torch.where(kept > 0, kept, torch.inf).amin(dim=1)
    smallest = smallest[smallest.isfinite()]
    if not len(smallest):
        raise ValueError("no latent is on for any input of the sample, so there is no activation to set a threshold by")
    threshold = float(smallest.mean())
    spec = JumpReLU(latents=model.latents, penalty=0.0, threshold=threshold, bandwidth=threshold)
    made = spec.build(model.dim).to(model.decoder)
    for name in ("encoder", "decoder", "decoder_bias"):
        made.get_parameter(name).copy_(model.get_parameter(name))
    made.encoder_bias.copy_(model.encoder_bias - model.encoder @ model.decoder_bias)
    return made.eval()


def _narrowed(latents: Latents, k: int) -> Latents:
    values, places = latents.values.topk(k, dim=1, sorted=False)
    return Latents(values, latents.indices.gather(1, places))


def normalized_error(x: Float[Tensor, "batch dim"], reconstruction: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Sum ||x - reconstruction||^2 / sum ||x - mean(x)||^2 over a batch: 1 for who predicts the mean."""
    return (x - reconstruction).square().sum() / (x - x.mean(dim=0)).square().sum()
