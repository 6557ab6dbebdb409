"""Neurons of the last layer that regulate confidence: entropy neurons and token-frequency neurons (Stolfo et al. 2024,
"Confidence Regulation Neurons in Language Models", arXiv:2406.16254).

What such a neuron writes, w, can change the next token's distribution in two ways: by the logits W w themselves, or by
the length of the stream, through which the final norm divides all logits. An entropy neuron writes where W hardly
reads, so it acts through the norm alone; a token-frequency neuron moves logits along the log unigram distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.linear import bias_of, weight_of
from paperworks.interpret.residual import residual_stream


@dataclass(frozen=True)
class Readout:
    """How logits are read off the last residual stream: logits = W x s(x) + offset, with the norm's gain in W.

    s(x) = 1 / sqrt(mean(x^2) + eps). For a LayerNorm, subtracting the mean is part of W, and of s.

    Attributes:
        weight: W.
        eps: of the norm.
        centred: whether the norm is a LayerNorm.
        offset: what does not depend on x (the norm's bias, the unembedding's), or None.
    """

    weight: Float[Tensor, "vocab dim"]
    eps: float
    centred: bool = False
    offset: Float[Tensor, " vocab"] | None = None

    def scale(self, stream: Float[Tensor, "... dim"]) -> Float[Tensor, "... 1"]:
        """S(x) at each position."""
        x = stream - stream.mean(-1, keepdim=True) if self.centred else stream
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def logits(
        self, stream: Float[Tensor, "... dim"], scale: Float[Tensor, "... 1"] | None = None
    ) -> Float[Tensor, "... vocab"]:
        """The logits; with `scale`, those of a norm frozen at it."""
        read = stream @ self.weight.mT * (self.scale(stream) if scale is None else scale)
        return read if self.offset is None else read + self.offset


@torch.no_grad()
def readout(model: nn.Module) -> Readout:
    """The readout of one of our decoders, or of another library's that `residual_stream` knows.

    Raises:
        ValueError: when the final norm is missing or of another kind, or the logits are soft-capped.
    """
    where = residual_stream(model)
    norm: Any = None if where.norm is None else model.get_submodule(where.norm)
    eps: Any = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if norm is None or eps is None or getattr(norm, "used", None) != getattr(norm, "dim", None):
        raise ValueError(
            f"{type(model).__name__} ends in {type(norm).__name__}: confidence through the final norm needs an RMSNorm "
            "or LayerNorm over the whole stream before the unembedding"
        )
    for owner in (getattr(model, "spec", None), getattr(model, "config", None)):
        cap = getattr(owner, "logit_soft_cap", None) or getattr(owner, "final_logit_softcapping", None)
        if cap is not None:
            raise ValueError(f"the logits are soft-capped at {cap}: they are then not linear in what a neuron writes")
    unembedding = model.get_submodule(where.unembedding)
    weight, offset = weight_of(unembedding).detach(), bias_of(unembedding)
    gain, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if shift is not None:
        moved = weight @ shift.detach()
        offset = moved if offset is None else offset.detach() + moved
    if gain is not None:
        shifted = bool(getattr(norm, "offset", False)) or type(norm).__name__.startswith("Gemma")
        weight = weight * (1 + gain if shifted else gain).detach()
    centred = isinstance(norm, nn.LayerNorm)
    if centred:
        weight = weight - weight.mean(1, keepdim=True)
    return Readout(weight, float(eps), centred, None if offset is None else offset.detach())


@torch.no_grad()
def logit_variance(
    writes: Float[Tensor, "neurons dim"], weight: Float[Tensor, "vocab dim"]
) -> Float[Tensor, " neurons"]:
    """LogitVar(w): the variance over the vocabulary of the cosines of w with the unembedding's rows.

    An entropy neuron has a low one and a large ||w||.
    """
    _require_width(writes, weight)
    rows = nn.functional.normalize(weight, dim=1)
    return (nn.functional.normalize(writes, dim=1) @ rows.mT).var(dim=1, correction=0)


@dataclass(frozen=True)
class Spectrum:
    """The stream's directions in the order in which the unembedding reads them.

    Attributes:
        strengths: singular values of W, largest first.
        directions: rows are the unit directions of the stream that belong to them.
    """

    strengths: Float[Tensor, " dim"]
    directions: Float[Tensor, "dim dim"]

    def null_space(self, count: int) -> Float[Tensor, "count dim"]:
        """V_0: the `count` directions read least (the paper takes 40, about 1%, of LLaMA2's 4,096)."""
        if not 1 <= count <= len(self.strengths):
            raise ValueError(f"count must be between 1 and the stream's {len(self.strengths)} dimensions, got {count}")
        return self.directions[-count:]


@torch.no_grad()
def spectrum(weight: Float[Tensor, "vocab dim"]) -> Spectrum:
    """The singular values and right singular vectors of W (vocab, dim), from its Gram matrix in float64."""
    gram = weight.double()
    squares, vectors = torch.linalg.eigh(gram.mT @ gram)
    return Spectrum(squares.clamp_min(0).sqrt().flip(0), vectors.mT.flip(0))


@torch.no_grad()
def null_share(writes: Float[Tensor, "neurons dim"], null: Float[Tensor, "count dim"]) -> Float[Tensor, " neurons"]:
    """rho(w) = ||V_0^T w|| / ||w||: how much of what a neuron writes lies where W reads least."""
    _require_width(writes, null)
    return (writes.to(null) @ null.mT).norm(dim=1) / writes.to(null).norm(dim=1)


def log_unigram(counts: Float[Tensor, " vocab"] | Int[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """Log p of each token from its counts in a text, each raised by 1 so that none is impossible."""
    if counts.ndim != 1 or bool((counts < 0).any()):
        raise ValueError(f"counts must be one number >= 0 for each token, got {tuple(counts.shape)}")
    raised = counts.double() + 1
    return (raised / raised.sum()).log()


@torch.no_grad()
def frequency_cosine(
    writes: Float[Tensor, "neurons dim"], weight: Float[Tensor, "vocab dim"], log_p: Float[Tensor, " vocab"]
) -> Float[Tensor, " neurons"]:
    """The cosine of the logits W w, centred, with v_freq = log p - mean: the screen by weights alone."""
    _require_width(writes, weight)
    moved = writes @ weight.mT
    return nn.functional.cosine_similarity(moved - moved.mean(1, keepdim=True), _frequency(log_p).to(moved)[None])


@dataclass(frozen=True)
class Ablation:
    """What replacing a neuron's activation by its mean does at each position.

    Attributes:
        loss: change of the loss in nats.
        loss_frozen_scale: the same with the final norm's scale kept: the direct effect, not through the norm.
        loss_held_frequency: the same with the logits' component along v_freq kept: not through token frequency.
        entropy: change of the entropy in nats.
        divergence: change of KL(p || unigram) in nats.
        push: what is added to the activation, mean - activation.
    """

    loss: Float[Tensor, " positions"]
    loss_frozen_scale: Float[Tensor, " positions"]
    loss_held_frequency: Float[Tensor, " positions"]
    entropy: Float[Tensor, " positions"]
    divergence: Float[Tensor, " positions"]
    push: Float[Tensor, " positions"]

    @property
    def through_norm(self) -> float:
        """1 - mean |direct effect| / mean |total effect| on the loss, the scale frozen; 1 for an entropy neuron."""
        return _mediated(self.loss_frozen_scale, self.loss)

    @property
    def through_frequency(self) -> float:
        """1 - mean |direct effect| / mean |total effect| on the loss, v_freq held; 1 for a frequency neuron."""
        return _mediated(self.loss_held_frequency, self.loss)


class Ablations:
    """Mean-ablate neurons of the last layer, one at a time, at given positions.

    The last layer's write goes to the final norm and nowhere else, so nothing has to be run again: the stream becomes
    x + (mean - activation) w, and its unscaled logits W x + (mean - activation) W w.

    Args:
        read: see `readout`.
        stream: the residual stream before the final norm.
        targets: the token that comes next, at each position.
        log_p: log unigram probabilities, see `log_unigram`.
    """

    @torch.no_grad()
    def __init__(
        self,
        read: Readout,
        stream: Float[Tensor, "positions dim"],
        targets: Int[Tensor, " positions"],
        log_p: Float[Tensor, " vocab"],
    ) -> None:
        if stream.ndim != 2 or targets.shape != stream.shape[:1]:
            raise ValueError(
                f"stream must be (positions, dim) with one target a position, got {tuple(stream.shape)} and "
                f"{tuple(targets.shape)}"
            )
        _require_width(stream, read.weight)
        if log_p.shape != read.weight.shape[:1]:
            raise ValueError(f"log_p must have one entry for each of {len(read.weight)} tokens, got {len(log_p)}")
        self.read, self.stream, self.targets = read, stream, targets
        self.log_p = log_p.to(stream)
        self.direction = nn.functional.normalize(_frequency(log_p), dim=0).to(stream)
        self.unscaled = stream @ read.weight.mT
        self.scale = read.scale(stream)
        self.clean = self._logits(self.unscaled, self.scale)
        self.loss, self.entropy, self.divergence = self._measure(self.clean)

    @torch.no_grad()
    def __call__(self, write: Float[Tensor, " dim"], activation: Float[Tensor, " positions"]) -> Ablation:
        """Replace `activation`, by which the neuron's `write` is multiplied, by its mean over the positions."""
        if activation.shape != self.targets.shape or write.shape != self.stream.shape[1:]:
            raise ValueError(
                f"a neuron has a write of {self.stream.shape[1]} and {len(self.targets)} activations, got "
                f"{tuple(write.shape)} and {tuple(activation.shape)}"
            )
        push = (activation.mean() - activation)[:, None]
        moved = self.unscaled + push * (self.read.weight @ write)
        total = self._logits(moved, self.read.scale(self.stream + push * write))
        loss, entropy, divergence = self._measure(total)
        frozen = self._logits(moved, self.scale)
        held = total - ((total - self.clean) @ self.direction)[:, None] * self.direction
        return Ablation(
            loss=loss - self.loss,
            loss_frozen_scale=self._loss(frozen) - self.loss,
            loss_held_frequency=self._loss(held) - self.loss,
            entropy=entropy - self.entropy,
            divergence=divergence - self.divergence,
            push=push[:, 0],
        )

    def _logits(self, unscaled: Tensor, scale: Tensor) -> Tensor:
        logits = unscaled * scale
        return logits if self.read.offset is None else logits + self.read.offset

    def _loss(self, logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, self.targets, reduction="none")

    def _measure(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, entropy and KL(p || unigram) at each position."""
        log_q = logits.log_softmax(-1)
        q = log_q.exp()
        entropy = -(q * log_q).sum(-1)
        loss = -log_q.gather(-1, self.targets[:, None])[:, 0]
        return loss, entropy, -entropy - q @ self.log_p


def _mediated(direct: Tensor, total: Tensor) -> float:
    whole = total.abs().mean()
    if not bool(whole > 0):
        raise ValueError("ablating the neuron changes no loss, so there is no share of the effect to speak of")
    return float(1 - direct.abs().mean() / whole)


def _frequency(log_p: Tensor) -> Tensor:
    return log_p - log_p.mean()


def _require_width(writes: Tensor, weight: Tensor) -> None:
    if writes.ndim != 2 or writes.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected rows as wide as the stream, (rows, {weight.shape[1]}), got {tuple(writes.shape)}; a "
            "down-projection's columns are the writes: pass its weight transposed"
        )
