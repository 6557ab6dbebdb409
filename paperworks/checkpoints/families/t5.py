"""T5 (Raffel et al. 2019, arXiv:1910.10683), of the first version and 1.1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from paperworks.checkpoints.family import Config, Family, Inexpressible, expect
from paperworks.checkpoints.layout import Rule
from paperworks.models import Seq2Seq
from paperworks.models.presets.t5 import t5
from paperworks.nn import MLP, Attention, Experts, GatedMLP, RelativeBuckets, RMSNorm

SIZES: Mapping[str, Any] = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
}


class T5(Family):
    """Pre-norm, no biases, relative buckets; version 1.1 is gated and not tied."""

    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    defaults: ClassVar[Mapping[str, Any]] = {
        **SIZES,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": None,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {"is_encoder_decoder": (True,)}
    # initializer_factor is of fresh weights; transformers sets dense_act_fn and is_gated_act from feed_forward_proj
    inert: ClassVar[frozenset[str]] = frozenset(
        {"classifier_dropout", "dense_act_fn", "initializer_factor", "is_decoder", "is_gated_act", "n_positions"}
    )
    synonyms: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }
    # a table that the first release wrote and never read
    ignorable: ClassVar[tuple[str, ...]] = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    copies: ClassVar[Mapping[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    }
    # version 1.1 as transformers 5 saves it, which ties what was not tied
    stand_ins: ClassVar[Mapping[str, str]] = {"lm_head.weight": "shared.weight"}

    def spec(self, entries: Config) -> Seq2Seq:
        """The spec of a config."""
        kind = entries["feed_forward_proj"]
        if kind not in ("relu", "gated-gelu"):
            raise ValueError(
                f"T5 with feed_forward_proj={kind!r} is not read; published checkpoints have relu or gated-gelu"
            )
        # a module in memory says so by another entry: transformers 5 calls every T5 tied, and version 1.1 is not
        scaled = entries["scale_decoder_outputs"]
        tied = bool(entries["tie_word_embeddings"] if scaled is None else scaled)
        return t5(**sizes(entries), gated=kind == "gated-gelu", tied=tied)

    def config(self, spec: Seq2Seq) -> dict[str, Any]:
        """The config of a spec."""
        config = write_sizes(spec)
        feedforward = spec.encoder.blocks[0].feedforward
        return config | {
            "feed_forward_proj": "gated-gelu" if isinstance(feedforward, GatedMLP) else "relu",
            "tie_word_embeddings": spec.decoder.tied,
        }

    def rules(self, spec: Seq2Seq) -> list[Rule]:
        """How the tensors correspond."""
        return list(t5_rules(spec, "DenseReluDense"))


def sizes(entries: Config) -> dict[str, Any]:
    """The arguments of the presets `t5` and `switch`."""
    depth = entries["num_layers"]
    if (entries["num_decoder_layers"] or depth) != depth:
        raise ValueError(
            f"num_decoder_layers={entries['num_decoder_layers']} with num_layers={depth} is not read: the decoder has "
            "another depth than its encoder, in no published model"
        )
    return {
        "dim": entries["d_model"],
        "hidden": entries["d_ff"],
        "depth": depth,
        "heads": entries["num_heads"],
        "head_dim": entries["d_kv"],
        "vocab_size": entries["vocab_size"],
        "buckets": entries["relative_attention_num_buckets"],
        "max_distance": entries["relative_attention_max_distance"],
        "dropout": float(entries["dropout_rate"]),
        "eps": float(entries["layer_norm_epsilon"]),
    }


def write_sizes(spec: Seq2Seq) -> dict[str, Any]:
    """The entries that T5 and Switch share."""
    encoder = expect(spec, Seq2Seq, "the model").encoder
    block = encoder.blocks[0]
    mixer = expect(block.mixer, Attention, "the encoder's mixer")
    position = expect(mixer.position, RelativeBuckets, "the positions")
    if not isinstance(block.feedforward, MLP | GatedMLP):
        raise Inexpressible([f"the feedforward part is {type(block.feedforward).__name__}, T5 has MLP or GatedMLP"])
    return {
        "vocab_size": encoder.vocab_size,
        "d_model": encoder.dim,
        "d_kv": mixer.head_size(encoder.dim),
        "d_ff": block.feedforward.hidden,
        "num_layers": encoder.depth,
        "num_decoder_layers": spec.decoder.depth,
        "num_heads": mixer.heads,
        "relative_attention_num_buckets": position.buckets,
        "relative_attention_max_distance": position.max_distance,
        "dropout_rate": block.dropout,
        "layer_norm_epsilon": expect(block.norm, RMSNorm, "a block's norm").eps,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def t5_rules(spec: Seq2Seq, dense: str) -> Iterator[Rule]:
    """The names of T5's tensors, or of Switch's; `dense` is what the feedforward part is called."""
    yield Rule("shared.weight", ("encoder.embedding.weight",))
    yield Rule("lm_head.weight", ("decoder.unembedding.weight",), optional=spec.decoder.tied)
    for stack, blocks in (("encoder", spec.encoder.blocks), ("decoder", spec.decoder.blocks)):
        yield Rule(f"{stack}.final_layer_norm.weight", (f"{stack}.norm.weight",))
        yield Rule(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (f"{stack}.blocks.0.mixer.relative.weight",),
        )
        for layer, block in enumerate(blocks):
            theirs, ours = f"{stack}.block.{layer}.layer", f"{stack}.blocks.{layer}"
            parts = [("0.SelfAttention", "mixer")]
            parts += [("1.EncDecAttention", "cross")] if stack == "decoder" else []
            for index, (name, mine) in enumerate(parts):
                yield Rule(f"{theirs}.{index}.layer_norm.weight", (f"{ours}.{mine}_norm.weight",))
                for letter, linear in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                    yield Rule(f"{theirs}.{name}.{letter}.weight", (f"{ours}.{mine}.{linear}.weight",))
            yield Rule(f"{theirs}.{len(parts)}.layer_norm.weight", (f"{ours}.feedforward_norm.weight",))
            place, mine = f"{theirs}.{len(parts)}.{dense}", f"{ours}.feedforward"
            if isinstance(block.feedforward, Experts):
                yield Rule(f"{place}.router.classifier.weight", (f"{mine}.router.logits.weight",))
                for index in range(block.feedforward.count):
                    yield from _mlp(f"{place}.experts.expert_{index}", f"{mine}.experts.{index}", gated=False)
            else:
                yield from _mlp(place, mine, gated=isinstance(block.feedforward, GatedMLP))


def _mlp(theirs: str, ours: str, *, gated: bool) -> Iterator[Rule]:
    names = (("wi_0", "gate"), ("wi_1", "up")) if gated else (("wi", "up"),)
    for name, mine in (*names, ("wo", "down")):
        yield Rule(f"{theirs}.{name}.weight", (f"{ours}.{mine}.weight",))
