"""Where the norms of a block stand: each published arrangement is a spec, and a new one is a new file.

An arrangement builds the block's module from the block's spec. The names of its parts are the same in all of them
(`mixer_norm`, `mixer`, `cross`, `feedforward` ...), so patterns, taps and checkpoints do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.spec import Spec
from paperworks.nn import MixerCache, Placement

if TYPE_CHECKING:
    from paperworks.models.block import Block


@dataclass(frozen=True, kw_only=True)
class Arrangement(Spec):
    """How the parts of a block and their norms are joined to the residual stream.

    Attributes:
        sums_branches: whether the stream after the block is the stream before it plus what the parts wrote.
        plain_branches: whether each part reads one norm of the stream and writes to it directly.
    """

    sums_branches: ClassVar[bool] = True
    plain_branches: ClassVar[bool] = False

    def check(self, block: Block) -> None:
        """Raise `ValueError` where the block has a part that this arrangement has no place for."""

    def build(self, dim: int, block: Block) -> BlockModule:
        """The module of the block for a residual stream of `dim` numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a block is built")


class BlockCache(MixerCache):
    """The caches of a block that has a mixer and a cross-attention."""

    def __init__(self, mixer: MixerCache, cross: MixerCache) -> None:
        self.mixer, self.cross = mixer, cross

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch."""
        self.mixer.reorder(rows)
        self.cross.reorder(rows)

    def bytes(self) -> int:
        """Memory held, in bytes."""
        return self.mixer.bytes() + self.cross.bytes()

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.mixer.truncate(length)
        self.cross.truncate(length)


class BlockModule(nn.Module):
    """A block's parts and norms; a subclass says in `add` how one part joins the residual stream.

    Its output is the residual stream after it.
    """

    def __init__(self, dim: int, spec: Block, *, post_norms: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.mixer_norm = spec.norm.build(dim)
        self.mixer = spec.mixer.build(dim)
        self.mixer_post_norm = spec.norm.build(dim) if post_norms else None
        self.cross_norm = spec.norm.build(dim) if spec.cross is not None else None
        self.cross = spec.cross.build(dim) if spec.cross is not None else None
        self.cross_post_norm = spec.norm.build(dim) if post_norms and spec.cross is not None else None
        self.feedforward_norm = spec.norm.build(dim) if spec.feedforward is not None else None
        self.feedforward = spec.feedforward.build(dim) if spec.feedforward is not None else None
        self.feedforward_post_norm = spec.norm.build(dim) if post_norms and spec.feedforward is not None else None
        self.dropout = nn.Dropout(spec.dropout)

    @property
    def arrangement(self) -> Arrangement:
        """Where the norms stand."""
        return self.spec.arrangement

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> MixerCache:
        """An empty cache for what moves information along time here."""
        mixer: Any = self.mixer
        own: MixerCache = mixer.new_cache(batch, capacity, dtype, device)
        if self.cross is None:
            return own
        cross: Any = self.cross
        return BlockCache(own, cross.new_cache(batch, capacity, dtype, device))

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Add the mixer, the cross-attention and the feed-forward part, one after the other."""
        own, other = placement, placement
        if isinstance(placement.cache, BlockCache):
            own, other = placement.at(placement.cache.mixer), placement.at(placement.cache.cross)
        x = self.add(x, self.mixer, self.mixer_norm, self.mixer_post_norm, own)
        if self.cross is not None and self.cross_norm is not None:
            x = self.add(x, self.cross, self.cross_norm, self.cross_post_norm, other)
        if self.feedforward is None or self.feedforward_norm is None:
            return x
        return self.add(x, self.feedforward, self.feedforward_norm, self.feedforward_post_norm)

    def add(
        self, x: Tensor, part: nn.Module, norm: nn.Module, post_norm: nn.Module | None, *placement: Placement
    ) -> Float[Tensor, "batch time dim"]:
        """The residual stream x after one part; a mixer gets the placement, a feed-forward part none."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a part joins the residual stream")


@dataclass(frozen=True, kw_only=True)
class PreNorm(Arrangement):
    """x + f(norm(x)) (GPT-2, Llama)."""

    plain_branches = True

    def build(self, dim: int, block: Block) -> BlockModule:
        """The module of the block."""
        return PreNormBlock(dim, block)


class PreNormBlock(BlockModule):
    """The module of a block with `PreNorm`."""

    def add(
        self, x: Tensor, part: nn.Module, norm: nn.Module, post_norm: nn.Module | None, *placement: Placement
    ) -> Float[Tensor, "batch time dim"]:
        """x + f(norm(x))."""
        out: Tensor = x + self.dropout(part(norm(x), *placement))
        return out


@dataclass(frozen=True, kw_only=True)
class PostNorm(Arrangement):
    """norm(x + f(x)) (the original Transformer, BERT, GPT)."""

    sums_branches = False

    def build(self, dim: int, block: Block) -> BlockModule:
        """The module of the block."""
        return PostNormBlock(dim, block)


class PostNormBlock(BlockModule):
    """The module of a block with `PostNorm`."""

    def add(
        self, x: Tensor, part: nn.Module, norm: nn.Module, post_norm: nn.Module | None, *placement: Placement
    ) -> Float[Tensor, "batch time dim"]:
        """norm(x + f(x))."""
        normed: Tensor = norm(x + self.dropout(part(x, *placement)))
        return normed


@dataclass(frozen=True, kw_only=True)
class Sandwich(Arrangement):
    """x + norm2(f(norm1(x))) (Gemma 2)."""

    def build(self, dim: int, block: Block) -> BlockModule:
        """The module of the block."""
        return SandwichBlock(dim, block, post_norms=True)


class SandwichBlock(BlockModule):
    """The module of a block with `Sandwich`."""

    def add(
        self, x: Tensor, part: nn.Module, norm: nn.Module, post_norm: nn.Module | None, *placement: Placement
    ) -> Float[Tensor, "batch time dim"]:
        """x + norm2(f(norm1(x)))."""
        assert post_norm is not None
        out: Tensor = x + self.dropout(post_norm(part(norm(x), *placement)))
        return out


@dataclass(frozen=True, kw_only=True)
class NoResidual(Arrangement):
    """f(norm(x)), nothing added (stacked recurrent networks)."""

    sums_branches = False

    def build(self, dim: int, block: Block) -> BlockModule:
        """The module of the block."""
        return NoResidualBlock(dim, block)


class NoResidualBlock(BlockModule):
    """The module of a block with `NoResidual`."""

    def add(
        self, x: Tensor, part: nn.Module, norm: nn.Module, post_norm: nn.Module | None, *placement: Placement
    ) -> Float[Tensor, "batch time dim"]:
        """f(norm(x))."""
        out: Tensor = self.dropout(part(norm(x), *placement))
        return out


@dataclass(frozen=True, kw_only=True)
class Parallel(Arrangement):
    """x + mixer(norm1(x)) + feedforward(norm2(x)) (GPT-NeoX).

    Attributes:
        shared_norm: whether both parts read one norm (GPT-J).
    """

    shared_norm: bool = False

    def check(self, block: Block) -> None:
        """Refuse a cross-attention, which needs one part after the other."""
        if block.cross is not None:
            raise ValueError(
                "Block.cross needs one part after the other: arrangement=PreNorm(), PostNorm() or Sandwich()"
            )

    def build(self, dim: int, block: Block) -> BlockModule:
        """The module of the block."""
        return ParallelBlock(dim, block, self.shared_norm)


class ParallelBlock(BlockModule):
    """The module of a block with `Parallel`."""

    def __init__(self, dim: int, spec: Block, shared_norm: bool) -> None:
        super().__init__(dim, spec)
        if shared_norm:
            self.feedforward_norm = None

    def forward(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """Add both parts, each of which reads x."""
        normed = self.mixer_norm(x)
        out: Tensor = x + self.dropout(self.mixer(normed, placement))
        if self.feedforward is None:
            return out
        result: Tensor = out + self.dropout(
            self.feedforward(self.feedforward_norm(x) if self.feedforward_norm else normed)
        )
        return result
