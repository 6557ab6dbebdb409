"""Mamba and RWKV in the Hugging Face layout: their configs and their tensors' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paperworks.checkpoints.layout import Reshaped, Rule
from paperworks.models import Block, Decoder
from paperworks.nn import RWKV, LayerNorm, Mamba, RMSNorm, RWKVChannelMix

Config = Mapping[str, Any]


def read_mamba(config: Config) -> Decoder:
    """Return the spec of a Mamba config. Raises ValueError for options that no published checkpoint has."""
    expand = int(config.get("expand", 2))
    for option, usual in (("use_bias", False), ("use_conv_bias", True), ("hidden_act", "silu")):
        if config.get(option, usual) != usual:
            raise ValueError(f"Mamba with {option}={config[option]!r} is not read; published models have {usual!r}")
    if config.get("intermediate_size", expand * config["hidden_size"]) != expand * config["hidden_size"]:
        raise ValueError("Mamba whose intermediate_size is not expand x hidden_size is not read")
    rank = config.get("time_step_rank", "auto")
    norm = RMSNorm(eps=float(config.get("layer_norm_epsilon", 1e-5)))
    mixer = Mamba(
        state=config["state_size"],
        expand=expand,
        width=config.get("conv_kernel", 4),
        rank=None if rank == "auto" else int(rank),
    )
    return Decoder(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        tied=bool(config.get("tie_word_embeddings", True)),
        norm=norm,
        block=Block(norm=norm, mixer=mixer),
    )


def write_mamba(spec: Decoder) -> dict[str, Any]:
    """Return the config of a Mamba model; raises ValueError for another one."""
    mixer, norm = spec.blocks[0].mixer, spec.norm
    if not (isinstance(mixer, Mamba) and mixer.selective and isinstance(norm, RMSNorm)):
        raise ValueError("Mamba has a selective mixer in every block and RMSNorm")
    config = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.depth,
        "state_size": mixer.state,
        "expand": mixer.expand,
        "conv_kernel": mixer.width,
        "intermediate_size": mixer.expand * spec.dim,
        "layer_norm_epsilon": norm.eps,
        "tie_word_embeddings": spec.tied,
    }
    return config if mixer.rank is None else config | {"time_step_rank": mixer.rank}


def mamba_rules(spec: Decoder) -> Iterator[Rule]:
    """Yield the names of a Mamba model's tensors."""
    yield Rule("backbone.embeddings.weight", ("embedding.weight",))
    yield Rule("backbone.norm_f.weight", ("norm.weight",))
    yield Rule("lm_head.weight", ("unembedding.weight",), optional=spec.tied)
    names = {
        "in_proj.weight": "input.weight",
        "conv1d.weight": "convolution.weight",
        "conv1d.bias": "convolution.bias",
        "x_proj.weight": "select.weight",
        "dt_proj.weight": "step.weight",
        "dt_proj.bias": "step.bias",
        "A_log": "log_decay",
        "D": "skip",
        "out_proj.weight": "output.weight",
    }
    for layer in range(spec.depth):
        theirs, ours = f"backbone.layers.{layer}", f"blocks.{layer}"
        yield Rule(f"{theirs}.norm.weight", (f"{ours}.mixer_norm.weight",))
        for name, mine in names.items():
            yield Rule(f"{theirs}.mixer.{name}", (f"{ours}.mixer.{mine}",))


def read_rwkv(config: Config) -> Decoder:
    """Return the spec of an RWKV-4 config. Raises ValueError for attention as wide as nothing published."""
    dim, layers = config["hidden_size"], config["num_hidden_layers"]
    if (config.get("attention_hidden_size") or dim) != dim:
        raise ValueError("RWKV whose attention_hidden_size is not hidden_size is not read; no published model is so")
    norm = LayerNorm(eps=float(config.get("layer_norm_epsilon", 1e-5)))
    hidden = config.get("intermediate_size") or 4 * dim
    mixing = Block(norm=norm, mixer=RWKV()), Block(norm=norm, mixer=RWKVChannelMix(hidden=hidden))
    return Decoder(
        vocab_size=config["vocab_size"],
        dim=dim,
        depth=2 * layers,
        block=mixing * layers,
        norm=norm,
        embedding_norm=norm,
        embedding_std=1e-4,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def write_rwkv(spec: Decoder) -> dict[str, Any]:
    """Return the config of an RWKV-4 model; raises ValueError for another one."""
    blocks = spec.blocks
    if len(blocks) % 2 or not (isinstance(blocks[1].mixer, RWKVChannelMix) and isinstance(spec.norm, LayerNorm)):
        raise ValueError("RWKV has blocks of time mixing and channel mixing in turn, and LayerNorm")
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "attention_hidden_size": spec.dim,
        "intermediate_size": blocks[1].mixer.hidden or 4 * spec.dim,
        "num_hidden_layers": spec.depth // 2,
        "layer_norm_epsilon": spec.norm.eps,
        "tie_word_embeddings": spec.tied,
        "rescale_every": 0,  # it halves weights as they are used, which changes nothing but what is saved then
    }


def rwkv_rules(spec: Decoder) -> Iterator[Rule]:
    """Yield the names of an RWKV-4 model's tensors."""
    yield Rule("rwkv.embeddings.weight", ("embedding.weight",))
    yield Rule("head.weight", ("unembedding.weight",), optional=spec.tied)
    yield from _layer_norm("rwkv.blocks.0.pre_ln", "embedding_norm")
    yield from _layer_norm("rwkv.ln_out", "norm")
    blends = {"blend_key": "time_mix_key", "blend_value": "time_mix_value", "blend_receptance": "time_mix_receptance"}
    row = Reshaped((1, 1, spec.dim))
    for layer in range(spec.depth // 2):
        theirs = f"rwkv.blocks.{layer}"
        for norm, ours, part, kept in (
            ("ln1", f"blocks.{2 * layer}", "attention", ("key", "value", "receptance")),
            ("ln2", f"blocks.{2 * layer + 1}", "feed_forward", ("key", "receptance")),
        ):
            yield from _layer_norm(f"{theirs}.{norm}", f"{ours}.mixer_norm")
            for name in kept:
                mine = f"blend_{name}"
                yield Rule(f"{theirs}.{part}.{blends[mine]}", (f"{ours}.mixer.{mine}",), row)
            for name in ("key", "value", "receptance", *(("output",) if part == "attention" else ())):
                yield Rule(f"{theirs}.{part}.{name}.weight", (f"{ours}.mixer.{name}.weight",))
            if part == "attention":
                yield Rule(f"{theirs}.{part}.time_decay", (f"{ours}.mixer.log_decay",))
                yield Rule(f"{theirs}.{part}.time_first", (f"{ours}.mixer.bonus",))


def _layer_norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.weight", (f"{ours}.weight",))
    yield Rule(f"{theirs}.bias", (f"{ours}.bias",))
