"""A model cut down to some of the hidden units of its feed-forward parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks.models.decoder import Decoder, DecoderModel
from paperworks.models.surgery.rebuilding import rebuilt
from paperworks.nn import MLP, GatedMLP

_ROWS = ("up.weight", "up.bias", "gate.weight", "gate.bias")  # of which each hidden unit has one


@torch.no_grad()
def keep_hidden_units(model: DecoderModel, kept: Mapping[str, Int[Tensor, " kept"]]) -> DecoderModel:
    """A smaller copy of `model` with these hidden units alone; the model itself is left as it is.

    Rows of `up` and `gate` and columns of `down` go, and the spec says so. What stands at the tap of the hidden units
    (a mask) goes too: the copy computes what the model does with all other units at zero.

    Args:
        model: with plain linear layers in its feed-forward parts (merge adapters, load weights uncompressed).
        kept: indices of units, by the path of the tap: "blocks.3.feedforward.hidden".

    Raises ValueError for a path that is no such tap, and for indices that are empty, twice there or out of range.
    """
    blocks, state = list(model.spec.blocks), {name: each.clone() for name, each in model.state_dict().items()}
    for path, units in kept.items():
        layer, prefix = _layer(model.spec, path), path.removesuffix(".hidden")
        feedforward = blocks[layer].feedforward
        assert isinstance(feedforward, MLP | GatedMLP)  # `_layer` has looked
        if (
            len(units) == 0
            or len(units.unique()) < len(units)
            or not 0 <= int(units.min()) <= int(units.max()) < feedforward.hidden
        ):
            raise ValueError(
                f"{path}: name one or more of the {feedforward.hidden} units, each once, got {units.tolist()}"
            )
        for name in [name for name in state if name.startswith(f"{path}.")]:
            del state[name]
        for rows in _ROWS:
            if f"{prefix}.{rows}" in state:
                state[f"{prefix}.{rows}"] = state[f"{prefix}.{rows}"][units]
        state[f"{prefix}.down.weight"] = state[f"{prefix}.down.weight"][:, units].contiguous()
        blocks[layer] = replace(blocks[layer], feedforward=replace(feedforward, hidden=len(units)))
    same = len(set(blocks)) == 1 and not isinstance(model.spec.block, tuple)
    return rebuilt(model, replace(model.spec, block=blocks[0] if same else tuple(blocks)), state)


def _layer(spec: Decoder, path: str) -> int:
    possible = {
        f"blocks.{layer}.feedforward.hidden": layer
        for layer, block in enumerate(spec.blocks)
        if isinstance(block.feedforward, MLP | GatedMLP)
    }
    if path not in possible:
        raise ValueError(f"{path} is no tap of hidden units; those of this model are {', '.join(possible) or 'none'}")
    return possible[path]
