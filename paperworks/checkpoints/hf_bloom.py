"""BLOOM (Le Scao et al. 2022, arXiv:2211.05100) in Hugging Face's layout, both ways: GPT-2's parts with ALiBi."""

from collections.abc import Iterator, Mapping
from typing import Any

from paperworks.checkpoints.layout import HeadInterleaved, Rule, Stacked
from paperworks.models import Block, Decoder, PreNorm
from paperworks.nn import MLP, ALiBi, Attention, LayerNorm

Config = Mapping[str, Any]


def read_bloom(config: Config) -> Decoder:
    """Read BLOOM's config; ValueError for the one option that no published checkpoint has."""
    if config.get("apply_residual_connection_post_layernorm"):
        raise ValueError(
            "BLOOM with apply_residual_connection_post_layernorm=true is not read; published checkpoints have it off"
        )
    dim = config.get("hidden_size", config.get("n_embed"))
    if dim is None:
        raise ValueError("config.json lacks 'hidden_size'")
    norm = LayerNorm(eps=float(config.get("layer_norm_epsilon", 1e-5)))
    return Decoder(
        vocab_size=config["vocab_size"],
        dim=dim,
        depth=config["n_layer"],
        tied=bool(config.get("tie_word_embeddings", True)),
        init_std=float(config.get("initializer_range", 0.02)),
        norm=norm,
        embedding_norm=norm,
        block=Block(
            norm=norm,
            mixer=Attention(
                heads=config["n_head"],
                bias=True,
                position=ALiBi(),
                dropout=float(config.get("attention_dropout", 0.0)),
            ),
            feedforward=MLP(hidden=4 * dim, activation="gelu_tanh"),
            dropout=float(config.get("hidden_dropout", 0.0)),
        ),
    )


def write_bloom(spec: Decoder) -> dict[str, Any]:
    """Write a pre-norm decoder with ALiBi and a norm on its embeddings as BLOOM's config."""
    block = spec.blocks[0]
    mixer, feedforward, norm = block.mixer, block.feedforward, spec.norm
    if not (
        isinstance(mixer, Attention)
        and isinstance(feedforward, MLP)
        and isinstance(norm, LayerNorm)
        and isinstance(mixer.position, ALiBi)
        and spec.embedding_norm == norm
        and feedforward == MLP(hidden=4 * spec.dim, activation="gelu_tanh")
        and isinstance(block.arrangement, PreNorm)
        and mixer.bias
    ):
        raise ValueError(
            "BLOOM has pre-norm blocks, attention with ALiBi and biases, tanh-GELU MLPs of 4 dim, LayerNorm, on "
            "the embeddings too"
        )
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "n_layer": spec.depth,
        "n_head": mixer.heads,
        "layer_norm_epsilon": norm.eps,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.init_std,
        "attention_dropout": mixer.dropout,
        "hidden_dropout": block.dropout,
        "apply_residual_connection_post_layernorm": False,
    }


def bloom_rules(spec: Decoder) -> Iterator[Rule]:
    """Yield the names of BLOOM's tensors against ours."""
    yield Rule("transformer.word_embeddings.weight", ("embedding.weight",))
    yield Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied)
    yield from _both("transformer.word_embeddings_layernorm", "embedding_norm")
    yield from _both("transformer.ln_f", "norm")
    for layer, block in enumerate(spec.blocks):
        assert isinstance(block.mixer, Attention)
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        yield from _both(f"{theirs}.input_layernorm", f"{ours}.mixer_norm")
        yield from _both(f"{theirs}.post_attention_layernorm", f"{ours}.feedforward_norm")
        interleaved = HeadInterleaved(block.mixer.heads)
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}.mixer.{name}.{kind}" for name in ("query", "key", "value"))
            yield Rule(f"{theirs}.self_attention.query_key_value.{kind}", parts, interleaved)
        yield from _both(f"{theirs}.self_attention.dense", f"{ours}.mixer.output")
        yield from _both(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.feedforward.up")
        yield from _both(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.feedforward.down")


def _both(theirs: str, ours: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Rule(f"{theirs}.{kind}", (f"{ours}.{kind}",), Stacked())
