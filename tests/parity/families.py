"""Small random models of transformers, one for each family of presets: the oracles of the architecture tests."""

import torch
import transformers
from torch import nn

_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


def _llama(**changes):
    return transformers.LlamaConfig(**{**_LLAMA, "head_dim": 8, **changes})


FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_implementation="eager"
    ),
    "llama": lambda: _llama(num_key_value_heads=4),
    "llama2": lambda: _llama(),
    "llama3": lambda: _llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "smollm2": lambda: _llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_LLAMA, head_dim=8, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "gemma": lambda: transformers.GemmaConfig(**{**_LLAMA, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": lambda: transformers.Gemma2Config(
        **{**_LLAMA, "head_dim": 16, "num_hidden_layers": 4, "sliding_window": 7, "query_pre_attn_scalar": 24}
    ),
    "phi3": lambda: transformers.Phi3Config(**_LLAMA, sliding_window=9),
    "phi4": lambda: transformers.Phi3Config(
        **_LLAMA,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0]},
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_LLAMA, head_dim=8, num_local_experts=4, sliding_window=None, router_aux_loss_coef=0.02
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=97, hidden_size=48, n_layer=3, n_head=6, attn_implementation="eager"
    ),
    "pythia": lambda: transformers.GPTNeoXConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        attn_implementation="eager",
    ),
}


# Other kinds of mixers: no masks, no keys and values to cache as attention has them.
RECURRENT = {
    "mamba": lambda: transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=5),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32, rescale_every=0, context_length=64
    ),
}


def oracle(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a random model whose biases and gains are random too, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config((FAMILIES | RECURRENT)[family]()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)  # larger scores, so that masks and caps matter
    return model
