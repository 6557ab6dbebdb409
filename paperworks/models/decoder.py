"""The decoder-only language model: embedding, blocks, final norm, unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.models.tokens import TokenStack, TokenStackModel
from paperworks.nn import LinearKind, Placement


@dataclass(frozen=True, kw_only=True)
class Decoder(TokenStack):
    """A causal language model: tokens (batch, time) -> logits (batch, time, vocab_size).

    Attributes:
        tied: whether the unembedding is the embedding's transpose.
        head: what the unembedding is (MatMul-free LM: `BitLinear()`); None for a plain linear layer.
        logit_scale: what the hidden state is multiplied by before the unembedding (T5: dim^-0.5), or None.
        logit_soft_cap: logits become cap * tanh(logit / cap) (Gemma 2), or None.

    All others are those of `TokenStack` and `Stack`.
    """

    tied: bool = False
    head: LinearKind | None = None
    logit_scale: float | None = None
    logit_soft_cap: float | None = None

    def build(self) -> DecoderModel:
        """The model with freshly drawn weights (use `torch.manual_seed` for reproducible ones)."""
        return cast(DecoderModel, DecoderModel(self).initialized())


class DecoderModel(TokenStackModel):
    """The module of `Decoder`. Attributes: `spec`; `tokenizer`, None unless the model was loaded with one.

    Taps: `embedding`, `blocks.i` (the residual stream after block i), `norm`, and those of the parts.
    """

    spec: Decoder

    def __init__(self, spec: Decoder) -> None:
        super().__init__(spec)
        plain = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self.unembedding = plain if spec.head is None else cast(nn.Linear, spec.head.convert(plain))

    def tie(self) -> None:
        """Let parameters that are one by the spec be one tensor: after building, and after loading weights."""
        super().tie()
        if self.spec.tied:
            self.unembedding.weight = self.embedding.weight

    def forward(
        self, tokens: Int[Tensor, "batch time"], placement: Placement | None = None, *, last: int | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token at each position.

        Args:
            tokens: int64 ids.
            placement: where the tokens stand: positions, segments, a cache, a context to read. None: one sequence a
                row, from its beginning.
            last: the logits of only this many last positions.

        Raises:
            ValueError: for a wrong dtype or shape, an id outside the vocabulary, or a sequence beyond the context.
        """
        x = self.hidden(tokens, placement)
        # of a slice of several rows torch takes a product for each row, and is seven times slower
        return self.logits(x if last is None else x[:, -last:].contiguous())

    def hidden(
        self, tokens: Int[Tensor, "batch time"], placement: Placement | None = None
    ) -> Float[Tensor, "batch time dim"]:
        """What the unembedding reads: the residual stream after the final norm. Arguments as in `forward`."""
        here = self.place(tokens, placement)
        return self.run_blocks(self.embed(tokens, here), here)

    def logits(self, hidden: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time vocab"]:
        """The logits that `hidden`'s output stands for."""
        if self.spec.logit_scale is not None:
            hidden = hidden * self.spec.logit_scale
        logits: Tensor = self.unembedding(hidden)
        cap = self.spec.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
