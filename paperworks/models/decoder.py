"""The decoder-only language model: embedding, blocks, final norm, unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.models.backbone import Stack, StackModel
from paperworks.nn import Cache, LinearKind, open_stream


@dataclass(frozen=True, kw_only=True)
class Decoder(Stack):
    """A causal language model: tokens (batch, time) -> logits (batch, time, vocab_size).

    Attributes:
        tied: whether the unembedding is the embedding's transpose.
        head: what the unembedding is (MatMul-free LM: `BitLinear()`); None for a plain linear layer.
        logit_scale: what the hidden state is multiplied by before the unembedding (T5: dim^-0.5), or None.
        logit_soft_cap: logits become cap * tanh(logit / cap) (Gemma 2), or None.

    All others are those of `Stack`.
    """

    tied: bool = False
    head: LinearKind | None = None
    logit_scale: float | None = None
    logit_soft_cap: float | None = None

    def build(self) -> DecoderModel:
        """Return the model with freshly initialized weights (use `torch.manual_seed` for reproducible ones)."""
        return DecoderModel(self)


class DecoderModel(StackModel):
    """The module of `Decoder`. Attributes: `spec`; `tokenizer`, None unless the model was loaded with one.

    Taps: `embedding`, `blocks.i` (the residual stream after block i), `norm`, and those of the parts.
    """

    spec: Decoder

    def __init__(self, spec: Decoder) -> None:
        super().__init__(spec)
        plain = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self.unembedding = plain if spec.head is None else cast(nn.Linear, spec.head.convert(plain))
        self.tie()
        if self.embedding.weight.device.type != "meta":
            self.initialize()

    def tie(self) -> None:
        """Let parameters that are one by the spec be one tensor: after building, and after loading weights."""
        super().tie()
        if self.spec.tied:
            self.unembedding.weight = self.embedding.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        positions: Int[Tensor, "batch time"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        cache: Cache | None = None,
        asked: Int[Tensor, "batch time"] | None = None,
        among: Bool[Tensor, "time time"] | None = None,
        context: Tensor | None = None,
        context_segments: Int[Tensor, "batch other"] | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """Return the logits of the next token at each position.

        Args:
            tokens: int64 ids.
            positions: where the tokens stand; by default they count from the cache, from 0 in each segment.
            segments: tokens see each other only where these agree: documents packed in one row, 0 for padding.
            cache: from `new_cache`; holds what came before, and is advanced past these tokens.
            asked: the position that each token's logits are about, for models that can be asked (`PairedPositions`).
            among: (time, time), which of these tokens (rows) see which others of them; by default the earlier ones.
            context: (batch, other time, dim), what cross-attending mixers read; with a cache, needed once.
            context_segments: (batch, other time), 0 where the context is padding.
            last: return the logits of the last so many positions only.

        Raises:
            ValueError: for a wrong dtype or shape, an id outside the vocabulary, or a sequence beyond the context.
        """
        x = self.hidden(
            tokens,
            positions=positions,
            segments=segments,
            cache=cache,
            asked=asked,
            among=among,
            context=context,
            context_segments=context_segments,
        )
        # of a slice of several rows torch takes a product for each row, and is seven times slower
        return self.logits(x if last is None else x[:, -last:].contiguous())

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        positions: Int[Tensor, "batch time"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        cache: Cache | None = None,
        asked: Int[Tensor, "batch time"] | None = None,
        among: Bool[Tensor, "time time"] | None = None,
        context: Tensor | None = None,
        context_segments: Int[Tensor, "batch other"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Return what the unembedding reads: the residual stream after the final norm. Arguments as in `forward`."""
        self._check_tokens(tokens)
        batch, time = tokens.shape
        self._check_length(time + (cache.length if cache is not None else 0))
        stream = open_stream(
            batch,
            time,
            tokens.device,
            positions=positions,
            segments=segments,
            cache=cache,
            asked=asked,
            among=among,
            context=context,
            context_segments=context_segments,
        )
        return self.through(self.embed(tokens, stream), stream, cache)

    def logits(self, hidden: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time vocab"]:
        """Return the logits that `hidden`'s output stands for."""
        if self.spec.logit_scale is not None:
            hidden = hidden * self.spec.logit_scale
        logits = self.unembedding(hidden)
        cap = self.spec.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
