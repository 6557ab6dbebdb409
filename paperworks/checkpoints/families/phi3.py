"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219): Llama with fused projections, a window, and part-rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from paperworks.checkpoints.families.llama import SIZES, Mistral
from paperworks.checkpoints.families.rope import rope_config, rope_from_config
from paperworks.checkpoints.family import Config, expect
from paperworks.models import Decoder
from paperworks.nn import Attention, LongRoPEScaling, RoPE


class Phi3(Mistral):
    """Its query, key and value are one tensor, as are gate and up."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        **SIZES,
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "resid_pdrop": 0.0,
        "partial_rotary_factor": None,
        # of the class; it counts before the same entry of rope_parameters
        "original_max_position_embeddings": 4096,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
    }
    # transformers has an entry for dropout of the embeddings, and does not use it
    inert: ClassVar[frozenset[str]] = frozenset({"embd_pdrop"})
    linears: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "self_attn.qkv_proj": ("mixer.query", "mixer.key", "mixer.value"),
        "self_attn.o_proj": ("mixer.output",),
        "mlp.gate_up_proj": ("feedforward.gate", "feedforward.up"),
        "mlp.down_proj": ("feedforward.down",),
    }

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        base = super().spec({**entries, "rope_parameters": None, "rope_scaling": None, "partial_rotary_factor": None})
        rope = rope_from_config(entries, partial=True)
        if not isinstance(rope.scaling, LongRoPEScaling | None):
            raise ValueError(f"Phi-3 has rope_type default or longrope, got {type(rope.scaling).__name__}")
        block = base.blocks[0]
        mixer = replace(expect(block.mixer, Attention, "the mixer"), position=rope)
        return replace(base, block=replace(block, mixer=mixer, dropout=float(entries["resid_pdrop"])))

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        block = expect(spec, Decoder, "the model").blocks[0]
        mixer = expect(block.mixer, Attention, "the mixer")
        rope = expect(mixer.position, RoPE, "the positions")
        plain = replace(block, mixer=replace(mixer, position=RoPE()))
        trained = getattr(rope.scaling, "trained_length", spec.context or 4096)
        return (
            super().config(replace(spec, block=(plain,) * spec.depth))
            | rope_config(rope, spec.context, partial=True)
            | {
                "resid_pdrop": block.dropout,
                "original_max_position_embeddings": trained,
                # the reader's default pad id (32,000) must lie inside the vocabulary
                "pad_token_id": min(32_000, spec.vocab_size - 1),
            }
        )
