"""GPT, GPT-2 and GPT-NeoX in Hugging Face's config.json, both ways."""

from collections.abc import Mapping
from typing import Any

from paperworks.checkpoints.hf_activations import read_activation, write_activation
from paperworks.checkpoints.hf_rope import rope_config, rope_from_config
from paperworks.models import Block, Decoder, Parallel, PostNorm, PreNorm
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions, RoPE

Config = Mapping[str, Any]


def read_gpt1(config: Config) -> Decoder:
    """Read the config of OpenAI's first GPT, whose "gelu" is the tanh form."""
    dim, context = config["n_embd"], config["n_positions"]
    norm = LayerNorm(eps=float(config.get("layer_norm_epsilon", 1e-5)))
    name = config.get("afn", "gelu")
    activation = read_activation("gelu_new" if name == "gelu" else name)
    residual = float(config.get("resid_pdrop", 0.1))
    return Decoder(
        vocab_size=config["vocab_size"],
        dim=dim,
        depth=config["n_layer"],
        context=context,
        position=LearnedPositions(length=context),
        tied=bool(config.get("tie_word_embeddings", True)),
        init_std=float(config.get("initializer_range", 0.02)),
        dropout=float(config.get("embd_pdrop", 0.1)),
        norm=None,
        block=Block(
            norm=norm,
            arrangement=PostNorm(),
            mixer=Attention(heads=config["n_head"], bias=True, dropout=float(config.get("attn_pdrop", 0.1))),
            feedforward=MLP(hidden=4 * dim, activation=activation),
            dropout=residual,
        ),
    )


def write_gpt1(spec: Decoder) -> dict[str, Any]:
    """Write a post-norm decoder with learned positions and no last norm as OpenAI's first GPT."""
    block = spec.blocks[0]
    fits = (
        isinstance(block.arrangement, PostNorm)
        and isinstance(block.mixer, Attention)
        and isinstance(block.feedforward, MLP)
        and isinstance(block.norm, LayerNorm)
        and isinstance(spec.position, LearnedPositions)
        and spec.norm is None
    )
    if not fits or block.feedforward.hidden != 4 * spec.dim:  # type: ignore[union-attr]
        raise ValueError("GPT has post-norm blocks, MLPs of 4 dim, learned positions and no norm after the last block")
    assert isinstance(block.mixer, Attention)
    assert isinstance(block.feedforward, MLP)
    assert isinstance(block.norm, LayerNorm)
    assert isinstance(spec.position, LearnedPositions)
    activation = write_activation(block.feedforward.activation)
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.dim,
        "n_layer": spec.depth,
        "n_head": block.mixer.heads,
        "n_positions": spec.position.length,
        "afn": "gelu" if activation in ("gelu_new", "gelu_pytorch_tanh") else activation,
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.init_std,
        "embd_pdrop": spec.dropout,
        "attn_pdrop": block.mixer.dropout,
        "resid_pdrop": block.dropout,
    }


def read_gpt2(config: Config) -> Decoder:
    """Read GPT-2's config; ValueError for options that no published checkpoint has."""
    for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if config.get(option):
            raise ValueError(f"GPT-2 with {option}=true is not read; published checkpoints have it off")
    dim, context = config["n_embd"], config["n_positions"]
    norm = LayerNorm(eps=float(config.get("layer_norm_epsilon", 1e-5)))
    activation = read_activation(config.get("activation_function", "gelu_new"))
    return Decoder(
        vocab_size=config["vocab_size"],
        dim=dim,
        depth=config["n_layer"],
        context=context,
        position=LearnedPositions(length=context),
        tied=bool(config.get("tie_word_embeddings", True)),
        init_std=float(config.get("initializer_range", 0.02)),
        norm=norm,
        block=Block(
            norm=norm,
            mixer=Attention(heads=config["n_head"], bias=True),
            feedforward=MLP(hidden=config.get("n_inner") or 4 * dim, activation=activation),
        ),
    )


def write_gpt2(spec: Decoder) -> dict[str, Any]:
    """Write a decoder with LayerNorm, MLPs and learned positions as GPT-2's config."""
    block = spec.blocks[0]
    if not (
        isinstance(block.mixer, Attention)
        and isinstance(block.feedforward, MLP)
        and isinstance(spec.norm, LayerNorm)
        and isinstance(spec.position, LearnedPositions)
    ):
        raise ValueError("GPT-2 has attention, an MLP, LayerNorm and learned positions")
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.dim,
        "n_layer": spec.depth,
        "n_head": block.mixer.heads,
        "n_inner": block.feedforward.hidden,
        "n_positions": spec.position.length,
        "activation_function": write_activation(block.feedforward.activation),
        "layer_norm_epsilon": spec.norm.eps,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.init_std,
    }


def read_neox(config: Config) -> Decoder:
    """Read GPT-NeoX's config (Pythia)."""
    norm = LayerNorm(eps=float(config.get("layer_norm_eps", 1e-5)))
    bias = bool(config.get("attention_bias", True))
    activation = read_activation(config.get("hidden_act", "gelu"))
    return Decoder(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        context=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range", 0.02)),
        norm=norm,
        block=Block(
            norm=norm,
            arrangement=Parallel() if config.get("use_parallel_residual", True) else PreNorm(),
            mixer=Attention(
                heads=config["num_attention_heads"],
                bias=bias,
                position=rope_from_config(config, fraction=float(config.get("rotary_pct", 0.25))),
            ),
            feedforward=MLP(hidden=config["intermediate_size"], activation=activation),
        ),
    )


def write_neox(spec: Decoder) -> dict[str, Any]:
    """Write a decoder with LayerNorm, MLPs and rotary positions as GPT-NeoX's config."""
    block = spec.blocks[0]
    if not (
        isinstance(block.mixer, Attention) and isinstance(block.feedforward, MLP) and isinstance(spec.norm, LayerNorm)
    ):
        raise ValueError("GPT-NeoX has attention, an MLP and LayerNorm")
    rope = block.mixer.position
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": block.mixer.heads,
        "intermediate_size": block.feedforward.hidden,
        "max_position_embeddings": spec.context or 1_048_576,
        "hidden_act": write_activation(block.feedforward.activation),
        "layer_norm_eps": spec.norm.eps,
        "attention_bias": block.mixer.bias,
        "use_parallel_residual": isinstance(block.arrangement, Parallel),
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.init_std,
        "rotary_pct": rope.fraction if isinstance(rope, RoPE) else None,
        "rotary_emb_base": rope.base if isinstance(rope, RoPE) else None,
        **rope_config(rope),
    }
