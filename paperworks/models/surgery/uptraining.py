"""Fewer key-value heads for a trained model (Ainslie et al. 2023, arXiv:2305.13245): pool, then train on."""

from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.models.block import Block
from paperworks.models.decoder import Decoder, DecoderModel
from paperworks.models.surgery.rebuilding import rebuilt
from paperworks.nn import Attention

Pooling = Literal["mean", "first", "random"]


@torch.no_grad()
def pool_key_value_heads(model: DecoderModel, kv_heads: int, method: Pooling = "mean") -> DecoderModel:
    """A copy of `model` whose attention has `kv_heads` key-value heads; the model itself is left as it is.

    Each new head stands for a group of consecutive old ones, so that query heads keep reading what became of theirs.
    Weights are pooled, not activations, and biases likewise. Optimizer states of the old model do not fit the new one.

    Args:
        model: whose every mixer is attention with plain linears (merge adapters, load weights uncompressed).
        kv_heads: how many are left, a divisor of what each layer has; 1 is multi-query attention.
        method: "mean" of the heads of a group (Section 2.1); the ablations "first" head of it, and "random": drawn
            afresh as at initialization, from torch's global generator (Figure 4).

    Raises:
        ValueError: for an unknown method, a number that divides no layer's heads, or a mixer that is not attention.
        TypeError: when a key or value projection is not a plain linear.
    """
    if method not in get_args(Pooling):
        raise ValueError(unknown("method", str(method), get_args(Pooling)))
    spec = _with_kv_heads(model.spec, kv_heads)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, block in enumerate(model.spec.blocks):
        assert isinstance(block.mixer, Attention)
        heads = block.mixer.kv_heads or block.mixer.heads
        if heads == kv_heads:
            continue
        for name in ("key", "value"):
            path = f"blocks.{layer}.mixer.{name}"
            _require_plain(model.get_submodule(path), path)
            for kind in ("weight", "bias"):
                if f"{path}.{kind}" in state:
                    rows = state[f"{path}.{kind}"]
                    state[f"{path}.{kind}"] = _pooled(rows, heads, kv_heads, method, model.spec.init_std)
    return rebuilt(model, spec, state)


def _with_kv_heads(spec: Decoder, kv_heads: int) -> Decoder:
    blocks: list[Block] = []
    for layer, block in enumerate(spec.blocks):
        mixer = block.mixer
        if not isinstance(mixer, Attention):
            raise ValueError(
                f"block {layer} mixes with {type(mixer).__name__}, which has no key-value heads to pool; "
                "only models whose every mixer is Attention can be converted"
            )
        heads = mixer.kv_heads or mixer.heads
        possible = [count for count in range(1, heads + 1) if heads % count == 0]
        if kv_heads not in possible:
            raise ValueError(
                f"kv_heads must divide the {heads} key-value heads of block {layer}, got {kv_heads}; "
                f"possible: {possible}"
            )
        blocks.append(replace(block, mixer=replace(mixer, kv_heads=kv_heads)))
    return replace(spec, block=tuple(blocks) if isinstance(spec.block, tuple) else blocks[0])


def _require_plain(module: nn.Module, path: str) -> None:
    if type(module) is not nn.Linear:
        raise TypeError(
            f"{path} is a {type(module).__name__}; heads are pooled in plain linears: merge adapters first "
            "(adapt.merge), and load the weights uncompressed"
        )


def _pooled(
    rows: Float[Tensor, "rows ..."], heads: int, kv_heads: int, method: Pooling, std: float
) -> Float[Tensor, "pooled_rows ..."]:
    """Pool a projection's rows, ordered (head, channel); `rows` are those of its weight, or its bias."""
    groups = rows.unflatten(0, (kv_heads, heads // kv_heads, -1))
    if method == "mean":
        mean: Tensor = groups.mean(1).flatten(0, 1)
        return mean
    first: Tensor = groups[:, 0].flatten(0, 1).clone()
    if method != "first":
        if rows.dim() == 1:
            first.zero_()
        else:
            first.normal_(0.0, std)
    return first
