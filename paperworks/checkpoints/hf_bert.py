"""BERT in the Hugging Face layout: its config and its tensors' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paperworks.checkpoints.hf_activations import read_activation, write_activation
from paperworks.checkpoints.layout import Rule
from paperworks.models import Block, Encoder, PostNorm
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions

Config = Mapping[str, Any]

HEADS = "cls."  # masked-language and next-sentence heads, which files of pre-training models carry


def read_bert(config: Config) -> Encoder:
    """Return the spec of a BERT config. Raises ValueError for options that no published checkpoint has."""
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"BERT with position_embedding_type={config['position_embedding_type']!r} is not read")
    if config.get("is_decoder"):
        raise ValueError("BERT with is_decoder=true is not read; published checkpoints have it off")
    activation = read_activation(config.get("hidden_act", "gelu"))
    norm = LayerNorm(eps=float(config.get("layer_norm_eps", 1e-12)))
    dropout = float(config.get("hidden_dropout_prob", 0.1))
    block = Block(
        norm=norm,
        arrangement=PostNorm(),
        mixer=Attention(
            heads=config["num_attention_heads"],
            causal=False,
            bias=True,
            dropout=float(config.get("attention_probs_dropout_prob", 0.1)),
        ),
        feedforward=MLP(hidden=config["intermediate_size"], activation=activation),
        dropout=dropout,
    )
    context = config["max_position_embeddings"]
    return Encoder(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        context=context,
        position=LearnedPositions(length=context),
        token_types=config.get("type_vocab_size", 2),
        embedding_norm=norm,
        norm=None,
        block=block,
        dropout=dropout,
        init_std=float(config.get("initializer_range", 0.02)),
        pooler=True,
    )


def write_bert(spec: Encoder) -> dict[str, Any]:
    """Return the config of a BERT model; raises ValueError for another one."""
    block = spec.blocks[0]
    mixer, feedforward = block.mixer, block.feedforward
    if not (isinstance(mixer, Attention) and isinstance(feedforward, MLP) and isinstance(block.norm, LayerNorm)):
        raise ValueError("BERT has attention, an MLP and LayerNorm in every block")
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": mixer.heads,
        "intermediate_size": feedforward.hidden,
        "hidden_act": write_activation(feedforward.activation),
        "max_position_embeddings": spec.context,
        "type_vocab_size": spec.token_types,
        "layer_norm_eps": block.norm.eps,
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": mixer.dropout,
        "initializer_range": spec.init_std,
    }


def bert_rules(spec: Encoder) -> Iterator[Rule]:
    """Yield the names of a BERT model's tensors, the heads of its pre-training left out."""
    yield Rule("bert.embeddings.word_embeddings.weight", ("embedding.weight",))
    yield Rule("bert.embeddings.position_embeddings.weight", ("position.weight",))
    yield Rule("bert.embeddings.token_type_embeddings.weight", ("token_type.weight",))
    yield from _both("bert.embeddings.LayerNorm", "embedding_norm")
    yield from _both("bert.pooler.dense", "pooler.dense", optional=True)
    for layer in range(spec.depth):
        theirs, ours = f"bert.encoder.layer.{layer}", f"blocks.{layer}"
        for name in ("query", "key", "value"):
            yield from _both(f"{theirs}.attention.self.{name}", f"{ours}.mixer.{name}")
        yield from _both(f"{theirs}.attention.output.dense", f"{ours}.mixer.output")
        yield from _both(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_norm")
        yield from _both(f"{theirs}.intermediate.dense", f"{ours}.feedforward.up")
        yield from _both(f"{theirs}.output.dense", f"{ours}.feedforward.down")
        yield from _both(f"{theirs}.output.LayerNorm", f"{ours}.feedforward_norm")


def _both(theirs: str, ours: str, *, optional: bool = False) -> Iterator[Rule]:
    yield Rule(f"{theirs}.weight", (f"{ours}.weight",), optional=optional)
    yield Rule(f"{theirs}.bias", (f"{ours}.bias",), optional=optional)
