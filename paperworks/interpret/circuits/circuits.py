"""Reading circuits off the weights of attention (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits", transformer-circuits.pub/2021/framework).

Row vectors throughout: a token's x is a row, W_OV = W_V W_O and W_QK = W_Q W_K^T are dim x dim, of rank at most
head_dim. They are kept as two thin factors. Fold norms first (`folding.fold_norms`): the gain is part of what a head
reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from paperworks.core.linear import bias_of, weight_of
from paperworks.interpret.taps import record

Kind = Literal["Q", "K", "V"]


@dataclass(frozen=True)
class Factored:
    """The matrix left @ right, never multiplied out unless asked: its rank is at most that of the thin middle."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    def __post_init__(self) -> None:
        if self.left.dim() != 2 or self.right.dim() != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"factors do not fit: {tuple(self.left.shape)} and {tuple(self.right.shape)}")

    def __matmul__(self, other: Factored | Tensor) -> Factored:
        """The product with another factored matrix, or with a plain one on the right."""
        if isinstance(other, Tensor):
            return Factored(self.left, self.right @ other)
        return Factored(self.left @ (self.right @ other.left), other.right)

    def after(self, first: Float[Tensor, "inputs rows"]) -> Factored:
        """first @ self."""
        return Factored(first @ self.left, self.right)

    @property
    def mT(self) -> Factored:
        """The transpose."""
        return Factored(self.right.mT, self.left.mT)

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The matrix itself."""
        return self.left @ self.right

    def norm(self) -> Float[Tensor, ""]:
        """The Frobenius norm, from trace(L^T L R R^T)."""
        return ((self.left.mT @ self.left) * (self.right @ self.right.mT)).sum().clamp_min(0).sqrt()

    def eigenvalues(self) -> Complex[Tensor, " rank"]:
        """The eigenvalues that can differ from 0: those of the small matrix right @ left."""
        if self.left.shape[0] != self.right.shape[1]:
            raise ValueError(
                f"only a square matrix has eigenvalues; this is {self.left.shape[0]} x {self.right.shape[1]}"
            )
        out: Tensor = torch.linalg.eigvals(self.right @ self.left)
        return out

    def svd(self) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, " rank"], Float[Tensor, "rank columns"]]:
        """(U, S, Vh) of the matrix, by thin QR of both factors: never larger than the factors."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.mT)
        inner = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
        return q_left @ inner.U, inner.S, inner.Vh @ q_right.mT


def attention_of(model: nn.Module, layer: int) -> Any:
    """The attention module of a block of one of our models; raises `ValueError` for another kind."""
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None:
        raise ValueError(
            f"{type(model).__name__} has no blocks; convert it with paperworks.checkpoints.from_transformers first"
        )
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"block {layer}: the model has blocks 0 to {len(blocks) - 1}")
    mixer = blocks[layer].mixer
    if not all(hasattr(mixer, name) for name in ("query", "key", "value", "output", "heads")):
        raise ValueError(f"block {layer} mixes by {type(mixer).__name__}, which has no queries, keys and values")
    return mixer


def _slice(mixer: Any, head: int) -> tuple[slice, slice]:
    """The rows of query (and output) and those of key and value that belong to a query head."""
    heads, kv_heads, size = mixer.spec.heads, mixer.kv_heads, mixer.head_dim
    if not 0 <= head < heads:
        raise ValueError(f"head {head}: the layer has heads 0 to {heads - 1}")
    shared = head // (heads // kv_heads)  # grouped queries: consecutive heads share keys and values
    return slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)


def ov_circuit(mixer: Any, head: int) -> Factored:
    """W_OV = W_V W_O of a head: what it writes where it attends to x is x W_OV."""
    own, shared = _slice(mixer, head)
    return Factored(weight_of(mixer.value)[shared].mT.detach(), weight_of(mixer.output)[:, own].mT.detach())


def qk_circuit(mixer: Any, head: int) -> Factored:
    """W_QK = W_Q W_K^T of a head: x attends to y by the score x W_QK y^T * scale.

    With rotary positions this is the slice at relative position 0: others rotate the thin middle.
    """
    own, shared = _slice(mixer, head)
    return Factored(weight_of(mixer.query)[own].mT.detach(), weight_of(mixer.key)[shared].detach())


def direct_path(model: nn.Module) -> Factored:
    """W_E W_U (vocab x vocab): the bigram table that a model without layers would be."""
    embedding, unembedding = _tables(model)
    return Factored(embedding, unembedding)


def full_ov(model: nn.Module, layer: int, head: int) -> Factored:
    """W_E W_OV W_U: how attending to a source token (row) changes each output token's logit (column)."""
    embedding, unembedding = _tables(model)
    return ov_circuit(attention_of(model, layer), head).after(embedding) @ unembedding


def full_qk(model: nn.Module, layer: int, head: int) -> Factored:
    """W_E W_QK W_E^T: how much a destination token (row) looks for a source token (column)."""
    embedding, _ = _tables(model)
    return qk_circuit(attention_of(model, layer), head).after(embedding) @ embedding.mT


def _tables(model: nn.Module) -> tuple[Tensor, Tensor]:
    embedding: Any = getattr(model, "embedding", None)
    unembedding: Any = getattr(model, "unembedding", None)
    if embedding is None or unembedding is None:
        raise ValueError(
            f"{type(model).__name__} has no `embedding` and `unembedding`; convert it with "
            "paperworks.checkpoints.from_transformers first"
        )
    return embedding.weight.detach(), weight_of(unembedding).mT.detach()


