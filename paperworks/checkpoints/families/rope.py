"""Hugging Face's entries for rotary positions against ours, both ways."""

from __future__ import annotations

import math
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

# The entries that these functions honour. transformers 5 writes rope_parameters, earlier releases the others.
ENTRIES: Mapping[str, Any] = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "original_max_position_embeddings": None,
}

_GENERAL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# What each kind of scaling honours besides; transformers' dynamic takes the trained length from another entry.
_OWN = {
    "default": {"original_max_position_embeddings", "factor"},
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate", "finetuned",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"},
}  # fmt: skip


def rope_from_config(config: Config, base: float = 10_000.0, fraction: float = 1.0, partial: bool = False) -> RoPE:
    """The rotary positions that a config describes.

    Args:
        config: with the entries of `ENTRIES` and max_position_embeddings.
        base: where the config says none, the family's.
        fraction: where the config says none, the family's share of a head that is rotated.
        partial: whether the family rotates a part of a head at all: transformers ignores the entry in those that don't.

    Raises:
        ValueError: for a scaling, or an entry of one, that is not known or not computed here.
    """
    entry = dict(config.get("rope_parameters") or {}) or dict(config.get("rope_scaling") or {})
    kind = str(entry.get("rope_type") or entry.get("type") or "default")
    kind = "longrope" if kind == "su" else kind
    if kind not in _OWN:
        raise ValueError(unknown("rope_type", kind, _OWN))
    extra = sorted(name for name in entry if name not in _GENERAL | _OWN[kind] and entry[name] is not None)
    if extra:
        raise ValueError(
            f"rotary positions of rope_type {kind!r} with {extra[0]}={entry[extra[0]]!r} are not read; known entries: "
            f"{', '.join(sorted(_GENERAL | _OWN[kind]))}"
        )
    base = float(entry.get("rope_theta") or config.get("rope_theta") or base)
    said = entry.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    rotated = fraction if said is None else float(said)
    if not partial and rotated != 1.0:
        raise ValueError(
            f"partial_rotary_factor={rotated} is not read in this family, whose models rotate the whole head"
        )
    context = int(config["max_position_embeddings"])
    # Phi-3 keeps it outside of the entry, and that one counts first
    trained = config.get("original_max_position_embeddings") or entry.get("original_max_position_embeddings") or context
    return RoPE(base=base, fraction=rotated, scaling=_scaling(kind, entry, int(trained), context))


def _scaling(kind: str, entry: Config, trained: int, context: int) -> RoPEScaling | None:
    match kind:
        case "linear":
            return LinearScaling(factor=float(entry["factor"]))
        case "dynamic":
            return DynamicNTKScaling(factor=float(entry["factor"]), trained_length=context)
        case "yarn":
            return _yarn(entry, trained, context)
        case "llama3":
            return Llama3Scaling(
                factor=float(entry["factor"]),
                low=float(entry["low_freq_factor"]),
                high=float(entry["high_freq_factor"]),
                trained_length=trained,
            )
        case "longrope":
            said = entry.get("factor")
            scaling = LongRoPEScaling(
                short=tuple(map(float, entry["short_factor"])),
                long=tuple(map(float, entry["long_factor"])),
                trained_length=trained,
                extended_length=context if said is None else round(float(said) * trained),
            )
            _require_amplitude(scaling, entry.get("attention_factor"), "attention_factor")
            return scaling
    return None


def _yarn(entry: Config, trained: int, context: int) -> YaRNScaling:
    factor = entry["factor"] if "factor" in entry else context / trained
    scaling = YaRNScaling(
        factor=float(context / trained if factor is None else factor),
        trained_length=trained,
        fast=float(entry.get("beta_fast") or 32.0),
        slow=float(entry.get("beta_slow") or 1.0),
    )
    if entry.get("truncate") not in (None, True):
        raise ValueError(f"yarn with truncate={entry['truncate']!r} is not read; published models have it on")
    if entry.get("attention_factor") is not None:
        _require_amplitude(scaling, entry["attention_factor"], "attention_factor")
    elif entry.get("mscale") and entry.get("mscale_all_dim"):
        logarithm = 0.1 * math.log(scaling.factor) if scaling.factor > 1 else 0.0
        said = (float(entry["mscale"]) * logarithm + 1) / (float(entry["mscale_all_dim"]) * logarithm + 1)
        _require_amplitude(scaling, said, "the ratio of mscale and mscale_all_dim")
    return scaling


def _require_amplitude(scaling: RoPEScaling, said: Any, name: str) -> None:
    if said is not None and not math.isclose(float(said), scaling.amplitude(), rel_tol=1e-6):
        raise ValueError(
            f"rotary positions with {name}={float(said):.6g} are not read: {type(scaling).__name__} multiplies cosines "
            f"and sines by {scaling.amplitude():.6g}"
        )


def rope_config(rope: object, context: int | None, partial: bool = False) -> dict[str, Any]:
    """The entries of a config for these positions. Raises `ValueError` where it has no words for them."""
    if not isinstance(rope, RoPE) or rope.layout != "half":
        raise ValueError(
            f"the positions are {rope if rope is None else type(rope).__name__}; this family has RoPE(layout='half')"
        )
    if rope.fraction != 1.0 and not partial:
        raise ValueError(f"this family rotates whole heads, the model a share of {rope.fraction}")
    entry: dict[str, Any] = {"rope_type": "default"}
    trained: int | None = None
    match rope.scaling:
        case None:
            pass
        case LinearScaling(factor=factor):
            entry = {"rope_type": "linear", "factor": factor}
        case DynamicNTKScaling(factor=factor):
            # transformers takes the trained length of this one from max_position_embeddings
            entry = {"rope_type": "dynamic", "factor": factor}
        case YaRNScaling(factor=factor, trained_length=trained, fast=fast, slow=slow):
            entry = {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow}
        case Llama3Scaling(factor=factor, low=low, high=high, trained_length=trained):
            entry = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        case LongRoPEScaling(short=short, long=long, trained_length=trained, extended_length=extended):
            entry = {"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long)}
            if extended != context:
                entry["factor"] = extended / trained
        case other:
            raise ValueError(f"config.json has no {type(other).__name__}")
    if trained is not None:
        entry["original_max_position_embeddings"] = trained
    scaled = None if rope.scaling is None else dict(entry)
    entry |= {"rope_theta": rope.base}
    if partial:
        entry |= {"partial_rotary_factor": rope.fraction}
    # transformers 5 reads rope_parameters, earlier releases and other engines the two older entries
    found = {"rope_parameters": entry, "rope_theta": rope.base, "rope_scaling": scaled}
    return found | ({"partial_rotary_factor": rope.fraction} if partial else {})
