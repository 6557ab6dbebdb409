"""The input part of models that read tokens: an embedding table, absolute positions, a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.models.backbone import Stack, StackModel
from paperworks.nn import AbsolutePositions, Cache, Norm, Placement


@dataclass(frozen=True, kw_only=True)
class TokenStack(Stack):
    """A stack behind token embeddings.

    Attributes:
        vocab_size: tokens known.
        context: the longest sequence, in tokens; None means that only memory limits it.
        position: absolute positions added to the embeddings, or None.
        embedding_scale: what embeddings are multiplied by (Gemma: sqrt(dim)), or None.
        embedding_norm: a norm on embeddings and positions together (BERT, BLOOM, RWKV), or None.
        embedding_std: standard deviation of fresh embeddings, where it is not the rule's (T5: 1, RWKV: tiny), or None.
        dropout: the share of embeddings dropped in training.

    All others are those of `Stack`.
    """

    vocab_size: int
    context: int | None = None
    position: AbsolutePositions | None = None
    embedding_scale: float | None = None
    embedding_norm: Norm | None = None
    embedding_std: float | None = None
    dropout: float = 0.0

    def validate(self) -> None:
        """Check sizes, and positions against the context."""
        super().validate()
        kind = type(self).__name__
        if self.vocab_size < 1:
            raise ValueError(f"{kind}.vocab_size must be at least 1, got {self.vocab_size}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"{kind}.context must be at least 1, got {self.context}")
        length = None if self.position is None else self.position.length
        if length is not None and self.context is not None and length < self.context:
            raise ValueError(f"{kind}.context ({self.context}) exceeds the {length} learned positions")


class TokenStackModel(StackModel):
    """The part that all models of tokens share. Attributes: `spec`; `tokenizer`, None unless loaded with one.

    Taps: `embedding`, `blocks.i` (the residual stream after block i), `norm`, and those of the parts.
    """

    spec: Any

    def __init__(self, spec: TokenStack) -> None:
        super().__init__(spec)
        self.tokenizer: Any = None

    def _build_input(self) -> None:
        spec: TokenStack = self.spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.dim)
        self.position = spec.position.build(spec.dim) if spec.position else None
        self.embedding_norm = spec.embedding_norm.build(spec.dim) if spec.embedding_norm else None
        self.dropout = nn.Dropout(spec.dropout)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights again, in place (nothing on the meta device)."""
        super().initialize()
        if self.spec.embedding_std is not None and not self.embedding.weight.is_meta:
            self.embedding.weight.normal_(0.0, self.spec.embedding_std)

    @property
    def device(self) -> torch.device:
        """Where the embedding lives."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the embedding, and so of the residual stream."""
        return self.embedding.weight.dtype

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of at most `capacity` tokens, prompt included."""
        self._check_length(capacity)
        return super().new_cache(batch, capacity)

    def place(self, tokens: Int[Tensor, "batch time"], placement: Placement | None) -> Placement:
        """The placement of these tokens, resolved. Raises `ValueError` for tokens that the model cannot take."""
        self._check_tokens(tokens)
        given = placement or Placement()
        batch, time = tokens.shape
        self._check_length(time + (given.cache.length if given.cache is not None else 0))
        given.require(self)
        return given.resolve(batch, time, tokens.device)

    def embed(
        self, tokens: Int[Tensor, "batch time"], placement: Placement, more: Tensor | None = None
    ) -> Float[Tensor, "batch time dim"]:
        """What the first block reads; `more` is added to the tokens' own vectors."""
        x = self.embedding(tokens)
        if self.spec.embedding_scale is not None:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype, device=x.device)
        if more is not None:
            x = x + more
        if self.position is not None:
            x = self.position(x, placement)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        out: Tensor = self.dropout(x)
        return out

    def _check_tokens(self, tokens: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"tokens must be an int64 tensor (batch, time), got {type(tokens).__name__}; "
                "texts go through paperworks.generate, or model.tokenizer.encode"
            )
        if tokens.dim() != 2:
            raise ValueError(
                f"tokens must have shape (batch, time), got {tuple(tokens.shape)}; use tokens[None] for one row"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64, got {tokens.dtype}; use tokens.long()")
        if tokens.shape[1] == 0:
            raise ValueError(
                "tokens is empty: a forward pass needs at least one token (a beginning-of-text token, say)"
            )
        if tokens.device.type == "cpu" and tokens.numel():  # elsewhere the check would wait for the device
            low, high = (int(bound) for bound in tokens.aminmax())
            if low < 0 or high >= self.spec.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {self.spec.vocab_size}; "
                    "were these tokens made by another model's tokenizer?"
                )

    def _check_length(self, length: int) -> None:
        spec = self.spec
        if spec.context is not None and length > spec.context:
            remedy = (
                "shorten the input"
                if spec.position is not None
                else "shorten the input, or raise the context with a rotary scaling: replace(spec, context=..., and in "
                "each attention position=replace(position, scaling=YaRNScaling(...), LinearScaling, NTKScaling or "
                "Llama3Scaling))"
            )
            raise ValueError(
                f"{length} tokens exceed the context of {spec.context} ({type(spec).__name__}.context); {remedy}"
            )