def copying_score(matrix: Factored) -> float:
    """Sum Re(eigenvalue) / sum |eigenvalue| in [-1, 1]: 1 for a head that raises what it attends to."""
    values = matrix.eigenvalues()
    total = values.abs().sum().item()
    return 0.0 if total == 0 else values.real.sum().item() / total


def composition(first: Factored, second: Factored) -> float:
    """||first second||_F / (||first||_F ||second||_F): how much of what `first` writes `second` reads."""
    scale = (first.norm() * second.norm()).item()
    return 0.0 if scale == 0 else (first @ second).norm().item() / scale


def composition_scores(
    model: nn.Module, first: int = 0, second: int = 1, *, baseline: bool = True, seed: int = 0
) -> dict[Kind, Float[Tensor, "first_heads second_heads"]]:
    """Q-, K- and V-composition between all heads of an earlier and a later block.

    Q: W_OV^1 with W_QK^2, K: W_OV^1 with (W_QK^2)^T, V: W_OV^1 with W_OV^2.

    Args:
        model: one of ours, norms folded.
        first, second: the blocks.
        baseline: whether the mean score of Gaussian factors of the same shapes is subtracted.
        seed: of those (20 draws).
    """
    if first >= second:
        raise ValueError(f"the first block must come before the second; got {first} and {second}")
    early, late = attention_of(model, first), attention_of(model, second)
    scores: dict[Kind, Tensor] = {}
    expected = _chance(early, late, seed) if baseline else 0.0
    for kind in ("Q", "K", "V"):
        rows = []
        for one in range(early.spec.heads):
            writes = ov_circuit(early, one)
            rows.append([composition(writes, _reads(late, two, kind)) - expected for two in range(late.spec.heads)])
        scores[kind] = torch.tensor(rows)
    return scores


def _reads(mixer: Any, head: int, kind: Kind) -> Factored:
    if kind == "V":
        return ov_circuit(mixer, head)
    return qk_circuit(mixer, head) if kind == "Q" else qk_circuit(mixer, head).mT


def _chance(early: Any, late: Any, seed: int) -> float:
    draws = torch.Generator().manual_seed(seed)
    dim = weight_of(early.output).shape[0]

    def gaussian(rank: int) -> Factored:
        return Factored(torch.randn(dim, rank, generator=draws), torch.randn(rank, dim, generator=draws))

    return sum(composition(gaussian(early.head_dim), gaussian(late.head_dim)) for _ in range(20)) / 20


def skip_trigrams(model: nn.Module, layer: int, head: int, most: int = 10) -> list[tuple[int, int, int, float]]:
    """(source, destination, output, weight) where a head looks and copies most strongly (small vocabularies).

    For the `most` largest entries of full_qk (destination looks at source) the output that the source raises most;
    weight is the product of the score and the logit.
    """
    attends, raises = full_qk(model, layer, head).dense(), full_ov(model, layer, head).dense()
    best_logit, best_output = raises.max(1)
    top = attends.flatten().topk(min(most, attends.numel())).indices.tolist()
    found = []
    for place in top:
        destination, source = divmod(place, attends.shape[1])
        weight = (attends[destination, source] * best_logit[source]).item()
        found.append((source, destination, int(best_output[source]), weight))
    return found


@torch.no_grad()
def path_expansion(
    model: nn.Module, tokens: Int[Tensor, "batch time"]
) -> dict[tuple[str, ...], Float[Tensor, "batch time vocab"]]:
    """The logits of an attention-only model as a sum over paths, with the attention patterns as they were.

    () is the direct path, ("0.1",) the head 0.1 alone, ("0.1", "1.2") the virtual head of both: A^2 A^1 x W_OV^1 W_OV^2
    W_U. All add up to the model's logits. There are (1 + heads)^depth paths.

    Raises:
        ValueError: for a model with norms, feed-forward layers or biases, whose logits are no such sum.
    """
    blocks: Any = getattr(model, "blocks", None)
    mixers = [attention_of(model, layer) for layer in range(len(blocks or ()))]
    plain = all(
        isinstance(block.mixer_norm, nn.Identity)
        and block.feedforward is None
        and bias_of(block.mixer.value) is None
        and bias_of(block.mixer.output) is None
        for block in blocks or ()
    )
    if not mixers or not plain or not isinstance(getattr(model, "norm", None), nn.Identity | None):
        raise ValueError(
            "paths add up to the logits only in attention-only models without norms and biases: Block(norm=NoNorm(), "
            "mixer=Attention(...)), norm=None"
        )
    with record(model, ["dropout", "blocks.*.mixer.pattern"]) as seen:
        model(tokens)
    terms: dict[tuple[str, ...], Tensor] = {(): seen["dropout"]}
    for layer, mixer in enumerate(mixers):
        pattern = seen[f"blocks.{layer}.mixer.pattern"]
        new = {}
        for head in range(mixer.spec.heads):
            circuit = ov_circuit(mixer, head)
            for path, x in terms.items():
                new[(*path, f"{layer}.{head}")] = pattern[:, head] @ (x @ circuit.left) @ circuit.right
        terms.update(new)
    _, unembedding = _tables(model)
    return {path: x @ unembedding for path, x in terms.items()}
