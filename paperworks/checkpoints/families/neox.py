"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), the family of Pythia."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from paperworks.checkpoints.families.activations import read_activation, write_activation
from paperworks.checkpoints.families.rope import ENTRIES, rope_config, rope_from_config
from paperworks.checkpoints.family import Config, Family, expect
from paperworks.checkpoints.layout import HeadInterleaved, Rule, pair
from paperworks.models import Block, Decoder, Parallel, PreNorm
from paperworks.nn import MLP, Attention, LayerNorm, RoPE


class NeoX(Family):
    """Attention and MLP side by side, a quarter of each head rotated."""

    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    prefix = "gpt_neox."
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50_432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24_576,
        "hidden_act": "gelu",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000.0,
        "partial_rotary_factor": None,
        **ENTRIES,
    }
    # of a classification head; the model is a decoder whatever is_decoder says
    inert: ClassVar[frozenset[str]] = frozenset({"classifier_dropout", "is_decoder"})
    ignorable: ClassVar[tuple[str, ...]] = (
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    )
    # its files, and the module since transformers 5
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {"embed_out.weight": ("lm_head.weight",)}

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        norm = LayerNorm(eps=float(entries["layer_norm_eps"]))
        mixer = Attention(
            heads=entries["num_attention_heads"],
            bias=bool(entries["attention_bias"]),
            dropout=float(entries["attention_dropout"]),
            position=rope_from_config(
                entries, base=float(entries["rotary_emb_base"]), fraction=float(entries["rotary_pct"]), partial=True
            ),
        )
        hidden_dropout = float(entries["hidden_dropout"])
        return Decoder(
            vocab_size=entries["vocab_size"],
            dim=entries["hidden_size"],
            depth=entries["num_hidden_layers"],
            context=entries["max_position_embeddings"],
            tied=bool(entries["tie_word_embeddings"]),
            init_std=float(entries["initializer_range"]),
            norm=norm,
            dropout=hidden_dropout,
            block=Block(
                norm=norm,
                arrangement=Parallel() if entries["use_parallel_residual"] else PreNorm(),
                mixer=mixer,
                feedforward=MLP(hidden=entries["intermediate_size"], activation=read_activation(entries["hidden_act"])),
                dropout=hidden_dropout,
            ),
        )

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        block = expect(spec, Decoder, "the model").blocks[0]
        mixer = expect(block.mixer, Attention, "the mixer")
        feedforward = expect(block.feedforward, MLP, "the feedforward part")
        rope = expect(mixer.position, RoPE, "the positions")
        return {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.dim,
            "num_hidden_layers": spec.depth,
            "num_attention_heads": mixer.heads,
            "intermediate_size": feedforward.hidden,
            "max_position_embeddings": spec.context or 1_048_576,
            "hidden_act": write_activation(feedforward.activation),
            "layer_norm_eps": expect(spec.norm, LayerNorm, "the last norm").eps,
            "attention_bias": mixer.bias,
            "attention_dropout": mixer.dropout,
            "hidden_dropout": spec.dropout,
            "use_parallel_residual": isinstance(block.arrangement, Parallel),
            "tie_word_embeddings": spec.tied,
            "initializer_range": spec.init_std,
            "rotary_pct": rope.fraction,
            "rotary_emb_base": rope.base,
            **rope_config(rope, spec.context, partial=True),
        }

    def rules(self, spec: Decoder) -> list[Rule]:
        """How the tensors correspond."""
        found = [
            Rule("gpt_neox.embed_in.weight", ("embedding.weight",)),
            Rule("embed_out.weight", ("unembedding.weight",), optional=spec.tied),
            *pair("gpt_neox.final_layer_norm", "norm"),
        ]
        return found + interleaved_blocks(spec, layers="gpt_neox.layers", attention="attention")


def interleaved_blocks(spec: Decoder, *, layers: str, attention: str) -> list[Rule]:
    """Rules of GPT-NeoX's blocks, which BLOOM has too: one map for queries, keys and values, interleaved by head."""
    found: list[Rule] = []
    for layer in range(spec.depth):
        theirs, ours = f"{layers}.{layer}", f"blocks.{layer}"
        heads = expect(spec.blocks[layer].mixer, Attention, "the mixer").heads
        fused = [f"{ours}.mixer.{name}" for name in ("query", "key", "value")]
        found += [
            *pair(f"{theirs}.input_layernorm", f"{ours}.mixer_norm"),
            *pair(f"{theirs}.post_attention_layernorm", f"{ours}.feedforward_norm"),
            *pair(f"{theirs}.{attention}.query_key_value", *fused, codec=HeadInterleaved(heads)),
            *pair(f"{theirs}.{attention}.dense", f"{ours}.mixer.output"),
            *pair(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.feedforward.up"),
            *pair(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.feedforward.down"),
        ]
    return found
