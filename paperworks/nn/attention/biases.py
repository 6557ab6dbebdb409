"""What hides keys from queries as objects instead of dense masks: the attention biases of xFormers.

github.com/facebookresearch/xformers (2022). `memory_efficient_attention` takes any of them; each can be made a dense
mask with `materialize`, which is how they are checked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.nn.attention.pieces import Piece, dense_mask

ROWS = 256  # queries at a time where keys begin or end with the query: masks are so many rows high


@dataclass(frozen=True)
class AttentionBias:
    """Which keys each query sees, as dense pieces."""

    def pieces(self, queries: int, keys: int, device: torch.device) -> tuple[Piece, ...]:
        """Divide attention of so many queries to so many keys. Raises `ValueError` for sizes not the bias's."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it hides")

    def materialize(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (a value)
    ) -> Float[Tensor, "*batch queries keys"]:
        """The dense bias: 0 where a key is seen, -inf where not, of a shape that ends in (queries, keys)."""
        seen = dense_mask(self.pieces(shape[-2], shape[-1], device), shape[-2], shape[-1], device)[0, 0]
        bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -math.inf)
        return bias.expand(tuple(shape))


@dataclass(frozen=True)
class LowerTriangularMask(AttentionBias):
    """Causal, aligned top-left: query i sees the keys 0 ... i, however many there are."""

    def pieces(self, queries: int, keys: int, device: torch.device) -> tuple[Piece, ...]:
        """Divide the triangle; queries beyond the last key see all."""
        square = min(queries, keys)
        first = Piece(slice(None), slice(0, square), slice(0, square), causal=True)
        if queries <= keys:
            return (first,)
        return first, Piece(slice(None), slice(square, queries), slice(0, keys))


@dataclass(frozen=True)
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window, aligned bottom-right: the last query stands at the last key.

    Attributes:
        window_left: keys seen before the query's own, None for all; window_right: keys seen after it.
    """

    window_left: int | None
    window_right: int

    def __post_init__(self) -> None:
        for name, size in (("window_left", self.window_left), ("window_right", self.window_right)):
            if size is not None and size < 0:
                raise ValueError(f"{type(self).__name__}.{name} must be at least 0, got {size}")

    def pieces(self, queries: int, keys: int, device: torch.device) -> tuple[Piece, ...]:
        """Divide the band into chunks of queries with the keys that any of them sees."""
        if queries == keys and self.window_left is None and not self.window_right:
            return (Piece(slice(None), slice(0, queries), slice(0, keys), causal=True),)
        return tuple(self._chunks(queries, keys, device))

    def _chunks(self, queries: int, keys: int, device: torch.device) -> Iterator[Piece]:
        for begin in range(0, queries, ROWS):
            end = min(begin + ROWS, queries)
            at = torch.arange(begin, end, device=device)[:, None] + keys - queries
            left = 0 if self.window_left is None else int(at[0, 0]) - self.window_left
            first, last = min(max(0, left), keys), min(max(0, int(at[-1, 0]) + self.window_right + 1), keys)
            key = torch.arange(first, last, device=device)
            seen = key <= at + self.window_right
            if self.window_left is not None:
                seen &= key >= at - self.window_left
            yield Piece(slice(None), slice(begin, end), slice(first, last), mask=seen)


@dataclass(frozen=True)
class LowerTriangularFromBottomRightMask(LocalAttentionFromBottomRightMask):
    """Causal, aligned bottom-right: with a cache before the queries, each sees all of it and the queries so far."""

    window_left: int | None = field(default=None, init=False)
    window_right: int = field(default=0, init=False)


@dataclass(frozen=True)
class BlockDiagonalMask(AttentionBias):
    """Sequences of unequal length, one after another in one row: each query sees the keys of its own sequence.

    Attributes:
        q_seqlen, kv_seqlen: tokens of each sequence among the queries, and among the keys.
        kv_padding: slots that each sequence has among the keys, where these are padded to a capacity; None for none.
    """

    q_seqlen: tuple[int, ...]
    kv_seqlen: tuple[int, ...]
    kv_padding: int | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, kv_padding: int | None = None
    ) -> BlockDiagonalMask:
        """The mask for these lengths; keys are as many as queries where `kv_seqlen` is not given."""
        return cls(tuple(q_seqlen), tuple(q_seqlen if kv_seqlen is None else kv_seqlen), kv_padding)

    def __post_init__(self) -> None:
        if len(self.q_seqlen) != len(self.kv_seqlen) or not self.q_seqlen:
            raise ValueError(
                f"each of one or more sequences has queries and keys, got {len(self.q_seqlen)} lengths of queries and "
                f"{len(self.kv_seqlen)} of keys"
            )
        if min(*self.q_seqlen, *self.kv_seqlen) < 1:
            raise ValueError("a sequence of no tokens cannot be attended to: leave it out")
        if self.kv_padding is not None and max(self.kv_seqlen) > self.kv_padding:
            raise ValueError(f"{max(self.kv_seqlen)} keys do not fit in a kv_padding of {self.kv_padding}")

    def split(self, packed: Tensor) -> list[Tensor]:
        """The sequences of (1, queries, ...)."""
        return list(packed.split(list(self.q_seqlen), 1))

    def within(self) -> AttentionBias | None:
        """What hides keys inside a sequence; None for nothing."""
        return None

    def pieces(self, queries: int, keys: int, device: torch.device) -> tuple[Piece, ...]:
        """Divide into sequences, and these as `within` does."""
        held = self.kv_padding * len(self.kv_seqlen) if self.kv_padding is not None else sum(self.kv_seqlen)
        if queries != sum(self.q_seqlen) or keys != held:
            raise ValueError(
                f"{type(self).__name__} is for {sum(self.q_seqlen)} queries and {held} keys, got {queries} and {keys}"
            )
        starts = itertools.accumulate(self.q_seqlen, initial=0)
        slots = [self.kv_padding] * len(self.kv_seqlen) if self.kv_padding is not None else self.kv_seqlen
        found: list[Piece] = []
        for start, slot, own, other in zip(
            starts, itertools.accumulate(slots, initial=0), self.q_seqlen, self.kv_seqlen, strict=False
        ):
            bias = self.within()
            parts = (Piece(slice(None), slice(0, own), slice(0, other)),)
            for part in parts if bias is None else bias.pieces(own, other, device):
                moved = (
                    slice(start + part.queries.start, start + part.queries.stop),
                    slice(slot + part.keys.start, slot + part.keys.stop),
                )
                found.append(Piece(part.rows, *moved, part.causal, part.mask))
        return tuple(found)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The same sequences, each causal from its top left."""
        return BlockDiagonalCausalMask(self.q_seqlen, self.kv_seqlen, self.kv_padding)


@dataclass(frozen=True)
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Sequences in one row, each causal, aligned top-left."""

    def within(self) -> AttentionBias:
        """The triangle."""
        return LowerTriangularMask()


@dataclass(frozen=True)
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalMask):
    """Sequences in one row over caches padded to `kv_padding`: the last query of each stands at its last key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_padding is None:
            raise ValueError("padded keys need kv_padding, the slots of each sequence")

    def within(self) -> AttentionBias:
        """The triangle, aligned bottom-right."""
        return LowerTriangularFromBottomRightMask()
