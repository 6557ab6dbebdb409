"""GPT, GPT-2 and GPT-3, and BLOOM, which is GPT with ALiBi."""

from paperworks.models.arrangement import PostNorm
from paperworks.models.block import Block
from paperworks.models.decoder import Decoder
from paperworks.nn import MLP, ALiBi, Attention, LayerNorm, LearnedPositions


def gpt1(dim: int = 768, depth: int = 12, heads: int = 12, *, vocab_size: int = 40_478, context: int = 512) -> Decoder:
    """GPT (Radford et al. 2018): post-norm without a last norm, learned positions, tanh GELU, tied, dropout 0.1."""
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        context=context,
        position=LearnedPositions(length=context),
        tied=True,
        dropout=0.1,
        norm=None,
        block=Block(
            norm=LayerNorm(),
            arrangement=PostNorm(),
            mixer=Attention(heads=heads, bias=True, dropout=0.1),
            feedforward=MLP(hidden=4 * dim, activation="gelu_tanh"),
            dropout=0.1,
        ),
    )


def gpt2(dim: int, depth: int, heads: int) -> Decoder:
    """GPT-2 (Radford et al. 2019): pre-norm, learned positions, tanh GELU, biases everywhere, tied."""
    return Decoder(
        vocab_size=50_257,
        dim=dim,
        depth=depth,
        context=1024,
        position=LearnedPositions(length=1024),
        tied=True,
        norm=LayerNorm(),
        block=Block(
            norm=LayerNorm(),
            mixer=Attention(heads=heads, bias=True),
            feedforward=MLP(hidden=4 * dim, activation="gelu_tanh"),
        ),
    )


def gpt3(
    dim: int,
    depth: int,
    heads: int,
    head_dim: int,
    *,
    window: int = 256,
    vocab_size: int = 50_257,
    context: int = 2048,
) -> Decoder:
    """GPT-3 (Brown et al. 2020, arXiv:2005.14165): GPT-2 whose every other layer sees a band of its last tokens.

    heads * head_dim need not be dim. The paper does not print the width of the band; it comes from Sparse
    Transformers (Child et al. 2019), where 256 is usual.
    """
    full = Block(
        norm=LayerNorm(),
        mixer=Attention(heads=heads, head_dim=head_dim, bias=True),
        feedforward=MLP(hidden=4 * dim, activation="gelu_tanh"),
    )
    banded = Block(
        norm=LayerNorm(),
        mixer=Attention(heads=heads, head_dim=head_dim, bias=True, window=window),
        feedforward=full.feedforward,
    )
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        context=context,
        position=LearnedPositions(length=context),
        tied=True,
        norm=LayerNorm(),
        block=tuple(banded if layer % 2 else full for layer in range(depth)),
    )


def bloom(dim: int, depth: int, heads: int, *, vocab_size: int = 250_880) -> Decoder:
    """BLOOM (Le Scao et al. 2022, arXiv:2211.05100): GPT-2's parts with ALiBi and a norm on the embeddings, tied."""
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        tied=True,
        norm=LayerNorm(),
        embedding_norm=LayerNorm(),
        block=Block(
            norm=LayerNorm(),
            mixer=Attention(heads=heads, bias=True, position=ALiBi()),
            feedforward=MLP(hidden=4 * dim, activation="gelu_tanh"),
        ),
    )
