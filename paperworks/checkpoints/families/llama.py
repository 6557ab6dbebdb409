"""The Llama line: llama (Touvron et al. 2023, arXiv:2302.13971) and mistral; the others build on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from paperworks.checkpoints.families.activations import read_activation, write_activation
from paperworks.checkpoints.families.rope import ENTRIES, rope_config, rope_from_config
from paperworks.checkpoints.family import Config, Family, GGUFNames, expect
from paperworks.checkpoints.layout import Rule, pair
from paperworks.models import Block, Decoder
from paperworks.nn import Attention, GatedMLP, RMSNorm

SIZES: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    **ENTRIES,
}


class Llama(Family):
    """Pre-norm with RMSNorm, gated MLPs, rotary positions; others of the line change single methods."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    prefix = "model."
    defaults: ClassVar[Mapping[str, Any]] = {**SIZES, "attention_bias": False, "mlp_bias": False}
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "rope_interleaved": (False,),
        "partial_rotary_factor": (1.0, None),
        "sliding_window": (None,),
        "use_sliding_window": (False,),
    }
    # pretraining_tp slices products, which changes their rounding only
    inert: ClassVar[frozenset[str]] = frozenset({"pretraining_tp", "is_llama_config", "max_sequence_length"})
    ignorable: ClassVar[tuple[str, ...]] = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    gguf: ClassVar[GGUFNames | None] = GGUFNames(architecture="llama", rotary_permuted=True)
    rope_base: ClassVar[float] = 10_000.0
    norms: ClassVar[Mapping[str, str]] = {
        "mixer_norm": "input_layernorm",
        "feedforward_norm": "post_attention_layernorm",
    }
    linears: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "self_attn.q_proj": ("mixer.query",),
        "self_attn.k_proj": ("mixer.key",),
        "self_attn.v_proj": ("mixer.value",),
        "self_attn.o_proj": ("mixer.output",),
        "mlp.gate_proj": ("feedforward.gate",),
        "mlp.up_proj": ("feedforward.up",),
        "mlp.down_proj": ("feedforward.down",),
    }

    def biases(self, entries: Config) -> tuple[bool, bool]:
        """Whether queries, keys and values have biases, and whether the output has one."""
        return bool(entries["attention_bias"]), bool(entries["attention_bias"])

    def write_biases(self, mixer: Attention, feedforward: GatedMLP) -> dict[str, Any]:
        """The entries that say so."""
        return {"attention_bias": mixer.bias, "mlp_bias": feedforward.bias}

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        bias, output_bias = self.biases(entries)
        norm = RMSNorm(eps=float(entries["rms_norm_eps"]))
        mixer = Attention(
            heads=entries["num_attention_heads"],
            kv_heads=entries["num_key_value_heads"],
            head_dim=entries["head_dim"],
            bias=bias,
            output_bias=output_bias,
            window=entries.get("sliding_window"),
            position=rope_from_config(entries, base=self.rope_base),
            dropout=float(entries["attention_dropout"]),
        )
        feedforward = GatedMLP(
            hidden=entries["intermediate_size"],
            activation=read_activation(entries["hidden_act"]),
            bias=bool(entries.get("mlp_bias", False)),
        )
        return Decoder(
            vocab_size=entries["vocab_size"],
            dim=entries["hidden_size"],
            depth=entries["num_hidden_layers"],
            context=entries["max_position_embeddings"],
            tied=bool(entries["tie_word_embeddings"]),
            init_std=float(entries["initializer_range"]),
            norm=norm,
            block=Block(norm=norm, mixer=mixer, feedforward=feedforward),
        )

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        block = expect(spec, Decoder, "the model").blocks[0]
        mixer = expect(block.mixer, Attention, "the mixer")
        feedforward = expect(block.feedforward, GatedMLP, "the feedforward part")
        config = {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.dim,
            "num_hidden_layers": spec.depth,
            "intermediate_size": feedforward.hidden,
            "num_attention_heads": mixer.heads,
            "num_key_value_heads": mixer.kv_heads or mixer.heads,
            "head_dim": mixer.head_size(spec.dim),
            "hidden_act": write_activation(feedforward.activation, tanh="gelu_pytorch_tanh"),
            "max_position_embeddings": spec.context or 1_048_576,
            "rms_norm_eps": expect(spec.norm, RMSNorm, "the last norm").eps,
            "tie_word_embeddings": spec.tied,
            "initializer_range": spec.init_std,
            "attention_dropout": mixer.dropout,
            **self.write_biases(mixer, feedforward),
            **rope_config(mixer.position, spec.context),
        }
        return config | ({"sliding_window": mixer.window} if "sliding_window" in self.defaults else {})

    def rules(self, spec: Decoder) -> list[Rule]:
        """How the tensors correspond."""
        found = [
            Rule("model.embed_tokens.weight", ("embedding.weight",)),
            Rule("model.norm.weight", ("norm.weight",)),
            Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied),
        ]
        for layer in range(spec.depth):
            found += self.layer_rules(spec.blocks[layer], f"model.layers.{layer}", f"blocks.{layer}")
        return found

    def layer_rules(self, block: Block, theirs: str, ours: str) -> Iterator[Rule]:
        """How the tensors of one layer correspond."""
        for mine, other in self.norms.items():
            yield Rule(f"{theirs}.{other}.weight", (f"{ours}.{mine}.weight",))
        for other, parts in self.linears.items():
            yield from pair(f"{theirs}.{other}", *(f"{ours}.{part}" for part in parts))


class Mistral(Llama):
    """Llama with a window (Jiang et al. 2023, arXiv:2310.06825) and no biases."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        **SIZES,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0, None),
    }
    inert: ClassVar[frozenset[str]] = frozenset()
    gguf: ClassVar[GGUFNames | None] = None

    def biases(self, entries: Config) -> tuple[bool, bool]:
        """None."""
        return False, False

    def write_biases(self, mixer: Attention, feedforward: GatedMLP) -> dict[str, Any]:
        """Nothing to say."""
        return {}
