"""T5, and Switch Transformers, which are T5 with experts in every other layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from paperworks.core.initialization import Context, Initialization
from paperworks.core.linear import features, is_linear_like
from paperworks.models.block import Block
from paperworks.models.decoder import Decoder
from paperworks.models.encoder import Encoder
from paperworks.models.seq2seq import Seq2Seq
from paperworks.nn import (
    MLP,
    Attention,
    CrossAttention,
    Experts,
    Feedforward,
    GatedMLP,
    RelativeBuckets,
    RMSNorm,
    TopKRouter,
)
from paperworks.nn.attention.attention import AttentionModule
from paperworks.nn.position.relative import RelativeBucketTable


@dataclass(frozen=True, kw_only=True)
class T5Initialization(Initialization):
    """N(0, 1 / inputs) for every linear layer, queries over sqrt(head_dim) more where scores are not scaled.

    This is what stands in for T5's missing scale (Raffel et al. 2019, arXiv:1910.10683; mesh-tensorflow). Tables of
    relative positions get N(0, 1 / dim).
    """

    def draw(self, module: nn.Module, context: Context) -> None:
        """Draw one module in place; embeddings by the usual rule."""
        weight = getattr(module, "weight", None)
        if is_linear_like(module) and isinstance(weight, nn.Parameter):
            weight.normal_(0.0, features(module)[0] ** -0.5)
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.zero_()
        else:
            super().draw(module, context)

    def finish(self, module: nn.Module, context: Context) -> None:
        """Scale the queries, and draw the tables of positions."""
        if not isinstance(module, AttentionModule):
            return
        if module.spec.scale == 1.0:
            module.query.weight.mul_(module.head_dim**-0.5)
        if isinstance(module.relative, RelativeBucketTable):
            module.relative.weight.normal_(0.0, module.query.in_features**-0.5)


def t5(
    dim: int,
    hidden: int,
    depth: int,
    heads: int,
    head_dim: int = 64,
    *,
    vocab_size: int = 32_128,
    gated: bool = False,
    tied: bool = True,
    buckets: int = 32,
    max_distance: int = 128,
    dropout: float = 0.1,
    eps: float = 1e-6,
) -> Seq2Seq:
    """T5 (Raffel et al. 2019, arXiv:1910.10683): pre-norm, no biases, relative buckets, scores without a scale.

    `gated` and not `tied` is version 1.1.
    """
    norm = RMSNorm(eps=eps)
    feedforward: Feedforward = MLP(hidden=hidden, activation="relu", bias=False)
    if gated:
        feedforward = GatedMLP(hidden=hidden, activation="gelu_tanh")
    looking = Attention(
        heads=heads,
        head_dim=head_dim,
        scale=1.0,
        causal=False,
        position=RelativeBuckets(buckets=buckets, max_distance=max_distance, bidirectional=True),
        dropout=dropout,
    )
    writing = replace(looking, causal=True, position=RelativeBuckets(buckets=buckets, max_distance=max_distance))
    cross = CrossAttention(heads=heads, head_dim=head_dim, scale=1.0, dropout=dropout)
    block = Block(norm=norm, mixer=looking, feedforward=feedforward, dropout=dropout)
    encoder = Encoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        norm=norm,
        dropout=dropout,
        init=T5Initialization(),
        embedding_std=1.0,
        block=block,
    )
    decoder = Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        norm=norm,
        dropout=dropout,
        init=T5Initialization(),
        embedding_std=1.0,
        block=replace(block, mixer=writing, cross=cross),
        tied=tied,
        logit_scale=dim**-0.5 if tied else None,
    )
    return Seq2Seq(encoder=encoder, decoder=decoder)


def switch(
    dim: int,
    hidden: int,
    depth: int,
    heads: int,
    head_dim: int = 64,
    *,
    experts: int,
    every: int = 2,
    capacity: float | None = 1.25,
    capacity_tokens: int | None = None,
    router: TopKRouter = TopKRouter(softmax="before", balance=0.01, z=0.001, jitter=0.01),  # noqa: B008  (frozen)
    vocab_size: int = 32_128,
    buckets: int = 32,
    max_distance: int = 128,
    dropout: float = 0.1,
    eps: float = 1e-6,
) -> Seq2Seq:
    """Switch Transformer (Fedus et al. 2021, arXiv:2101.03961): T5 with one of many experts a token in sparse layers.

    Layers every - 1, 2 every - 1, ... are sparse, in the encoder and in the decoder. `capacity` holds in training, 2.0
    outside of it; None loses no token. `capacity_tokens` counts tokens a sequence instead, as Hugging Face does.
    """
    dense = t5(
        dim, hidden, depth, heads, head_dim,
        vocab_size=vocab_size, buckets=buckets, max_distance=max_distance, dropout=dropout, eps=eps,
    )  # fmt: skip

    def sparse(block: Block, layer: int) -> Block:
        if layer % every != every - 1 or block.feedforward is None:
            return block
        mixture = Experts(
            expert=block.feedforward,
            count=experts,
            top=1,
            router=router,
            capacity=capacity,
            capacity_evaluation=None if capacity is None else 2.0,
            capacity_tokens=capacity_tokens,
        )
        return replace(block, feedforward=mixture)

    if every < 1:
        raise ValueError(f"every must be at least 1 (each layer is sparse), got {every}")

    def layers(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(sparse(block, layer) for layer, block in enumerate(blocks))

    return Seq2Seq(
        encoder=replace(dense.encoder, block=layers(dense.encoder.blocks)),
        decoder=replace(dense.decoder, block=layers(dense.decoder.blocks)),
    )
