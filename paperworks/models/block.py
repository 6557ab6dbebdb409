"""The residual block: a mixer, a feed-forward part, maybe a cross-attention, in the published arrangements."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.nn import Feedforward, Mixer, MixerCache, Norm, Spec, Stream


@dataclass(frozen=True, kw_only=True)
class Block(Spec):
    """One layer.

    Attributes:
        norm: the norm before (or after) each part.
        mixer: what moves information along time.
        cross: what reads another sequence, between the two: an encoder-decoder's cross-attention; or None.
        feedforward: what works on each position; None for a block that only mixes.
        arrangement: where the norms stand:
            "pre": x + f(norm(x)) (GPT-2, Llama); "post": norm(x + f(x)) (the original Transformer);
            "parallel": x + mixer(norm1(x)) + feedforward(norm2(x)) (GPT-NeoX); "sandwich": x + norm2(f(norm1(x)))
            (Gemma 2); "plain": f(norm(x)), nothing added (stacked recurrent networks).
        shared_norm: in a parallel block, whether both parts read one norm (GPT-J).
        dropout: the share of each part's output dropped in training.
    """

    norm: Norm
    mixer: Mixer
    cross: Mixer | None = None
    feedforward: Feedforward | None = None
    arrangement: Literal["pre", "post", "parallel", "sandwich", "plain"] = "pre"
    shared_norm: bool = False
    dropout: float = 0.0

    def validate(self) -> None:
        """Check that the options fit the arrangement."""
        if self.shared_norm and self.arrangement != "parallel":
            raise ValueError(f"Block.shared_norm needs arrangement='parallel', got {self.arrangement!r}")
        if self.cross is not None and self.arrangement == "parallel":
            raise ValueError("Block.cross needs one part after the other: arrangement 'pre', 'post' or 'sandwich'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Block.dropout must be in [0, 1), got {self.dropout}")

    def check(self, dim: int) -> None:
        """Raise `ValueError` if a part cannot work on vectors of `dim` numbers."""
        self.mixer.check(dim)
        if self.cross is not None:
            self.cross.check(dim)

    def build(self, dim: int) -> nn.Module:
        """Return the module for a residual stream of `dim` numbers."""
        return BlockModule(dim, self)


class BlockCache(MixerCache):
    """The caches of a block that has a mixer and a cross-attention."""

    def __init__(self, mixer: MixerCache, cross: MixerCache) -> None:
        self.mixer, self.cross = mixer, cross

    def reorder(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Keep the given rows of the batch."""
        self.mixer.reorder(rows)
        self.cross.reorder(rows)

    def bytes(self) -> int:
        """Return the memory held, in bytes."""
        return self.mixer.bytes() + self.cross.bytes()

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.mixer.truncate(length)
        self.cross.truncate(length)


class BlockModule(nn.Module):
    """The module of `Block`; its output is the residual stream after it."""

    def __init__(self, dim: int, spec: Block) -> None:
        super().__init__()
        sandwich = spec.arrangement == "sandwich"
        self.arrangement = spec.arrangement
        self.mixer_norm = spec.norm.build(dim)
        self.mixer = spec.mixer.build(dim)
        self.mixer_post_norm = spec.norm.build(dim) if sandwich else None
        self.cross_norm = spec.norm.build(dim) if spec.cross is not None else None
        self.cross = spec.cross.build(dim) if spec.cross is not None else None
        self.cross_post_norm = spec.norm.build(dim) if sandwich and spec.cross is not None else None
        has_feedforward = spec.feedforward is not None
        self.feedforward_norm = spec.norm.build(dim) if has_feedforward and not spec.shared_norm else None
        self.feedforward = spec.feedforward.build(dim) if spec.feedforward is not None else None
        self.feedforward_post_norm = spec.norm.build(dim) if sandwich and has_feedforward else None
        self.dropout = nn.Dropout(spec.dropout)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> MixerCache:
        """Return an empty cache for what moves information along time here."""
        mixer: Any = self.mixer
        own = mixer.new_cache(batch, capacity, dtype, device)
        if self.cross is None:
            return own
        cross: Any = self.cross
        return BlockCache(own, cross.new_cache(batch, capacity, dtype, device))

    def forward(self, x: Float[Tensor, "batch time dim"], stream: Stream) -> Float[Tensor, "batch time dim"]:
        """Return the residual stream after this block."""
        if self.arrangement == "parallel":
            mixed = self.mixer_norm(x)
            out = x + self.dropout(self.mixer(mixed, stream))
            if self.feedforward is None:
                return out
            return out + self.dropout(self.feedforward(self.feedforward_norm(x) if self.feedforward_norm else mixed))
        own, other = stream, stream
        if isinstance(stream.cache, BlockCache):
            own, other = stream.at(stream.cache.mixer), stream.at(stream.cache.cross)
        x = self._add(x, self.mixer_norm, self.mixer, self.mixer_post_norm, own)
        if self.cross is not None and self.cross_norm is not None:
            x = self._add(x, self.cross_norm, self.cross, self.cross_post_norm, other)
        if self.feedforward is None or self.feedforward_norm is None:
            return x
        return self._add(x, self.feedforward_norm, self.feedforward, self.feedforward_post_norm)

    def _add(self, x: Tensor, norm: nn.Module, part: nn.Module, post_norm: nn.Module | None, *stream: Stream) -> Tensor:
        """Add one part's output to the residual stream, with its norms where the arrangement has them."""
        if self.arrangement == "post":
            return norm(x + self.dropout(part(x, *stream)))
        out = part(norm(x), *stream)
        if self.arrangement == "plain":
            return self.dropout(out)
        return x + self.dropout(out if post_norm is None else post_norm(out))
