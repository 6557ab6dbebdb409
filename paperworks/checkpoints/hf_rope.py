"""Hugging Face's entries for rotary positions against ours, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paperworks.core.errors import unknown
from paperworks.nn import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RoPE,
    RoPEScaling,
    YaRNScaling,
)

Config = Mapping[str, Any]


def rope_from_config(config: Config, fraction: float = 1.0) -> RoPE:
    """Return the rotary positions that a config describes; raises ValueError for a scaling that is not known."""
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


def rope_config(rope: object) -> dict[str, Any]:
    """Return the entries of a config for these positions; raises ValueError where it has no words for them."""
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
