"""Singular directions of weights, read in the vocabulary and removed one at a time (Millidge & Black 2022,
lesswrong.com/posts/mkbGjzxD8d8XqKHzA).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.linear import weight_of
from paperworks.interpret.circuits.circuits import attention_of, ov_circuit


@dataclass(frozen=True)
class Directions:
    """The singular value decomposition of a map from and to the residual stream, row vectors: W = U S V^T.

    Attributes:
        name: whose they are, such as "12.3" for head 3 of block 12.
        reads: U^T, unit vectors in what the map reads, strongest first.
        strengths: S.
        writes: V^T, unit vectors in the residual stream it writes to.
    """

    name: str
    reads: Float[Tensor, "rank inputs"]
    strengths: Float[Tensor, " rank"]
    writes: Float[Tensor, "rank dim"]


@torch.no_grad()
def ov_directions(model: nn.Module, layer: int, head: int) -> Directions:
    """The singular directions of a head's W_OV = W_V W_O, from its thin factors."""
    u, s, vh = ov_circuit(attention_of(model, layer), head).svd()
    return Directions(f"{layer}.{head}", u.mT, s, vh)


@torch.no_grad()
def linear_directions(module: nn.Module, name: str = "linear") -> Directions:
    """The singular directions of a linear-like module; of `feedforward.down` these are its write directions."""
    u, s, vh = torch.linalg.svd(weight_of(module).mT.detach(), full_matrices=False)
    return Directions(name, u.mT, s, vh)


def vocabulary(model: nn.Module) -> Float[Tensor, "vocab dim"]:
    """The rows by which a direction of the stream is read as logits: the unembedding times the final gain."""
    unembedding: Any = getattr(model, "unembedding", None)
    if unembedding is None:
        raise ValueError(
            f"{type(model).__name__} has no `unembedding`; convert it with paperworks.checkpoints.from_transformers "
            f"first"
        )
    norm: Any = getattr(model, "norm", None)
    gain: Any = getattr(norm, "weight", None)
    weight = weight_of(unembedding).detach()
    if gain is None:
        return weight
    out: Tensor = weight * (1 + gain if getattr(norm, "offset", False) else gain).detach()
    return out


@torch.no_grad()
def top_tokens(
    directions: Float[Tensor, "count dim"], words: Float[Tensor, "vocab dim"], most: int = 20
) -> tuple[Int[Tensor, "count most"], Int[Tensor, "count most"]]:
    """The tokens each direction raises most, and those it lowers most (its other end: a sign is arbitrary)."""
    if not 1 <= most <= len(words):
        raise ValueError(f"most must be between 1 and the {len(words)} tokens of the vocabulary, got {most}")
    logits = directions @ words.mT
    return logits.topk(most).indices, (-logits).topk(most).indices


@torch.no_grad()
def coherence(tokens: Int[Tensor, "*groups most"], embedding: Float[Tensor, "vocab dim"]) -> Float[Tensor, "*groups"]:
    """The mean cosine between the embeddings of different tokens of a group, centred on the vocabulary's mean.

    Not centred, all embeddings share a direction and rare tokens look alike.
    """
    centred = embedding - embedding.mean(0)
    unit = torch.nn.functional.normalize(centred, dim=-1)[tokens]
    count = tokens.shape[-1]
    if count < 2:
        raise ValueError(f"a group needs at least two tokens to compare, got {count}")
    # sum over pairs of u_i . u_j = |sum u|^2 - sum |u|^2, without the count x count matrix
    return (unit.sum(-2).square().sum(-1) - unit.square().sum((-1, -2))) / (count * (count - 1))


@torch.no_grad()
def most_aligned(
    query: Float[Tensor, " dim"], sources: Sequence[Directions], most: int = 10
) -> list[tuple[str, int, float]]:
    """(name, index, cosine) of the write directions nearest to a direction of the stream, either sign."""
    unit = query / query.norm()
    found = [
        (source.name, index, cosine)
        for source in sources
        for index, cosine in enumerate((source.writes @ unit.to(source.writes)).tolist())
    ]
    return sorted(found, key=lambda each: -abs(each[2]))[:most]


@contextmanager
def without_direction(model: nn.Module, layer: int, head: int, index: int, alpha: float = 1.0) -> Iterator[nn.Module]:
    """Take one singular direction out of a head inside the context: W_OV' = W_OV - alpha s_i u_i v_i^T.

    Done on the head's columns of the output projection, W_O' = W_O (I - alpha v v^T); the weights are put back, bit for
    bit, afterwards. alpha = 1 removes the direction, 2 reverses it.
    """
    directions = ov_directions(model, layer, head)
    if not 0 <= index < len(directions.strengths):
        raise ValueError(f"direction {index}: head {layer}.{head} has directions 0 to {len(directions.strengths) - 1}")
    with without_write(model, layer, head, directions.writes[index], alpha):
        yield model


@contextmanager
def without_write(
    model: nn.Module, layer: int, head: int, direction: Float[Tensor, " dim"], alpha: float = 1.0
) -> Iterator[nn.Module]:
    """Keep a head from writing along any unit direction of the stream inside the context; see `without_direction`."""
    mixer = attention_of(model, layer)
    weight = mixer.output.weight
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"{type(mixer.output).__name__} has no plain weight to edit; edit an uncompressed model")
    own = slice(head * mixer.head_dim, (head + 1) * mixer.head_dim)
    before = weight.detach()[:, own].clone()
    unit = (direction / direction.norm()).to(weight)
    try:
        with torch.no_grad():
            weight[:, own] -= alpha * torch.outer(unit, unit @ before)
        yield model
    finally:
        with torch.no_grad():
            weight[:, own] = before
