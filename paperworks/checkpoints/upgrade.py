"""Specs as earlier versions wrote them, in today's words."""

from __future__ import annotations

from typing import Any

_ARRANGEMENTS = {
    "pre": "PreNorm",
    "post": "PostNorm",
    "sandwich": "Sandwich",
    "parallel": "Parallel",
    "plain": "NoResidual",
}


def from_format_1(spec: Any) -> Any:
    """The JSON of a spec of format 1 in format 2, where arrangements and rules of initialization are specs, not words.

    What is not understood is left as it is: reading it says what is wrong.
    """
    if isinstance(spec, list):
        return [from_format_1(item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    new = {name: from_format_1(value) for name, value in spec.items()}
    word = new.get("arrangement")
    if new.get("type") == "Block" and isinstance(word, str) and word in _ARRANGEMENTS:
        new["arrangement"] = {"type": _ARRANGEMENTS[word]}
        if new.pop("shared_norm", False):
            new["arrangement"]["shared_norm"] = True
    if new.get("init") == "normal":
        del new["init"]
    elif new.get("init") == "fan_in":
        new["init"] = {"type": "T5Initialization"}
    return new
