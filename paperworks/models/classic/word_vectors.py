"""Word vectors: skip-gram and CBOW, with a tree or with negative samples (Mikolov et al. 2013: word2vec)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from paperworks.models.classic.huffman import TreePaths, huffman_paths
from paperworks.nn import Spec

Architecture = Literal["skip-gram", "cbow"]


@dataclass(frozen=True, kw_only=True)
class WordVectors(Spec):
    """Two tables of vectors and no hidden layer: a word's own, and that of what is predicted.

    "skip-gram": a word predicts each of its contexts; "cbow": the mean (or sum) of the contexts predicts the word
    (arXiv:1301.3781). Predicted is either a "softmax-tree", p(w) = prod over the path of sigmoid(+-node . h), or, by
    "negative sampling", that a pair was observed: sigmoid(v_context . v_word), against `negatives` random contexts a
    pair (arXiv:1310.4546).

    Trained by `train.fit` with `word_vector_loss` on `data.word_contexts.WordContexts`, and as published with plain SGD
    on the sum over pairs, its rate falling linearly from 0.025 (CBOW: 0.05) to nothing:
    `Settings(lr=0.025, schedule="linear", warmup=0, min_lr=0, optimizer=train.SGD(), clip=None)`.
    A word or node that is frequent in a batch takes all its pairs at once: batches of some 256 words for a vocabulary
    of hundreds, 64 for a tree (whose root is in every pair), 1,000 for thousands; larger ones diverge at this rate.

    Attributes:
        vocab_size, dim: words, and numbers a vector has.
        negatives: noise words a pair (k); 5 to 20 for small corpora. Without any, nothing keeps vectors apart.
        combine: of contexts in "cbow": their "mean", their "sum", or the way of the published "program": forward
            the mean, backward the sum, so that each context gets the whole gradient. It is no gradient of any loss,
            only a faster rate for the word vectors.
        sparse: gradients of the rows a batch touches only, with plain SGD: for vocabularies beyond some 20,000 words.
    """

    vocab_size: int
    dim: int
    architecture: Architecture = "skip-gram"
    output: Literal["softmax-tree", "negative sampling"] = "negative sampling"
    negatives: int = 5
    combine: Literal["mean", "sum", "program"] = "program"
    sparse: bool = False

    def validate(self) -> None:
        """Check the sizes."""
        if self.vocab_size < 2:
            raise ValueError(f"WordVectors.vocab_size must be at least 2, got {self.vocab_size}")
        if self.dim < 1:
            raise ValueError(f"WordVectors.dim must be at least 1, got {self.dim}")
        if self.negatives < 0:
            raise ValueError(f"WordVectors.negatives must be 0 or more, got {self.negatives}")

    def build(self, counts: Sequence[int] | None = None) -> WordVectorModel:
        """The model: word vectors uniform in +-0.5 / dim, predicted ones zero.

        `counts`: how often each word occurs, most needed for the tree. Raises ValueError when the tree has none.
        """
        if self.output == "softmax-tree":
            if counts is None:
                raise ValueError("a softmax-tree is built from how often words occur: build(counts=vocabulary.counts)")
            if len(counts) != self.vocab_size:
                raise ValueError(f"build got {len(counts)} counts for a vocabulary of {self.vocab_size}")
            return WordVectorModel(self, huffman_paths(counts))
        return WordVectorModel(self, None)


class WordVectorModel(nn.Module):
    """The module of `WordVectors`. Its vectors are `input.weight`; `output` has contexts, or the tree's nodes.

    Set `words` (in the order of their ids) to ask by name.
    """

    tree_nodes: Tensor
    tree_codes: Tensor
    tree_passed: Tensor

    def __init__(self, spec: WordVectors, paths: TreePaths | None) -> None:
        super().__init__()
        self.spec = spec
        self.words: Sequence[str] | None = None
        self.input = nn.Embedding(spec.vocab_size, spec.dim, sparse=spec.sparse)
        rows = spec.vocab_size if paths is None else spec.vocab_size - 1
        self.output = nn.Embedding(rows, spec.dim, sparse=spec.sparse)
        if paths is not None:
            self.register_buffer("tree_nodes", paths.nodes)
            self.register_buffer("tree_codes", paths.codes)
            self.register_buffer("tree_passed", paths.passed)
        if self.input.weight.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw afresh."""
        self.input.weight.uniform_(-0.5 / self.spec.dim, 0.5 / self.spec.dim)
        self.output.weight.zero_()

    def forward(self, words: Int[Tensor, "*any"]) -> Float[Tensor, "*any dim"]:
        """The vectors of words."""
        vectors: Tensor = self.input(words)
        return vectors

    @torch.no_grad()
    def log_probabilities(self, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows words"]:
        """log p(word | hidden) of the tree. Raises ValueError for a model without one."""
        if self.spec.output != "softmax-tree":
            raise ValueError(
                "negative sampling is no model of p(context | word): only a softmax-tree has probabilities"
            )
        scores = hidden @ self.output.weight.T
        turned = scores[:, self.tree_nodes] * torch.where(self.tree_codes, -1.0, 1.0)
        return (functional.logsigmoid(turned) * self.tree_passed).sum(-1)

    def nearest(self, word: str | int | Tensor, count: int = 10) -> list[tuple[Any, float]]:
        """The words of largest cosine with a word (itself left out) or a vector, and the cosines."""
        if isinstance(word, Tensor):
            return self._nearest(word, [], count)
        index = self._index(word)
        return self._nearest(self.input.weight.detach()[index], [index], count)

    def analogy(self, a: str | int, b: str | int, c: str | int, count: int = 1) -> list[tuple[Any, float]]:
        """Answer "a is to b as c is to ?": the largest cosine with b - a + c of unit vectors, a, b and c left out."""
        asked = [self._index(word) for word in (a, b, c)]
        unit = self.unit_vectors()
        return self._nearest(unit[asked[1]] - unit[asked[0]] + unit[asked[2]], asked, count)

    @torch.no_grad()
    def unit_vectors(self) -> Float[Tensor, "words dim"]:
        """The vectors, each of length 1."""
        return functional.normalize(self.input.weight, dim=-1)

    def _index(self, word: str | int) -> int:
        if isinstance(word, str):
            if self.words is None:
                raise ValueError(
                    f"this model does not know what its words are called: set model.words, or ask by id; asked {word!r}"
                )
            if word not in self.words:
                raise ValueError(f"{word!r} is not among the {len(self.words)} words of this model")
            return list(self.words).index(word)
        if not 0 <= word < self.spec.vocab_size:
            raise ValueError(f"the word {word} is outside the vocabulary of {self.spec.vocab_size}")
        return word

    @torch.no_grad()
    def _nearest(self, vector: Tensor, without: list[int], count: int) -> list[tuple[Any, float]]:
        cosines = self.unit_vectors() @ functional.normalize(vector, dim=0)
        cosines[without] = -torch.inf
        best = cosines.topk(min(count, len(cosines) - len(without)))
        return [
            (index if self.words is None else self.words[index], value)
            for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


@torch.no_grad()
def analogy_accuracy(
    vectors: Float[Tensor, "words dim"], questions: Int[Tensor, "questions 4"], chunk: int = 1024
) -> float:
    """The share of questions (a, b, c, d) whose d has the largest cosine with b - a + c, all but a, b, c asked.

    Vectors are brought to length 1 first, as in the published evaluation; only an exact match counts.
    """
    if questions.dim() != 2 or questions.shape[1] != 4 or not len(questions):
        raise ValueError(f"questions are rows of four words (a, b, c, d), got {tuple(questions.shape)}")
    unit, right = functional.normalize(vectors, dim=-1), 0
    for some in questions.split(chunk):
        a, b, c, d = some.T
        cosines = functional.normalize(unit[b] - unit[a] + unit[c], dim=-1) @ unit.T
        cosines.scatter_(1, some[:, :3], -torch.inf)
        right += int((cosines.argmax(1) == d).sum())
    return right / len(questions)


def negative_sampling_loss(
    word: Float[Tensor, "pairs dim"],
    context: Float[Tensor, "pairs dim"],
    noise: Float[Tensor, "pairs negatives dim"],
    counted: Bool[Tensor, "pairs negatives"] | None = None,
) -> Float[Tensor, " pairs"]:
    """-log sigmoid(v_c . v_w) - sum_i log sigmoid(-v_{n_i} . v_w) of each pair (arXiv:1310.4546, equation 4).

    `counted`: which noise words count; the published program leaves out those that equal the context.
    """
    positive = -functional.logsigmoid((word * context).sum(-1))
    scores = torch.einsum("pd,pnd->pn", word, noise)
    against = functional.softplus(scores)
    return positive + (against if counted is None else against * counted).sum(-1)


def pair_scores_loss(
    left: Float[Tensor, "rows left dim"],
    right: Float[Tensor, "rows right dim"],
    times: Float[Tensor, "rows left right"],
    yes: Float[Tensor, "rows left right"],
) -> Float[Tensor, ""]:
    """Sum over pairs of times * softplus(s) - yes * s with s = left . right: logistic losses of whole blocks.

    `times`: how often a pair is asked, `yes`: how often the answer is yes, so that the gradient of a score is
    times * sigmoid(s) - yes. All scores, and both gradients, are one matrix product each.
    """
    loss: Tensor = _PairScores.apply(left, right, times, yes)  # type: ignore[no-untyped-call]
    return loss


FURTHEST = 80.0  # a score beyond it counts as this much: there float32's sigmoid is 0 or 1 to 35 digits


class _PairScores(torch.autograd.Function):
    """The gradient is known in closed form when the scores are: it is kept instead of what autograd would keep."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, times: Tensor, yes: Tensor) -> Tensor:
        loss, to_scores = _logistic(left, right, times, yes)
        ctx.save_for_backward(left, right, to_scores)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        left, right, to_scores = ctx.saved_tensors
        to_scores = to_scores * above[0]
        return torch.bmm(to_scores, right), torch.bmm(to_scores.transpose(1, 2), left), None, None


def _logistic(left: Tensor, right: Tensor, times: Tensor, yes: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of `pair_scores_loss`, and its derivative by each score."""
    scores = torch.bmm(left, right.transpose(1, 2)).clamp_(-FURTHEST, FURTHEST)
    yeses = scores.sigmoid()
    # softplus(s) = s - log sigmoid(s), at a tenth of the time of torch's softplus
    loss = torch.dot(scores.flatten(), (times - yes).flatten())
    loss -= torch.dot(yeses.log().flatten(), times.flatten())
    return loss, yeses.mul_(times).sub_(yes)


class _SparsePairScores(torch.autograd.Function):
    """The same of rows of two tables, looked up here: their gradients are sparse and have each row once, in order.

    So nobody sorts them again, and a step has one node of autograd instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, one: Tensor, other: Tensor, lefts: Tensor, rights: Tensor, times: Tensor, yes: Tensor
    ) -> Tensor:
        left = one.index_select(0, lefts.flatten()).view(*lefts.shape, -1)
        right = other.index_select(0, rights.flatten()).view(*rights.shape, -1)
        loss, to_scores = _logistic(left, right, times, yes)
        ctx.save_for_backward(left, right, to_scores, lefts, rights)
        ctx.shapes = one.shape, other.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        left, right, to_scores, lefts, rights = ctx.saved_tensors
        to_scores = to_scores * above[0]
        to_left = _sparse_rows(lefts, torch.bmm(to_scores, right), ctx.shapes[0])
        to_right = _sparse_rows(rights, torch.bmm(to_scores.transpose(1, 2), left), ctx.shapes[1])
        return to_left, to_right, None, None, None, None


def _sparse_rows(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A table that is zero but for the sums of the values of each id."""
    rows, places = torch.unique(ids, return_inverse=True)
    total = values.new_zeros(len(rows), values.shape[-1]).index_add_(0, places.flatten(), values.flatten(0, -2))
    return torch.sparse_coo_tensor(rows[None], total, shape, is_coalesced=True, check_invariants=False)


def _rows_loss(model: WordVectorModel, lefts: Tensor, rights: Tensor, times: Tensor, yes: Tensor) -> Tensor:
    """`pair_scores_loss` of rows of the two tables."""
    if model.spec.sparse:
        loss: Tensor = _SparsePairScores.apply(model.input.weight, model.output.weight, lefts, rights, times, yes)  # type: ignore[no-untyped-call]
        return loss
    return pair_scores_loss(_rows(model.input, lefts), _rows(model.output, rights), times, yes)


def word_vector_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum over all pairs (skip-gram) or centres (CBOW) of a batch of `WordContexts`.

    Negative sampling: the noise words of a row are shared by its centres, each weighted so that a pair has `negatives`
    of them in expectation; where a noise word equals the context it does not count, as in the published program.

    Raises:
        ValueError: when negative sampling is asked for and the batch has no noise words.
    """
    assert isinstance(model, WordVectorModel)
    spec, near, words = model.spec, batch["near"], batch["words"]
    span = near.shape[1]
    window = (words.shape[1] - span) // 2
    centres = words[:, window : window + span]
    near = near.to(model.input.weight.dtype)
    if spec.output == "softmax-tree":
        return _tree_loss(model, words, centres, near)
    if spec.negatives and "noise" not in batch:
        raise ValueError("negative sampling needs noise words: WordContexts(noise=...), 16 to 64 a row")
    noise = batch.get("noise", words[:, :0])
    if spec.architecture == "skip-gram":
        contexts, times = words, near
        met = torch.bmm(near, (words[:, :, None] == noise[:, None]).to(near.dtype))
    else:
        asked = near.any(-1).to(near.dtype)
        contexts, times = centres, torch.diag_embed(asked)
        met = asked[..., None] * (centres[:, :, None] == noise[:, None])
    asked_of, yes = contexts, times
    if spec.negatives:
        against = (times.sum(-1, keepdim=True) - met) * (spec.negatives / noise.shape[1])
        asked_of = torch.cat((contexts, noise), 1)
        yes = torch.cat((times, torch.zeros_like(against)), 2)
        times = torch.cat((times, against), 2)
    if spec.architecture == "skip-gram":
        return _rows_loss(model, centres, asked_of, times, yes)
    return pair_scores_loss(_combined(model, words, near), _rows(model.output, asked_of), times, yes)


def _rows(table: nn.Embedding, ids: Int[Tensor, "rows some"]) -> Float[Tensor, "rows some dim"]:
    """Vectors; the dense gradient of index_select takes a third of the time of an embedding's."""
    if table.sparse:
        vectors: Tensor = table(ids)
        return vectors
    return table.weight.index_select(0, ids.flatten()).view(*ids.shape, -1)


def _combined(model: WordVectorModel, words: Tensor, near: Tensor) -> Tensor:
    """The mean or sum of each centre's contexts; zero where there is none."""
    total = torch.bmm(near, _rows(model.input, words))
    if model.spec.combine == "sum":
        return total
    count = near.sum(-1, keepdim=True).clamp(min=1)
    return total / count if model.spec.combine == "mean" else total - (total - total / count).detach()


def _tree_loss(model: WordVectorModel, words: Tensor, centres: Tensor, near: Tensor) -> Tensor:
    """Each context predicts the centre's path (skip-gram), or all of them together do (CBOW).

    Skip-gram in the published program's direction: the window is the centre's, and the context is the one that
    predicts. Over a corpus both directions are the same pairs.
    """
    nodes = model.tree_nodes[centres]
    rows, span, longest = nodes.shape
    right = _rows(model.output, nodes.flatten(1))
    if model.spec.architecture == "skip-gram":
        left, pairs = _rows(model.input, words), near.transpose(1, 2)
    else:
        left, pairs = _combined(model, words, near), torch.diag_embed(near.any(-1).to(near.dtype))
    passed = model.tree_passed[centres].to(near.dtype)
    times = pairs[..., None] * passed[:, None]
    straight = (~model.tree_codes[centres]).to(near.dtype)  # code 0 is sigmoid(+s)
    yes = times * straight[:, None]
    shape = (rows, left.shape[1], span * longest)
    return pair_scores_loss(left, right, times.reshape(shape), yes.reshape(shape))
