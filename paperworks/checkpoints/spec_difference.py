"""Where two specs describe different models, and what kinds of parts a spec is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from paperworks.models import Seq2Seq, Stack
from paperworks.nn import Attention, Mamba, Mixer, RWKVChannelMix


def differences(spec: Any, back: Any) -> list[str]:
    """Fields in which the model of `back` is another than that of `spec`, one line each, equal layers once."""
    if isinstance(spec, Stack | Seq2Seq) and type(spec) is type(back):
        spec, back = _plain(spec), _plain(back)
    return list(dict.fromkeys(_walk("", spec, back)))


def kinds(spec: Any) -> frozenset[tuple[str, str]]:
    """The parts of a spec: (path, name of the class), layers taken together."""
    return frozenset(_kinds("", spec))


def _kinds(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, tuple):
        for item in dict.fromkeys(value):
            yield from _kinds(path, item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield path, type(value).__name__
        for field in fields(value):
            yield from _kinds(f"{path}.{field.name}", getattr(value, field.name))


def _plain(spec: Any) -> Any:
    """The spec with what may be said in two ways said in one: None for a default, one spec for all layers."""
    if isinstance(spec, Seq2Seq):
        return replace(spec, encoder=_plain(spec.encoder), decoder=_plain(spec.decoder))
    blocks = {block: replace(block, mixer=_mixer(block.mixer, spec.dim)) for block in spec.distinct_blocks}
    return replace(spec, block=tuple(blocks[block] for block in spec.blocks))


def _mixer(mixer: Mixer, dim: int) -> Mixer:
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


def _walk(path: str, one: Any, other: Any) -> Iterator[str]:
    if one == other:
        return
    name = path.strip(".") or "the model"
    if type(one) is not type(other):
        yield f"{name}: {_short(one)} would be read back as {_short(other)}"
    elif isinstance(one, tuple) and len(one) == len(other):
        # layers that differ alike are said once: their paths carry no number
        for mine, theirs in dict.fromkeys(zip(one, other, strict=True)):
            yield from _walk(path, mine, theirs)
    elif is_dataclass(one):
        for field in fields(one):
            yield from _walk(f"{path}.{field.name}", getattr(one, field.name), getattr(other, field.name))
    else:
        yield f"{name}: {_short(one)} would be read back as {_short(other)}"


def _short(value: object) -> str:
    text = type(value).__name__ if is_dataclass(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
