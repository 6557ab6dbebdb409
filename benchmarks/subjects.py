"""The work both sides do: a 30M Llama (dim 512, 8 layers, 8 heads, hidden 1376, vocabulary 8192)."""

import torch
import transformers

from paperworks.checkpoints import from_transformers
from paperworks.models.presets.families import llama

DIM, DEPTH, HEADS, HIDDEN, VOCAB = 512, 8, 8, 1376, 8192


def peer_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def our_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return llama(DIM, DEPTH, HEADS, HIDDEN, vocab_size=VOCAB).build()


def pair():
    peer = peer_model()
    return from_transformers(peer), peer


def training_flops(tokens: int, time: int) -> float:
    """6 N per token for the matrices, plus causal attention (12 L d T / 2)."""
    matrices = DEPTH * (4 * DIM * DIM + 3 * DIM * HIDDEN) + VOCAB * DIM
    return tokens * (6 * matrices + 6 * DEPTH * DIM * time)
