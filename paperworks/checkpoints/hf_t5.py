"""T5 in the Hugging Face layout: its config and its tensors' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paperworks.checkpoints.layout import Rule
from paperworks.models import Seq2Seq
from paperworks.models.presets import t5
from paperworks.nn import MLP, Attention, GatedMLP, RelativeBuckets

Config = Mapping[str, Any]

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the shared table, in old files


def read_t5(config: Config) -> Seq2Seq:
    """Return the spec of a T5 config, of the first version or 1.1 (gated, untied).

    Raises ValueError for options that no published checkpoint has.
    """
    kind = config.get("feed_forward_proj", "relu")
    if kind not in ("relu", "gated-gelu"):
        raise ValueError(
            f"T5 with feed_forward_proj={kind!r} is not read; published checkpoints have relu or gated-gelu"
        )
    depth = config["num_layers"]
    if (config.get("num_decoder_layers") or depth) != depth:
        raise ValueError("T5 whose decoder has another depth than its encoder is not read; published models have one")
    return t5(
        dim=config["d_model"],
        hidden=config["d_ff"],
        depth=depth,
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        vocab_size=config["vocab_size"],
        gated=kind == "gated-gelu",
        # a module in memory says so by another entry: transformers 5 calls every T5 tied, and version 1.1 is not
        tied=bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))),
        buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        dropout=float(config.get("dropout_rate", 0.1)),
        eps=float(config.get("layer_norm_epsilon", 1e-6)),
    )


def write_t5(spec: Seq2Seq) -> dict[str, Any]:
    """Return the config of a T5 model; raises ValueError for another one."""
    encoder, decoder = spec.encoder, spec.decoder
    block = encoder.blocks[0]
    mixer, feedforward = block.mixer, block.feedforward
    if not (
        isinstance(mixer, Attention)
        and isinstance(mixer.position, RelativeBuckets)
        and isinstance(feedforward, MLP | GatedMLP)
    ):
        raise ValueError("T5 has attention with relative buckets and an MLP in every block")
    return {
        "vocab_size": encoder.vocab_size,
        "d_model": encoder.dim,
        "d_kv": mixer.head_size(encoder.dim),
        "d_ff": feedforward.hidden,
        "num_layers": encoder.depth,
        "num_decoder_layers": decoder.depth,
        "num_heads": mixer.heads,
        "relative_attention_num_buckets": mixer.position.buckets,
        "relative_attention_max_distance": mixer.position.max_distance,
        "dropout_rate": block.dropout,
        "layer_norm_epsilon": block.norm.eps,  # type: ignore[attr-defined]
        "feed_forward_proj": "gated-gelu" if isinstance(feedforward, GatedMLP) else "relu",
        "tie_word_embeddings": decoder.tied,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def t5_rules(spec: Seq2Seq) -> Iterator[Rule]:
    """Yield the names of a T5 model's tensors."""
    yield Rule("shared.weight", ("encoder.embedding.weight",))
    yield Rule("lm_head.weight", ("decoder.unembedding.weight",), optional=spec.decoder.tied)
    for stack in ("encoder", "decoder"):
        yield Rule(f"{stack}.final_layer_norm.weight", (f"{stack}.norm.weight",))
        yield Rule(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (f"{stack}.blocks.0.mixer.relative.weight",),
        )
        for layer in range(getattr(spec, stack).depth):
            theirs, ours = f"{stack}.block.{layer}.layer", f"{stack}.blocks.{layer}"
            parts = [("0.SelfAttention", "mixer")]
            parts += [("1.EncDecAttention", "cross")] if stack == "decoder" else []
            for index, (name, mine) in enumerate(parts):
                yield Rule(f"{theirs}.{index}.layer_norm.weight", (f"{ours}.{mine}_norm.weight",))
                for letter, linear in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                    yield Rule(f"{theirs}.{name}.{letter}.weight", (f"{ours}.{mine}.{linear}.weight",))
            last = len(parts)
            yield Rule(f"{theirs}.{last}.layer_norm.weight", (f"{ours}.feedforward_norm.weight",))
            gated = isinstance(spec.encoder.blocks[0].feedforward, GatedMLP)
            names = (("wi_0", "gate"), ("wi_1", "up")) if gated else (("wi", "up"),)
            for name, mine in (*names, ("wo", "down")):
                yield Rule(f"{theirs}.{last}.DenseReluDense.{name}.weight", (f"{ours}.feedforward.{mine}.weight",))
