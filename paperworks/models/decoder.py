"""The decoder-only language model: embedding, blocks, final norm, unembedding."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.models.block import Block
from paperworks.nn import Cache, LearnedPositions, Norm, Spec, open_stream


@dataclass(frozen=True, kw_only=True)
class Decoder(Spec):
    """A causal language model: tokens (batch, time) -> logits (batch, time, vocab_size).

    Attributes:
        vocab_size: tokens known; dim: width of the residual stream; depth: blocks.
        block: one spec for every layer, or a tuple of `depth` specs.
        norm: the norm before the unembedding; None for post-norm models.
        context: the longest sequence, in tokens; None means that only memory limits it.
        position: learned absolute positions added to the embeddings, or None.
        tied: whether the unembedding is the embedding's transpose.
        embedding_scale: what embeddings are multiplied by (Gemma: sqrt(dim)), or None.
        logit_soft_cap: logits become cap * tanh(logit / cap) (Gemma 2), or None.
        dropout: the share of embeddings dropped in training.
        init_std: standard deviation of initial weights; outputs to the residual stream get it / sqrt(2 depth) (GPT-2).
    """

    vocab_size: int
    dim: int
    depth: int
    block: Block | tuple[Block, ...]
    norm: Norm | None
    context: int | None = None
    position: LearnedPositions | None = None
    tied: bool = False
    embedding_scale: float | None = None
    logit_soft_cap: float | None = None
    dropout: float = 0.0
    init_std: float = 0.02

    def validate(self) -> None:
        """Check sizes, and every block against the width."""
        for name in ("vocab_size", "dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"Decoder.{name} must be at least 1, got {getattr(self, name)}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"Decoder.context must be at least 1, got {self.context}")
        if isinstance(self.block, tuple) and len(self.block) != self.depth:
            raise ValueError(
                f"Decoder.block has {len(self.block)} specs but depth is {self.depth}; "
                "give one spec for every layer, or exactly one a layer"
            )
        if self.position is not None and self.context is not None and self.position.length < self.context:
            raise ValueError(f"Decoder.context ({self.context}) exceeds the {self.position.length} learned positions")
        for block in dict.fromkeys(self.block if isinstance(self.block, tuple) else (self.block,)):
            block.mixer.check(self.dim)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One spec a layer."""
        return self.block if isinstance(self.block, tuple) else (self.block,) * self.depth

    def build(self) -> "DecoderModel":
        """Return the model with freshly initialized weights (use `torch.manual_seed` for reproducible ones)."""
        return DecoderModel(self)


class DecoderModel(nn.Module):
    """The module of `Decoder`. Attributes: `spec`; `tokenizer`, None unless the model was loaded with one.

    Taps: `embedding`, `blocks.i` (the residual stream after block i), `norm`, and those of the parts.
    """

    def __init__(self, spec: Decoder) -> None:
        super().__init__()
        self.spec = spec
        self.tokenizer: Any = None
        self.embedding = nn.Embedding(spec.vocab_size, spec.dim)
        self.position = spec.position.build(spec.dim) if spec.position else None
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList([block.build(spec.dim) for block in spec.blocks])
        self.norm = spec.norm.build(spec.dim) if spec.norm else None
        self.unembedding = nn.Linear(spec.dim, spec.vocab_size, bias=False)
        if spec.tied:
            self.unembedding.weight = self.embedding.weight
        if self.embedding.weight.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw weights afresh: normal with `init_std`, biases zero, residual outputs scaled by 1 / sqrt(2 depth)."""
        std = self.spec.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = 1 / math.sqrt(2 * self.spec.depth) if getattr(module, "writes_residual", False) else 1.0
                module.weight.normal_(0.0, std * scale)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where the embedding lives."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the embedding, and so of the residual stream."""
        return self.embedding.weight.dtype

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Return an empty cache for `batch` sequences of at most `capacity` tokens, prompt included."""
        self._check_length(capacity)
        mixers: list[Any] = [block.mixer for block in self.blocks]
        layers = [mixer.new_cache(batch, capacity, self.dtype, self.device) for mixer in mixers]
        return Cache(layers, capacity)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        positions: Int[Tensor, "batch time"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        cache: Cache | None = None,
        context: Tensor | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """Return the logits of the next token at each position.

        Args:
            tokens: int64 ids.
            positions: where the tokens stand; by default they count from the cache, from 0 in each segment.
            segments: tokens see each other only where these agree: documents packed in one row, 0 for padding.
            cache: from `new_cache`; holds what came before, and is advanced past these tokens.
            context: what cross-attending mixers read.
            last: return the logits of the last so many positions only.

        Raises:
            ValueError: for a wrong dtype or shape, an id outside the vocabulary, or a sequence beyond the context.
        """
        x = self.hidden(tokens, positions=positions, segments=segments, cache=cache, context=context)
        return self.logits(x if last is None else x[:, -last:])

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        positions: Int[Tensor, "batch time"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        cache: Cache | None = None,
        context: Tensor | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Return what the unembedding reads: the residual stream after the final norm. Arguments as in `forward`."""
        self._check_tokens(tokens)
        batch, time = tokens.shape
        self._check_length(time + (cache.length if cache is not None else 0))
        stream = open_stream(
            batch, time, tokens.device, positions=positions, segments=segments, cache=cache, context=context
        )
        x = self.embedding(tokens)
        if self.spec.embedding_scale is not None:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype, device=x.device)
        if self.position is not None:
            x = self.position(x, stream)
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            x = block(x, stream if cache is None else stream.at(cache.layers[index]))
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time vocab"]:
        """Return the logits that `hidden`'s output stands for."""
        logits = self.unembedding(hidden)
        cap = self.spec.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _check_tokens(self, tokens: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
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
        if self.spec.context is not None and length > self.spec.context:
            remedy = (
                "shorten the input"
                if self.spec.position is not None
                else "shorten the input, or raise the context with a rotary scaling: replace(spec, context=..., and in "
                "each attention position=replace(position, scaling=YaRNScaling(...), LinearScaling, NTKScaling or "
                "Llama3Scaling))"
            )
            raise ValueError(f"{length} tokens exceed the context of {self.spec.context} (Decoder.context); {remedy}")
