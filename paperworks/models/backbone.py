"""What every model of ours is: embeddings, then blocks along one residual stream, then a norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.models.block import Block
from paperworks.nn import AbsolutePositions, Cache, LinearKind, Norm, Spec, Stream, auxiliary
from paperworks.nn.attention.attention import AttentionModule
from paperworks.nn.feedforward.experts.parallel import Elsewhere
from paperworks.nn.position.absolute import PairedPositionTable
from paperworks.nn.position.relative import RelativeBucketTable, share_relative_tables
from paperworks.nn.recurrent.mlgru import share_forget_bounds
from paperworks.nn.ternary import TernaryLinear, convert_linears


@dataclass(frozen=True, kw_only=True)
class Stack(Spec):
    """Embeddings and blocks.

    Attributes:
        vocab_size: tokens known; dim: width of the residual stream; depth: blocks.
        block: one spec for every layer, or a tuple of `depth` specs.
        norm: the norm after the last block; None for post-norm models.
        context: the longest sequence, in tokens; None means that only memory limits it.
        position: absolute positions added to the embeddings, or None.
        embedding_scale: what embeddings are multiplied by (Gemma: sqrt(dim)), or None.
        embedding_norm: a norm on embeddings and positions together (BERT, BLOOM, RWKV), or None.
        linear: what the linear layers of the blocks are (BitNet: `BitLinear()`); None for plain ones.
        dropout: the share of embeddings dropped in training.
        init_std: standard deviation of initial weights; outputs to the residual stream get it / sqrt(2 depth) (GPT-2).
            Parts whose papers prescribe their own draw it themselves.
        init: "normal" as above, or "fan_in", N(0, 1 / inputs) for every linear layer, queries over sqrt(head_dim) more
            where scores are not scaled (T5, arXiv:1910.10683: this is what stands in for its missing scale).
        embedding_std: that of the embeddings, where it is another (T5: 1, RWKV: tiny), or None.
    """

    vocab_size: int
    dim: int
    depth: int
    block: Block | tuple[Block, ...]
    norm: Norm | None
    context: int | None = None
    position: AbsolutePositions | None = None
    embedding_scale: float | None = None
    embedding_norm: Norm | None = None
    linear: LinearKind | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    init: Literal["normal", "fan_in"] = "normal"
    embedding_std: float | None = None

    def validate(self) -> None:
        """Check sizes, and every block against the width."""
        kind = type(self).__name__
        for name in ("vocab_size", "dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{kind}.{name} must be at least 1, got {getattr(self, name)}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"{kind}.context must be at least 1, got {self.context}")
        if isinstance(self.block, tuple) and len(self.block) != self.depth:
            raise ValueError(
                f"{kind}.block has {len(self.block)} specs but depth is {self.depth}; "
                "give one spec for every layer, or exactly one a layer"
            )
        length = None if self.position is None else self.position.length
        if length is not None and self.context is not None and length < self.context:
            raise ValueError(f"{kind}.context ({self.context}) exceeds the {length} learned positions")
        # not `self.blocks`: a hostile file may claim any depth
        for block in dict.fromkeys(self.block if isinstance(self.block, tuple) else (self.block,)):
            block.check(self.dim)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One spec a layer."""
        return self.block if isinstance(self.block, tuple) else (self.block,) * self.depth

    def build(self) -> StackModel:
        """Return the model with freshly initialized weights."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


class StackModel(nn.Module):
    """The part that all models share. Attributes: `spec`; `tokenizer`, None unless loaded with one.

    Taps: `embedding`, `blocks.i` (the residual stream after block i), `norm`, and those of the parts.
    """

    def __init__(self, spec: Stack) -> None:
        super().__init__()
        self.spec: Any = spec
        self.tokenizer: Any = None
        self.embedding = nn.Embedding(spec.vocab_size, spec.dim)
        self.position = spec.position.build(spec.dim) if spec.position else None
        self.embedding_norm = spec.embedding_norm.build(spec.dim) if spec.embedding_norm else None
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList([block.build(spec.dim) for block in spec.blocks])
        if spec.linear is not None:
            convert_linears(self.blocks, spec.linear)
        self.norm = spec.norm.build(spec.dim) if spec.norm else None

    def tie(self) -> None:
        """Let parameters that are one by the spec be one tensor: after building, and after loading weights."""
        share_relative_tables(self.blocks)
        share_forget_bounds(self.blocks)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw weights afresh: normal with `init_std`, biases zero, residual outputs scaled by 1 / sqrt(2 depth).

        Then every part that has a method `initialize(layer, depth)` draws what its paper prescribes.
        """
        std, depth = self.spec.init_std, self.spec.depth
        for module in self._drawn():
            if isinstance(module, nn.Linear | nn.Embedding | TernaryLinear):
                scale = 1 / math.sqrt(2 * depth) if getattr(module, "writes_residual", False) else 1.0
                module.weight.normal_(0.0, std * scale)
                if self.spec.init == "fan_in" and not isinstance(module, nn.Embedding):
                    module.weight.normal_(0.0, module.in_features**-0.5)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()  # type: ignore[operator]
        if self.spec.embedding_std is not None:
            self.embedding.weight.normal_(0.0, self.spec.embedding_std)
        if self.spec.init == "fan_in":
            self._initialize_unscaled()
        for layer, block in enumerate(self.blocks):
            for module in block.modules():
                own: Any = getattr(module, "initialize", None)
                if callable(own):
                    own(layer, depth)

    def _drawn(self) -> Iterator[nn.Module]:
        """Yield all modules, for experts that other processes keep passing ones: the same is drawn in all processes."""
        for module in self.modules():
            yield from module.stand_in().modules() if isinstance(module, Elsewhere) else (module,)

    def _initialize_unscaled(self) -> None:
        """Draw what T5 draws otherwise: queries of attention without a scale, and the tables of positions."""
        for module in self.blocks.modules():
            if isinstance(module, AttentionModule) and module.spec.scale == 1.0:
                module.query.weight.mul_(module.head_dim**-0.5)
            if isinstance(module, RelativeBucketTable):
                module.weight.normal_(0.0, self.spec.dim**-0.5)

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
        blocks: list[Any] = list(self.blocks)
        layers = [block.new_cache(batch, capacity, self.dtype, self.device) for block in blocks]
        return Cache(layers, capacity)

    def embed(
        self, tokens: Int[Tensor, "batch time"], stream: Stream, more: Tensor | None = None
    ) -> Float[Tensor, "batch time dim"]:
        """Return what the first block reads; `more` is added to the tokens' own vectors."""
        if stream.asked is not None and not isinstance(self.position, PairedPositionTable):
            raise ValueError("this model cannot be asked for a position: build it with position=PairedPositions(...)")
        x = self.embedding(tokens)
        if self.spec.embedding_scale is not None:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype, device=x.device)
        if more is not None:
            x = x + more
        if self.position is not None:
            x = self.position(x, stream)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.dropout(x)

    def through(
        self, x: Float[Tensor, "batch time dim"], stream: Stream, cache: Cache | None
    ) -> Float[Tensor, "batch time dim"]:
        """Return the residual stream after all blocks and the final norm."""
        if stream.among is not None and not all(isinstance(block.mixer, AttentionModule) for block in self.blocks):
            raise ValueError("`among` says which tokens see each other, which only attention can obey, not recurrence")
        with auxiliary.counting(stream.segments) if stream.segments is not None else nullcontext():
            for index, block in enumerate(self.blocks):
                x = block(x, stream if cache is None else stream.at(cache.layers[index]))
        return x if self.norm is None else self.norm(x)

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
