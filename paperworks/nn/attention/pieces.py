"""Attention divided into dense pieces, so that nothing hidden is computed.

Documents packed in one row are blocks on the diagonal, a window is a band; a dense mask over all of the row would cost
its length squared in time and memory. The pieces are what xFormers (github.com/facebookresearch/xformers) calls
block-diagonal and local attention biases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# A call of the kernel costs as much as so many scores: measured on a CPU, where pieces are used
CALL = 1024


@dataclass(frozen=True, eq=False)
class Piece:
    """Some queries and all the keys that they see.

    Attributes:
        rows, queries, keys: slices of the batch, of the queries and of the keys.
        causal: whether the queries see each other causally; there are as many keys then, the same tokens.
        mask: bool (queries, keys), True where a key is seen; None for all (or causal).
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool = False
    mask: Bool[Tensor, "queries keys"] | None = None

    def seen(self, device: torch.device) -> Bool[Tensor, "queries keys"]:
        """Which of its keys each of its queries sees."""
        if self.mask is not None:
            return self.mask
        size = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        everything = torch.ones(size, dtype=torch.bool, device=device)
        return everything.tril() if self.causal else everything


def dense_mask(
    pieces: Sequence[Piece], queries: int, keys: int, device: torch.device
) -> Bool[Tensor, "rows 1 queries keys"]:
    """What the pieces show as one mask; rows is 1 where every piece holds for the whole batch."""
    rows = 1 if all(piece.rows == slice(None) for piece in pieces) else max(piece.rows.stop for piece in pieces)
    mask = torch.zeros(rows, 1, queries, keys, dtype=torch.bool, device=device)
    for piece in pieces:
        mask[piece.rows, :, piece.queries, piece.keys] |= piece.seen(device)
    return mask


def by_piece(
    pieces: Sequence[Piece],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, Piece], Tensor],
) -> Tensor:
    """(batch, heads, time, dim) by a call of `attend` for each piece.

    The pieces of each row of the batch stand in the order of its queries and leave none out; rows come in order.
    """
    by_rows: dict[int | None, list[Tensor]] = {}
    for piece in pieces:
        seen = (piece.rows, slice(None), piece.keys)
        out = attend(queries[piece.rows, :, piece.queries], keys[seen], values[seen], piece)
        by_rows.setdefault(piece.rows.start, []).append(out)
    return torch.cat([torch.cat(row, 2) for row in by_rows.values()])


def band(time: int, window: int, device: torch.device, *, rows: slice = slice(None), start: int = 0) -> Iterator[Piece]:
    """Divide causal attention with a window over the tokens start ... start + time - 1 into chunks of queries."""
    chunk = max(window, 64)
    masks: dict[tuple[int, int], Tensor] = {}
    for begin in range(0, time, chunk):
        end, first = min(begin + chunk, time), max(0, begin - window + 1)
        size = (end - begin, begin - first)
        queries = slice(start + begin, start + end)
        keys = slice(start + first, start + end)
        if end <= window and not first and not begin:
            yield Piece(rows, queries, keys, causal=True)
            continue
        if size not in masks:
            key = torch.arange(first, end, device=device)
            query = torch.arange(begin, end, device=device)[:, None]
            masks[size] = (key <= query) & (key > query - window)
        yield Piece(rows, queries, keys, mask=masks[size])


def documents(
    segments: Int[Tensor, "rows time"], *, causal: bool, window: int | None = None
) -> tuple[Piece, ...] | None:
    """Divide attention of packed rows into their documents (runs of one segment).

    None where that cannot be: a segment that goes on after another one has stood between.
    """
    borders = segments[:, 1:] != segments[:, :-1]
    time = segments.shape[1]
    pieces: list[Piece] = []
    for row, (ids, changes) in enumerate(zip(segments, borders, strict=True)):
        edges = [0, *(changes.nonzero()[:, 0] + 1).tolist(), time]
        names = ids[torch.tensor(edges[:-1], device=ids.device)].tolist()
        if len(set(names)) < len(names):
            return None
        rows = slice(row, row + 1)
        for start, end in itertools.pairwise(edges):
            if window is not None and window < end - start:
                pieces.extend(band(end - start, window, segments.device, rows=rows, start=start))
            else:
                pieces.append(Piece(rows, slice(start, end), slice(start, end), causal=causal))
    return tuple(pieces)


def worthwhile(pieces: Sequence[Piece], rows: int, queries: int, keys: int) -> bool:
    """Whether the pieces cost less than half of the scores of the whole."""
    cost = sum(
        CALL
        + (rows if piece.rows == slice(None) else piece.rows.stop - piece.rows.start)
        * (piece.queries.stop - piece.queries.start)
        * (piece.keys.stop - piece.keys.start)
        for piece in pieces
    )
    out: bool = 2 * cost < rows * queries * keys
    return out
