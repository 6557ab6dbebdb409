"""Gemma (2024, arXiv:2403.08295) and Gemma 2 (2024, arXiv:2408.00118)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from paperworks.checkpoints.families.llama import SIZES, Mistral
from paperworks.checkpoints.families.windows import layer_types, windowed
from paperworks.checkpoints.family import Config, GGUFNames, expect
from paperworks.models import Decoder, Sandwich
from paperworks.nn import Attention, GatedMLP, RMSNorm

_SIZES: Mapping[str, Any] = {
    **SIZES,
    "vocab_size": 256_000,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": (None, False),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
}


class Gemma(Mistral):
    """Llama with gains stored as 1 + gain, GELU, and embeddings times sqrt(dim)."""

    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        **_SIZES,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = _FIXED
    gguf: ClassVar[GGUFNames | None] = GGUFNames(architecture="gemma", gain_shift=1.0)

    def biases(self, entries: Config) -> tuple[bool, bool]:
        """Whether queries, keys, values and the output have one."""
        return bool(entries["attention_bias"]), bool(entries["attention_bias"])

    def write_biases(self, mixer: Attention, feedforward: GatedMLP) -> dict[str, Any]:
        """The entry that says so."""
        return {"attention_bias": mixer.bias}

    def activation(self, entries: Config) -> str:
        """The name of the activation. The first files say "gelu" and mean the tanh form, as transformers reads them."""
        said = [entries["hidden_act"], entries["hidden_activation"] or entries["hidden_act"]]
        tanh = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
        first, second = ("gelu_pytorch_tanh" if name in tanh else name for name in said)
        if first != second:
            raise ValueError(f"config.json says hidden_act={said[0]!r} and hidden_activation={said[1]!r}")
        return str(first)

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        base = super().spec({**entries, "hidden_act": self.activation(entries)})
        block = base.blocks[0]
        norm = RMSNorm(eps=float(entries["rms_norm_eps"]), offset=True)
        return replace(base, norm=norm, block=replace(block, norm=norm), embedding_scale=float(base.dim) ** 0.5)

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        config = super().config(spec)
        return config | {"hidden_activation": config["hidden_act"]}


class Gemma2(Gemma):
    """Gemma with norms on both sides, windows in every other layer, and caps on scores and logits."""

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        **_SIZES,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    }
    # cache_implementation is a setting of `generate` that published files carry
    inert: ClassVar[frozenset[str]] = frozenset({"cache_implementation"})
    gguf: ClassVar[GGUFNames | None] = None
    norms: ClassVar[Mapping[str, str]] = {
        "mixer_norm": "input_layernorm",
        "mixer_post_norm": "post_attention_layernorm",
        "feedforward_norm": "pre_feedforward_layernorm",
        "feedforward_post_norm": "post_feedforward_layernorm",
    }

    def activation(self, entries: Config) -> str:
        """The name of the activation; hidden_act is Gemma 1's entry, and only repeats it here."""
        said = entries["hidden_activation"] or "gelu_pytorch_tanh"
        return super().activation({**entries, "hidden_activation": said})

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        base = super().spec({**entries, "sliding_window": None})
        block = base.blocks[0]
        cap, last = entries["attn_logit_softcapping"], entries["final_logit_softcapping"]
        mixer = replace(
            expect(block.mixer, Attention, "the mixer"),
            soft_cap=None if cap is None else float(cap),
            scale=float(entries["query_pre_attn_scalar"]) ** -0.5,
        )
        base = replace(
            base,
            block=replace(block, arrangement=Sandwich(), mixer=mixer),
            logit_soft_cap=None if last is None else float(last),
        )
        types = entries["layer_types"] or [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(base.depth)
        ]
        return windowed(base, types, entries["sliding_window"])

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        types, window = layer_types(spec)
        first = expect(spec.blocks[0].mixer, Attention, "the mixer")
        return super().config(spec) | {
            "attn_logit_softcapping": first.soft_cap,
            "final_logit_softcapping": spec.logit_soft_cap,
            # an integer there
            "query_pre_attn_scalar": round((first.scale or first.head_size(spec.dim) ** -0.5) ** -2),
            "sliding_window": window or 4096,
            "layer_types": types,
        }
