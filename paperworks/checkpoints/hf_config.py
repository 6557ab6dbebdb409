"""Hugging Face's config.json against our specs, family by family, both ways."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from paperworks.errors import CorruptFile, unknown
from paperworks.models import Block, Decoder
from paperworks.nn import (
    MLP,
    Attention,
    DynamicNTKScaling,
    GatedMLP,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RMSNorm,
    RoPE,
    RoPEScaling,
    YaRNScaling,
)

Config = Mapping[str, Any]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """One model_type: how its config reads as a spec, and how a spec that it can express is written."""

    architecture: str
    read: Callable[[Config], Decoder]
    write: Callable[[Decoder], dict[str, Any]]


def spec_from_config(config: Config) -> Decoder:
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


def config_from_spec(spec: Decoder) -> dict[str, Any]:
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
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # this family lacks one of the spec's parts; another may have it
    raise ValueError(
        f"no Hugging Face family expresses this model; tried {', '.join(FAMILIES)}. "
        "Save it with paperworks.save, which keeps every spec"
    )


def _same_model(one: Decoder, other: Decoder) -> bool:
    """Equal up to what says the same in other words: None for the default, one spec for all layers or a tuple."""

    def plain(spec: Decoder) -> Decoder:
        blocks = tuple(
            replace(
                block,
                mixer=replace(
                    block.mixer,
                    kv_heads=block.mixer.kv_heads or block.mixer.heads,
                    head_dim=block.mixer.head_size(spec.dim),
                    output_bias=block.mixer.bias if block.mixer.output_bias is None else block.mixer.output_bias,
                    scale=block.mixer.scale or block.mixer.head_size(spec.dim) ** -0.5,
                ),
            )
            for block in spec.blocks
            if isinstance(block.mixer, Attention)
        )
        if len(blocks) != spec.depth:
            raise ValueError("not every mixer is attention")
        return replace(spec, block=blocks)

    return plain(one) == plain(other)


# --- rotary positions -------------------------------------------------------------------------------------------------


def _rope(config: Config, fraction: float = 1.0) -> RoPE:
    entry = dict(config.get("rope_parameters") or {}) or dict(config.get("rope_scaling") or {})
    base = float(entry.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10_000.0)
    trained = int(
        entry.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    fraction = float(entry.get("partial_rotary_factor") or config.get("partial_rotary_factor") or fraction)
    return RoPE(base=base, fraction=fraction, scaling=_scaling(entry, trained, int(config["max_position_embeddings"])))


def _scaling(entry: Config, trained: int, context: int) -> RoPEScaling | None:
    kind = entry.get("rope_type") or entry.get("type") or "default"
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(entry["factor"]))
        case "dynamic":
            return DynamicNTKScaling(factor=float(entry["factor"]), trained_length=trained)
        case "yarn":
            return YaRNScaling(
                factor=float(entry["factor"]),
                trained_length=trained,
                fast=float(entry.get("beta_fast") or 32.0),
                slow=float(entry.get("beta_slow") or 1.0),
            )
        case "llama3":
            return Llama3Scaling(
                factor=float(entry["factor"]),
                low=float(entry["low_freq_factor"]),
                high=float(entry["high_freq_factor"]),
                trained_length=trained,
            )
        case "longrope" | "su":
            return LongRoPEScaling(
                short=tuple(map(float, entry["short_factor"])),
                long=tuple(map(float, entry["long_factor"])),
                trained_length=trained,
                extended_length=context,
            )
    raise ValueError(unknown("rope_type", str(kind), ["default", "linear", "dynamic", "yarn", "llama3", "longrope"]))


def _rope_config(rope: object) -> dict[str, Any]:
    if not isinstance(rope, RoPE) or rope.layout != "half":
        raise ValueError("these families rotate half-split pairs")
    entry: dict[str, Any] = {"rope_type": "default"}
    match rope.scaling:
        case None:
            pass
        case LinearScaling(factor=factor):
            entry = {"rope_type": "linear", "factor": factor}
        case DynamicNTKScaling(factor=factor):
            # transformers takes the trained length of this one from max_position_embeddings
            entry = {"rope_type": "dynamic", "factor": factor}
        case YaRNScaling(factor=factor, trained_length=trained, fast=fast, slow=slow):
            entry = {
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained,
                "beta_fast": fast, "beta_slow": slow,
            }  # fmt: skip
        case Llama3Scaling(factor=factor, low=low, high=high, trained_length=trained):
            entry = {
                "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": trained,
                "low_freq_factor": low, "high_freq_factor": high,
            }  # fmt: skip
        case LongRoPEScaling(short=short, long=long, trained_length=trained):
            entry = {
                "rope_type": "longrope", "short_factor": list(short), "long_factor": list(long),
                "original_max_position_embeddings": trained,
            }  # fmt: skip
        case other:
            raise ValueError(f"config.json has no {type(other).__name__}")
    scaled = None if rope.scaling is None else dict(entry)
    entry |= {"rope_theta": rope.base}
    if rope.fraction != 1.0:
        entry |= {"partial_rotary_factor": rope.fraction}
    # transformers 5 reads rope_parameters, earlier releases and other engines the two older entries
    return {"rope_parameters": entry, "rope_theta": rope.base, "rope_scaling": scaled}


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
        position=_rope(config),
    )
    norm = RMSNorm(eps=float(config["rms_norm_eps"]))
    feedforward = GatedMLP(
        hidden=config["intermediate_size"],
        activation=_ACTIVATIONS[config.get("hidden_activation") or config.get("hidden_act") or "silu"],  # type: ignore[arg-type]
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
        **_rope_config(mixer.position),
    }


def _read_mistral(config: Config) -> Decoder:
    return _read_llama_like(config, window=config.get("sliding_window"), bias=False)


def _write_windowed(spec: Decoder) -> dict[str, Any]:
    mixer = spec.blocks[0].mixer
    assert isinstance(mixer, Attention)
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
    full = replace(base.block, arrangement="sandwich", mixer=mixer)
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


# --- GPT-2 and GPT-NeoX ----------------------------------------------------------------------------------------------


def _read_gpt2(config: Config) -> Decoder:
    for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if config.get(option):
            raise ValueError(f"GPT-2 with {option}=true is not read; published checkpoints have it off")
    dim, context = config["n_embd"], config["n_positions"]
    norm = LayerNorm(eps=float(config.get("layer_norm_epsilon", 1e-5)))
    activation: Any = _ACTIVATIONS[config.get("activation_function", "gelu_new")]
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


def _write_gpt2(spec: Decoder) -> dict[str, Any]:
    block = spec.blocks[0]
    if not (
        isinstance(block.mixer, Attention)
        and isinstance(block.feedforward, MLP)
        and isinstance(spec.norm, LayerNorm)
        and spec.position
    ):
        raise ValueError("GPT-2 has attention, an MLP, LayerNorm and learned positions")
    activation = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}[block.feedforward.activation]
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.dim,
        "n_layer": spec.depth,
        "n_head": block.mixer.heads,
        "n_inner": block.feedforward.hidden,
        "n_positions": spec.position.length,
        "activation_function": activation,
        "layer_norm_epsilon": spec.norm.eps,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.init_std,
    }


def _read_neox(config: Config) -> Decoder:
    norm = LayerNorm(eps=float(config.get("layer_norm_eps", 1e-5)))
    bias = bool(config.get("attention_bias", True))
    activation: Any = _ACTIVATIONS[config.get("hidden_act", "gelu")]
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
            arrangement="parallel" if config.get("use_parallel_residual", True) else "pre",
            mixer=Attention(
                heads=config["num_attention_heads"],
                bias=bias,
                position=_rope(config, fraction=float(config.get("rotary_pct", 0.25))),
            ),
            feedforward=MLP(hidden=config["intermediate_size"], activation=activation),
        ),
    )


def _write_neox(spec: Decoder) -> dict[str, Any]:
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
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}[
            block.feedforward.activation
        ],
        "layer_norm_eps": spec.norm.eps,
        "attention_bias": block.mixer.bias,
        "use_parallel_residual": block.arrangement == "parallel",
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.init_std,
        "rotary_pct": rope.fraction if isinstance(rope, RoPE) else None,
        "rotary_emb_base": rope.base if isinstance(rope, RoPE) else None,
        **_rope_config(rope),
    }


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _read_llama_like, _write_llama_like),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_windowed),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
    "gemma": Family("GemmaForCausalLM", _read_gemma, _write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
    "gpt2": Family("GPT2LMHeadModel", _read_gpt2, _write_gpt2),
    "gpt_neox": Family("GPTNeoXForCausalLM", _read_neox, _write_neox),
    "phi3": Family("Phi3ForCausalLM", _read_phi3, _write_phi3),
}
