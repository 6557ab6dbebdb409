"""Small configs of every family, for models that are built, written and read in milliseconds."""

from typing import Any

from paperworks.checkpoints import families

_LLAMA = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
_GPT = {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_T5 = {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}

SMALL: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gemma": _LLAMA | {"head_dim": 8},
    "gemma2": _LLAMA | {"head_dim": 8},
    "mixtral": _LLAMA | {"num_local_experts": 3},
    "phi3": _LLAMA,
    "openai-gpt": _GPT,
    "gpt2": _GPT,
    "gpt_neox": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"} | {"rotary_pct": 0.5},
    "bloom": {"vocab_size": 31, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "bert": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    "t5": _T5,
    "switch_transformers": _T5 | {"num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "mamba": {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2},
    "rwkv": {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2},
}


def spec(name: str, **changes: Any) -> Any:
    """The spec of a small model of a family."""
    return families.lookup(name).read(SMALL[name] | changes)
