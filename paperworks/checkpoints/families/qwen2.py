"""Qwen2 (Yang et al. 2024, arXiv:2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from paperworks.checkpoints.families.llama import SIZES, Mistral
from paperworks.checkpoints.families.windows import layer_types, windowed
from paperworks.checkpoints.family import Config, GGUFNames
from paperworks.models import Decoder


class Qwen2(Mistral):
    """Llama with biases on queries, keys and values, and windows in late layers where a file asks for them."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        **SIZES,
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mlp_bias": (False,),
        "use_mrope": (False,),
        "partial_rotary_factor": (1.0, None),
    }
    gguf: ClassVar[GGUFNames | None] = GGUFNames(architecture="qwen2")

    def biases(self, entries: Config) -> tuple[bool, bool]:
        """On queries, keys and values."""
        return True, False

    def spec(self, entries: Config) -> Decoder:
        """The spec of a config."""
        window = entries["sliding_window"] if entries["use_sliding_window"] else None
        base = super().spec({**entries, "sliding_window": None})
        first = entries["max_window_layers"]
        types = entries["layer_types"] or [
            "full_attention" if window is None or layer < first else "sliding_attention" for layer in range(base.depth)
        ]
        return windowed(base, types, window)

    def config(self, spec: Decoder) -> dict[str, Any]:
        """The config of a spec."""
        types, window = layer_types(spec)
        return super().config(spec) | {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": types,
        }
