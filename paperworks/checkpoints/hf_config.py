"""Hugging Face's config.json against our specs, family by family, both ways."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from paperworks.checkpoints import hf_bert, hf_bloom, hf_gpt, hf_recurrent, hf_t5
from paperworks.checkpoints.hf_activations import read_activation
from paperworks.checkpoints.hf_rope import rope_config, rope_from_config
from paperworks.core.errors import CorruptFile, unknown
from paperworks.models import Block, Decoder, Sandwich, Seq2Seq, Stack
from paperworks.nn import (
    Attention,
    Experts,
    GatedMLP,
    Mamba,
    Mixer,
    RMSNorm,
    RWKVChannelMix,
    TopKRouter,
)

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One model_type: how its config reads as a spec, and how a spec that it can express is written."""

    architecture: str
    read: Callable[[Config], Any]
    write: Callable[[Any], dict[str, Any]]


def spec_from_config(config: Config) -> Any:
    """Return the spec that a config.json describes.

    Raises:
        ValueError: for a model_type we do not read, or one whose options we do not have.
        CorruptFile: when a needed entry is missing or nonsense.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(unknown("model_type", str(kind), FAMILIES))
    try:
        return FAMILIES[kind].read(config)
    except KeyError as error:
        raise CorruptFile(f"config.json of model_type {kind!r} lacks {error.args[0]!r}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise CorruptFile(f"config.json of model_type {kind!r} has an entry of the wrong kind: {error}") from error


def config_from_spec(spec: Stack | Seq2Seq) -> dict[str, Any]:
    """Return the config.json of the first family that expresses `spec` exactly (reading it back gives `spec`).

    Raises:
        ValueError: when no family can, with the families that were tried.
    """
    for kind, family in FAMILIES.items():
        try:
            config = {"architectures": [family.architecture], "model_type": kind, "torch_dtype": "float32"}
            config |= family.write(spec)
            if _same_model(family.read(config), spec):
                return config
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue  # this family lacks one of the spec's parts; another may have it
    raise ValueError(
        f"no Hugging Face family expresses this model; tried {', '.join(FAMILIES)}. "
        "Save it with paperworks.save, which keeps every spec"
    )


def _same_model(one: Stack | Seq2Seq, other: Stack | Seq2Seq) -> bool:
    """Equal up to what says the same in other words: None for the default, one spec for all layers or a tuple."""

    def plain(spec: Any) -> Any:
        if isinstance(spec, Seq2Seq):
            return replace(spec, encoder=plain(spec.encoder), decoder=plain(spec.decoder))
        return replace(spec, block=tuple(replace(block, mixer=_plain(block.mixer, spec.dim)) for block in spec.blocks))

    return plain(one) == plain(other)


def _plain(mixer: Mixer, dim: int) -> Mixer:
    if isinstance(mixer, Mamba):
        return replace(mixer, rank=mixer.rank or math.ceil(dim / 16))
    if isinstance(mixer, RWKVChannelMix):
        return replace(mixer, hidden=mixer.hidden or 4 * dim)
    if not isinstance(mixer, Attention):
        return mixer
    return replace(
        mixer,
        kv_heads=mixer.kv_heads or mixer.heads,
        head_dim=mixer.head_size(dim),
        output_bias=mixer.bias if mixer.output_bias is None else mixer.output_bias,
        scale=mixer.scale or mixer.head_size(dim) ** -0.5,
    )


# --- the Llama line: llama, mistral, qwen2, phi3, gemma, gemma2 ----------------------------------------------------


def _read_llama_like(
    config: Config,
    *,
    window: int | None = None,
    bias: bool | None = None,
    output_bias: bool | None = None,
    tied: bool = False,
) -> Decoder:
    attention_bias = bool(config.get("attention_bias", False)) if bias is None else bias
    mixer = Attention(
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        bias=attention_bias,
        output_bias=attention_bias if output_bias is None else output_bias,
        window=window,
        position=rope_from_config(config),
    )
    norm = RMSNorm(eps=float(config["rms_norm_eps"]))
    feedforward = GatedMLP(
        hidden=config["intermediate_size"],
        activation=read_activation(config.get("hidden_activation") or config.get("hidden_act") or "silu"),
        bias=bool(config.get("mlp_bias", False)),
    )
    return Decoder(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        context=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", tied)),
        init_std=float(config.get("initializer_range", 0.02)),
        norm=norm,
        block=Block(norm=norm, mixer=mixer, feedforward=feedforward),
    )


def _write_llama_like(spec: Decoder) -> dict[str, Any]:
    block = spec.blocks[0]
    mixer, feedforward, norm = block.mixer, block.feedforward, spec.norm
    if not (isinstance(mixer, Attention) and isinstance(feedforward, GatedMLP) and isinstance(norm, RMSNorm)):
        raise ValueError("this family has attention, a gated MLP and RMSNorm")
    activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu"}[
        feedforward.activation
    ]
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.depth,
        "intermediate_size": feedforward.hidden,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "head_dim": mixer.head_size(spec.dim),
        "hidden_act": activation,
        "max_position_embeddings": spec.context or 1_048_576,
        "rms_norm_eps": norm.eps,
        "tie_word_embeddings": spec.tied,
        "attention_bias": mixer.bias,
        "mlp_bias": feedforward.bias,
        "initializer_range": spec.init_std,
        **rope_config(mixer.position),
    }


def _read_mistral(config: Config) -> Decoder:
    return _read_llama_like(config, window=config.get("sliding_window"), bias=False)


def _write_windowed(spec: Decoder) -> dict[str, Any]:
    mixer = spec.blocks[0].mixer
    if not isinstance(mixer, Attention):
        raise ValueError("this family has attention")
    return _write_llama_like(spec) | {"sliding_window": mixer.window}


def _read_qwen2(config: Config) -> Decoder:
    if config.get("use_sliding_window"):
        raise ValueError("Qwen2 with use_sliding_window=true is not read; published checkpoints have it off")
    return _read_llama_like(config, bias=True, output_bias=False)


def _write_qwen2(spec: Decoder) -> dict[str, Any]:
    return _write_llama_like(spec) | {"use_sliding_window": False}


def _read_phi3(config: Config) -> Decoder:
    return _read_llama_like(config, window=config.get("sliding_window"), bias=False)


def _write_phi3(spec: Decoder) -> dict[str, Any]:
    # the reader's default pad id (32,000) must lie inside the vocabulary
    return _write_windowed(spec) | {"pad_token_id": min(32_000, spec.vocab_size - 1)}


def _read_gemma(config: Config) -> Decoder:
    base = _read_llama_like({"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, **config}, tied=True)
    norm = RMSNorm(eps=float(config["rms_norm_eps"]), offset=True)
    assert isinstance(base.block, Block)
    return replace(base, norm=norm, block=replace(base.block, norm=norm), embedding_scale=float(base.dim) ** 0.5)


def _write_gemma(spec: Decoder) -> dict[str, Any]:
    config = _write_llama_like(spec)
    return config | {"hidden_activation": config["hidden_act"]}


def _read_gemma2(config: Config) -> Decoder:
    base = _read_gemma(config)
    assert isinstance(base.block, Block)
    assert isinstance(base.block.mixer, Attention)
    cap = config.get("attn_logit_softcapping")
    mixer = replace(
        base.block.mixer,
        soft_cap=None if cap is None else float(cap),
        scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
    )
    full = replace(base.block, arrangement=Sandwich(), mixer=mixer)
    local = replace(full, mixer=replace(mixer, window=config.get("sliding_window", 4096)))
    kinds = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(base.depth)
    ]
    blocks = tuple(local if kind == "sliding_attention" else full for kind in kinds)
    cap = config.get("final_logit_softcapping")
    return replace(base, block=blocks, logit_soft_cap=None if cap is None else float(cap))


def _write_gemma2(spec: Decoder) -> dict[str, Any]:
    mixers = [block.mixer for block in spec.blocks if isinstance(block.mixer, Attention)]
    windows = {mixer.window for mixer in mixers if mixer.window is not None}
    first = mixers[0]
    return _write_gemma(spec) | {
        "attn_logit_softcapping": first.soft_cap,
        "final_logit_softcapping": spec.logit_soft_cap,
        "query_pre_attn_scalar": round((first.scale or first.head_size(spec.dim) ** -0.5) ** -2),  # an integer there
        "sliding_window": windows.pop() if windows else 4096,
        "layer_types": ["full_attention" if mixer.window is None else "sliding_attention" for mixer in mixers],
    }


# --- Mixtral ----------------------------------------------------------------------------------------------------------


def _read_mixtral(config: Config) -> Decoder:
    base = _read_llama_like(config, window=config.get("sliding_window"), bias=False)
    assert isinstance(base.block, Block)
    assert base.block.feedforward is not None
    router = TopKRouter(
        balance=float(config.get("router_aux_loss_coef", 0.001)), jitter=float(config.get("router_jitter_noise", 0.0))
    )
    experts = Experts(
        expert=base.block.feedforward,
        count=config["num_local_experts"],
        top=config.get("num_experts_per_tok", 2),
        router=router,
    )
    return replace(base, block=replace(base.block, feedforward=experts))


def _write_mixtral(spec: Decoder) -> dict[str, Any]:
    block = spec.blocks[0]
    experts = block.feedforward
    if not (isinstance(experts, Experts) and isinstance(experts.router, TopKRouter)):
        raise ValueError("Mixtral has a mixture of experts in every block")
    dense = replace(spec, block=tuple(replace(each, feedforward=experts.expert) for each in spec.blocks))
    return _write_windowed(dense) | {
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.top,
        "router_aux_loss_coef": experts.router.balance,
        "router_jitter_noise": experts.router.jitter,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _read_llama_like, _write_llama_like),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_windowed),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
    "gemma": Family("GemmaForCausalLM", _read_gemma, _write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
    "mixtral": Family("MixtralForCausalLM", _read_mixtral, _write_mixtral),
    "openai-gpt": Family("OpenAIGPTLMHeadModel", hf_gpt.read_gpt1, hf_gpt.write_gpt1),
    "gpt2": Family("GPT2LMHeadModel", hf_gpt.read_gpt2, hf_gpt.write_gpt2),
    "gpt_neox": Family("GPTNeoXForCausalLM", hf_gpt.read_neox, hf_gpt.write_neox),
    "phi3": Family("Phi3ForCausalLM", _read_phi3, _write_phi3),
    "bloom": Family("BloomForCausalLM", hf_bloom.read_bloom, hf_bloom.write_bloom),
    "bert": Family("BertModel", hf_bert.read_bert, hf_bert.write_bert),
    "t5": Family("T5ForConditionalGeneration", hf_t5.read_t5, hf_t5.write_t5),
    "switch_transformers": Family("SwitchTransformersForConditionalGeneration", hf_t5.read_switch, hf_t5.write_switch),
    "mamba": Family("MambaForCausalLM", hf_recurrent.read_mamba, hf_recurrent.write_mamba),
    "rwkv": Family("RwkvForCausalLM", hf_recurrent.read_rwkv, hf_recurrent.write_rwkv),
}
