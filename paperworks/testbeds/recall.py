"""Synthetic tasks of memory: selective copying, induction heads, associative recall (Arjovsky 2016, Gu & Dao 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100

Batch = dict[str, Tensor]  # "tokens" and "targets", int64 (batch, time); -100 where nothing is asked


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying:
    """A few tokens scattered among noise, then as many marks: at each mark the next token is to be said.

    Attributes:
        alphabet: tokens to remember, 0 .. alphabet - 1; noise and mark are the two ids after them.
        count: how many are scattered; spread: over how many places.
    """

    alphabet: int = 8
    count: int = 4
    spread: int = 24

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.spread:
            raise ValueError(f"count ({self.count}) tokens do not fit in spread ({self.spread}) places")

    @property
    def vocab_size(self) -> int:
        """Ids there are."""
        return self.alphabet + 2

    def draw(self, rows: int, draws: torch.Generator) -> Batch:
        """(rows, spread + count) tokens; targets are asked at the marks only."""
        noise, mark = self.alphabet, self.alphabet + 1
        kept = torch.randint(self.alphabet, (rows, self.count), generator=draws)
        places = torch.rand(rows, self.spread, generator=draws).argsort(1)[:, : self.count].sort(1).values
        scattered = torch.full((rows, self.spread), noise).scatter(1, places, kept)
        tokens = torch.cat((scattered, torch.full((rows, self.count), mark)), 1)
        targets = torch.cat((torch.full((rows, self.spread), IGNORED), kept), 1)
        return {"tokens": tokens, "targets": targets}


@dataclass(frozen=True, kw_only=True)
class InductionHeads:
    """Random tokens with one special token followed by an answer; at the end the special token stands again.

    Attributes:
        alphabet: other tokens there are; the special one is the id after them.
        length: tokens of a row, the last special one included.
    """

    alphabet: int = 16
    length: int = 64

    def __post_init__(self) -> None:
        if self.length < 4:
            raise ValueError(f"length must be at least 4: a question, its answer, something between; got {self.length}")

    @property
    def vocab_size(self) -> int:
        """Ids there are."""
        return self.alphabet + 1

    def draw(self, rows: int, draws: torch.Generator) -> Batch:
        """(rows, length) tokens; one target, at the end."""
        tokens = torch.randint(self.alphabet, (rows, self.length), generator=draws)
        place = torch.randint(self.length - 2, (rows, 1), generator=draws)
        answer = tokens.gather(1, place + 1)
        tokens.scatter_(1, place, self.alphabet)
        tokens[:, -1] = self.alphabet
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -1:] = answer
        return {"tokens": tokens, "targets": targets}


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall:
    """Pairs of a key and a value, all keys different; then keys again, in another order, each value to be said.

    Attributes:
        keys, values: how many of each there are (ids 0 .. keys - 1, then values).
        pairs: pairs a row.
        queries: keys asked at the end; None asks all.
    """

    keys: int = 32
    values: int = 32
    pairs: int = 16
    queries: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys:
            raise ValueError(f"pairs ({self.pairs}) need as many different keys, there are {self.keys}")
        if self.queries is not None and not 1 <= self.queries <= self.pairs:
            raise ValueError(f"queries must be between 1 and pairs ({self.pairs}), got {self.queries}")

    @property
    def vocab_size(self) -> int:
        """Ids there are."""
        return self.keys + self.values

    def draw(self, rows: int, draws: torch.Generator) -> Batch:
        """(rows, 2 pairs + queries) tokens; targets are asked at the keys of the end."""
        keys = torch.rand(rows, self.keys, generator=draws).argsort(1)[:, : self.pairs]
        values = self.keys + torch.randint(self.values, (rows, self.pairs), generator=draws)
        order = torch.rand(rows, self.pairs, generator=draws).argsort(1)[:, : self.queries]
        shown = torch.stack((keys, values), 2).flatten(1)
        tokens = torch.cat((shown, keys.gather(1, order)), 1)
        targets = torch.cat((torch.full_like(shown, IGNORED), values.gather(1, order)), 1)
        return {"tokens": tokens, "targets": targets}


@dataclass(frozen=True, kw_only=True)
class RepeatedPairs:
    """Documents that show a map from keys to values by repeated pairs; each value is asked for at its key.

    Attributes:
        keys, values: how many of each there are (ids 0 .. keys - 1, then values).
        pairs: pairs a row, drawn with replacement.
        one_map: a seed whose map all rows share, or None: each row has a map of its own.
        fewest: each row uses from so many to all of the keys, drawn by row; None: all of them. Rows of few keys repeat
            soon, and are what a model learns from first.
    """

    keys: int = 16
    values: int = 16
    pairs: int = 40
    one_map: int | None = None
    fewest: int | None = None

    def __post_init__(self) -> None:
        if self.fewest is not None and not 1 <= self.fewest <= self.keys:
            raise ValueError(f"fewest must be between 1 and the {self.keys} keys, got {self.fewest}")
        if min(self.keys, self.values, self.pairs) < 1:
            raise ValueError(f"keys, values and pairs must be at least 1, got {self.keys}, {self.values}, {self.pairs}")

    @property
    def vocab_size(self) -> int:
        """Ids there are."""
        return self.keys + self.values

    def draw(self, rows: int, draws: torch.Generator) -> Batch:
        """(rows, 2 pairs) tokens; targets are asked at every key, seen before or not."""
        own = draws if self.one_map is None else torch.Generator().manual_seed(self.one_map)
        maps = torch.randint(self.values, (rows if self.one_map is None else 1, self.keys), generator=own)
        keys = torch.randint(self.keys, (rows, self.pairs), generator=draws)
        if self.fewest is not None:
            used = torch.randint(self.fewest, self.keys + 1, (rows, 1), generator=draws)
            keys = torch.rand(rows, self.keys, generator=draws).argsort(1).gather(1, keys % used)
        values = self.keys + maps.expand(rows, -1).gather(1, keys)
        tokens = torch.stack((keys, values), 2).flatten(1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, ::2] = values
        return {"tokens": tokens, "targets": targets}
