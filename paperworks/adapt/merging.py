"""Adding adapters to the weights they adapt, in whatever format those are stored, and measuring what that loses."""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.adapt.apply import adapted, drop, in_use, require_adapted, trained_whole
from paperworks.adapt.delta import AdaptedLinear
from paperworks.core.linear import bias_of, weight_of, write_weight
from paperworks.core.selection import Targets, matching, patterns_of


@torch.no_grad()
def merge(model: nn.Module, *, lossy: bool = False, untie: Targets = ()) -> nn.Module:
    """Add the deltas in use, times their weights, to the base's weight in its own format, and drop them; in place.

    Adapters that are not in use stay as they are; modules trained whole take the place of those they are copies of. A
    format that rounds (NF4, int8, bfloat16 ...) rounds the sum again;
    where that error is larger than the adapter itself, merging would erase the adapter and is refused.

    Args:
        model: a model with adapters in use.
        lossy: merge all the same.
        untie: patterns of layers that get a weight of their own where it is tied to another layer's (an unembedding
            that is the embedding); without, such a layer is not merged into.

    Raises:
        ValueError: when no adapter is in use, when a format would round an adapter away, or when a weight is tied
            to another layer's; the message names the layers, and nothing has been changed.
    """
    for path, module in trained_whole(model).items():
        module.require_mergeable(path)
    fold(model, lossy=lossy, untie=untie)
    drop(model, list(in_use(model)), merged=True)
    return model


@torch.no_grad()
def fold(model: nn.Module, *, lossy: bool = False, untie: Targets = ()) -> None:
    """Add the deltas in use to the base as `merge` does, but keep them on."""
    require_adapted(model)
    layers = {path: layer for path, layer in adapted(model).items() if layer.in_use}
    if not layers and not any(module.in_use for module in trained_whole(model).values()):
        raise ValueError("no adapter is in use; choose what to merge with adapt.use(model, name)")
    apart = {path for pattern in patterns_of(untie) for path in matching(pattern, layers)}
    tied = {path: text for path, text in _tied(model, layers).items() if path not in apart}
    if tied:
        raise ValueError(
            "merging would change another layer too: " + "; ".join(tied.values()) + f"; untie={list(tied)} gives the "
            "adapted layer a weight of its own"
        )
    trials = {path: _try(layer) for path, layer in layers.items()}  # on copies: what fails, fails before any change
    lost = {path: trial for path, trial in trials.items() if not trial.error <= trial.size}  # NaN is lost, too
    if lost and not lossy:
        listing = "\n  ".join(
            f"{path}: rounding error {trial.error:.4g}, adapter {trial.size:.4g}" for path, trial in lost.items()
        )
        raise ValueError(
            f"the base's format rounds the adapter away on {len(lost)} of {len(layers)} layers (Frobenius norms):\n"
            f"  {listing}\nDecode the base to plain weights first (compress.decompress), or pass lossy=True"
        )
    for path, layer in layers.items():
        if path in apart:
            layer.base.weight = nn.Parameter(layer.base.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        change = layer.bias_change()
        if trials[path].stored:
            for name, tensor in trials[path].stored.items():
                setattr(layer.base, name, tensor)
        elif trials[path].size:  # an adapter that adds nothing must not make the format round once more
            write_weight(layer.base, _wanted(layer)[0].to(weight_of(layer.base).dtype))
        if change is not None:
            held = bias_of(layer.base)
            assert held is not None
            held.add_(change.to(held))


@torch.no_grad()
def merge_error(model: nn.Module) -> dict[str, float]:
    """Measure what `merge` would lose, by path: ||stored after merging - wanted|| / ||change||; nothing is changed.

    0 is exact; above 1 the format's rounding is larger than the adapter, and `merge` refuses.
    """
    trials = {path: _try(layer) for path, layer in adapted(model).items() if layer.in_use}
    return {path: trial.error / trial.size if trial.size else 0.0 for path, trial in trials.items()}


class _Trial(NamedTuple):
    """Norms of what storing the merged weight loses and of the change; and what a format stored, to be kept.

    A plain layer's copy is as large as the layer, and written again in no time: it is not kept.
    """

    error: float
    size: float
    stored: dict[str, Tensor]


def _wanted(layer: AdaptedLinear) -> tuple[Float[Tensor, "out_features in_features"], float]:
    """The weight after an exact merge, and the norm of the change."""
    weight, change = weight_of(layer.base), layer.weight_change(keep=True)
    if change is None:
        return weight, 0.0
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = change.to(weight.device, wide)
    taken = layer.removed(tuple(layer.in_use))  # comes back with the merge and is no change of the original weight
    size = change if taken is None else change - taken.to(change)
    return weight.to(wide) + change, size.norm().item()


def _try(layer: AdaptedLinear) -> _Trial:
    """Merge on a copy of the base."""
    wanted, size = _wanted(layer)
    if size == 0 and layer.removed() is None:
        return _Trial(0.0, 0.0, {})
    copied = copy.deepcopy(layer.base)
    write_weight(copied, wanted.to(weight_of(copied).dtype))
    error = (weight_of(copied).to(wanted.dtype) - wanted).norm().item()
    return _Trial(error, size, dict(copied.named_buffers()) if hasattr(copied, "encode_weight") else {})


def _tied(model: nn.Module, layers: dict[str, AdaptedLinear]) -> dict[str, str]:
    """Layers to be merged that hold a weight which another module holds as well, and what to say of it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {
        path: f"{path} shares its weight with {', '.join(set(owners[id(weight)]) - {f'{path}.base.{name}'})}"
        for path, layer in layers.items()
        for name, weight in layer.base.named_parameters()
        if len(owners[id(weight)]) > 1
    }
