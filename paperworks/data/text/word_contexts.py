"""What word vectors are trained on: a vocabulary with counts, subsampling, noise words, and windows of a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.core.errors import unknown

WordBatch = dict[str, Tensor]


@dataclass(frozen=True)
class WordVocabulary:
    """Words and how often each occurs, the most frequent first; equally frequent ones in alphabetical order."""

    words: tuple[str, ...]
    counts: tuple[int, ...]
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {word: number for number, word in enumerate(self.words)})

    @classmethod
    def of(cls, sentences: Iterable[Sequence[str]], min_count: int = 5) -> WordVocabulary:
        """Count words; those that occur less than `min_count` times are left out.

        Raises ValueError when none is left.
        """
        counted = Counter(word for sentence in sentences for word in sentence)
        kept = sorted(
            ((word, count) for word, count in counted.items() if count >= min_count),
            key=lambda entry: (-entry[1], entry[0]),
        )
        if not kept:
            raise ValueError(f"none of {len(counted)} words occurs {min_count} times or more; lower min_count")
        return cls(tuple(word for word, _ in kept), tuple(count for _, count in kept))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentences: Iterable[Sequence[str]]) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """All known words in one row, and the number of the sentence that each stands in; others are dropped."""
        tokens, places = [], []
        for number, sentence in enumerate(sentences):
            known = [self.index[word] for word in sentence if word in self.index]
            tokens += known
            places += [number] * len(known)
        return torch.tensor(tokens, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)


def keep_probability(
    counts: Sequence[int], threshold: float, form: Literal["paper", "tool"] = "paper"
) -> Float[Tensor, " words"]:
    """How likely each occurrence of a word survives subsampling (Mikolov et al. 2013, arXiv:1310.4546).

    f is a word's share of the corpus. "paper": min(1, sqrt(t / f)); "tool", what the published program does:
    min(1, sqrt(t / f) + t / f). A threshold of 0 keeps everything.
    """
    if form not in ("paper", "tool"):
        raise ValueError(unknown("form of subsampling", form, ("paper", "tool")))
    if threshold < 0:
        raise ValueError(f"the threshold of subsampling is a share of the corpus, 0 or more, got {threshold}")
    share = torch.tensor(counts, dtype=torch.float64)
    share = share / share.sum()
    if threshold == 0:
        return torch.ones_like(share)
    ratio = threshold / share
    kept = ratio.sqrt() if form == "paper" else ratio.sqrt() + ratio
    return kept.clamp(max=1.0)


class NoiseWords:
    """Draws words with probability count^power / sum: the noise of negative sampling; power 3/4 in the paper."""

    def __init__(self, counts: Sequence[int], power: float = 0.75) -> None:
        if min(counts, default=0) <= 0:
            raise ValueError("noise needs the counts of words that occur: every one positive, and at least one word")
        weights = torch.tensor(counts, dtype=torch.float64).pow(power)
        self.probabilities = weights / weights.sum()
        self._cumulative = self.probabilities.cumsum(0)

    def draw(self, shape: tuple[int, ...], draws: torch.Generator) -> Int[Tensor, "*shape"]:
        """Independent draws."""
        points = torch.rand(shape, generator=draws, dtype=torch.float64)
        return torch.searchsorted(self._cumulative, points).clamp_(max=len(self._cumulative) - 1)


class WordContexts:
    """Batches of neighbouring words and their contexts; an epoch is one passage over the corpus.

    A batch has `rows` rows of `span` centres side by side, and the words up to `window` before and behind them:

        "words": (rows, span + 2 window), centre i of a row is its word i + window;
        "near": (rows, span, span + 2 window), which of those words are contexts of which centre;
        "noise": (rows, noise), words drawn for the row, if any are asked for.

    The reach of a window is drawn for every centre, uniformly from 1 to `window`, so a word at distance d is a context
    with probability (window - d + 1) / window; no window crosses the end of a sentence. Subsampling comes first: the
    words it discards do not stand between others. Every centre of the corpus is in one row, with all its contexts.

    Attributes:
        tokens, sentences: as `WordVocabulary.encode` returns them.
        counts: of the vocabulary.
        window: the furthest context; `shrink` False takes it for every centre.
        subsample: the threshold t (1e-5 in the paper, for corpora of billions); 0 keeps every word.
        noise: words drawn a row; `power` of their counts.
        rows, span: centres a batch has.
    """

    def __init__(
        self,
        tokens: Int[Tensor, " tokens"],
        sentences: Int[Tensor, " tokens"],
        counts: Sequence[int],
        *,
        window: int = 5,
        shrink: bool = True,
        subsample: float = 0.0,
        form: Literal["paper", "tool"] = "tool",
        noise: int = 0,
        power: float = 0.75,
        rows: int = 32,
        span: int = 32,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("window", window, 1), ("rows", rows, 1), ("span", span, 1), ("noise", noise, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if tokens.shape != sentences.shape or tokens.dim() != 1:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and sentences {tuple(sentences.shape)} must be two rows of one length"
            )
        if len(tokens) < 2:
            raise ValueError(f"a corpus of {len(tokens)} known words has no contexts")
        if int(tokens.max()) >= len(counts) or int(tokens.min()) < 0:
            raise ValueError(f"word {int(tokens.max())} is outside the {len(counts)} counts given")
        self.tokens, self.sentences = tokens, sentences
        self.window, self.shrink, self.rows, self.span, self.seed = window, shrink, rows, span, seed
        self.noise = noise
        self._keep = keep_probability(counts, subsample, form) if subsample else None
        self._noise = NoiseWords(counts, power) if noise else None
        self.epoch = 0

    @property
    def words(self) -> int:
        """Words in the corpus, before subsampling."""
        return len(self.tokens)

    def set_epoch(self, epoch: int) -> None:
        """Say which passage over the corpus comes next; `train.fit` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches that an epoch has at most: without what subsampling leaves out of this one."""
        return -(-self._expected() // (self.rows * self.span))

    def _expected(self) -> int:
        return self.words if self._keep is None else max(1, int(self._keep[self.tokens].sum()))

    def __iter__(self) -> Iterator[WordBatch]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)  # a prime keeps pairs apart
        tokens, sentences = self.tokens, self.sentences
        if self._keep is not None:
            kept = torch.rand(len(tokens), generator=draws, dtype=torch.float64) < self._keep[tokens]
            tokens, sentences = tokens[kept], sentences[kept]
        size = self.rows * self.span
        batches = -(-len(tokens) // size)
        filled = batches * size + 2 * self.window
        words, places = torch.zeros(filled, dtype=torch.int64), torch.full((filled,), -1)
        inside = slice(self.window, self.window + len(tokens))
        words[inside], places[inside] = tokens, sentences
        band = self._distances()
        for start in range(0, batches * size, size):
            end = start + size + 2 * self.window
            own = words[start:end].unfold(0, self.span + 2 * self.window, self.span)
            where = places[start:end].unfold(0, self.span + 2 * self.window, self.span)
            batch = {"words": own, "near": self._near(where, band, draws)}
            if self._noise is not None:
                batch["noise"] = self._noise.draw((self.rows, self.noise), draws)
            yield batch

    def _distances(self) -> Int[Tensor, "span around"]:
        """How far each word of a row is from each centre; the centre itself beyond any window."""
        around = torch.arange(-self.window, self.span + self.window)
        distance = (around - torch.arange(self.span)[:, None]).abs()
        return distance.masked_fill(distance == 0, self.window + 1).to(torch.int32)

    def _near(
        self, places: Int[Tensor, "rows around"], band: Tensor, draws: torch.Generator
    ) -> Bool[Tensor, "rows span around"]:
        own = places[:, self.window : self.window + self.span, None]
        same = (own == places[:, None]) & (own >= 0)
        if not self.shrink:
            return same & (band <= self.window)
        reach = torch.randint(1, self.window + 1, own.shape, generator=draws, dtype=torch.int32)
        return same & (band <= reach)
