"""Windows in some layers: the entry `layer_types`, both ways."""

from __future__ import annotations

from dataclasses import replace

from paperworks.checkpoints.family import expect
from paperworks.models import Decoder
from paperworks.nn import Attention


def windowed(base: Decoder, types: list[str], window: int | None) -> Decoder:
    """The decoder with a window in the layers whose type is "sliding_attention"; one block where all are equal."""
    wrong = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
    if wrong or len(types) != base.depth:
        raise ValueError(
            f"layer_types should hold {base.depth} of 'full_attention' and 'sliding_attention', got "
            f"{len(types)} entries{f' with {wrong[0]!r}' if wrong else ''}"
        )
    full = base.blocks[0]
    mixer = full.mixer
    assert isinstance(mixer, Attention)
    local = replace(full, mixer=replace(mixer, window=window))
    if window is None or set(types) == {"full_attention"}:
        return base
    return replace(base, block=tuple(local if kind == "sliding_attention" else full for kind in types))


def layer_types(spec: Decoder) -> tuple[list[str], int | None]:
    """The type of each layer, and the first window; `Inexpressible` where a layer has no attention."""
    mixers = [expect(block.mixer, Attention, "the mixer") for block in expect(spec, Decoder, "the model").blocks]
    types = ["full_attention" if mixer.window is None else "sliding_attention" for mixer in mixers]
    return types, next((mixer.window for mixer in mixers if mixer.window is not None), None)
