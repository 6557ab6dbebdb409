"""Adding adapters to the weights they adapt, in whatever format those are stored, and measuring what that loses."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.adapt.apply import drop, in_use, some
from paperworks.adapt.delta import AdaptedLinear
from paperworks.nn.linear import weight_of, write_weight


@torch.no_grad()
def merge(model: nn.Module, *, lossy: bool = False) -> nn.Module:
    """Add the deltas in use, times their weights, to the base's weight in its own format, and drop them; in place.

    Adapters that are not in use stay as they are. A format that rounds (NF4, int8, bfloat16 ...) rounds the sum again;
    where that error is larger than the adapter itself, merging would erase the adapter and is refused.

    Args:
        model: a model with adapters in use.
        lossy: merge all the same.

    Raises:
        ValueError: when no adapter is in use, when a format would round an adapter away, or when a weight is tied to
            another layer's; the message names the layers, and nothing has been changed.
    """
    fold(model, lossy=lossy)
    drop(model, some(model), list(in_use(model)))
    return model


@torch.no_grad()
def fold(model: nn.Module, *, lossy: bool = False) -> None:
    """Add the deltas in use to the base as `merge` does, but keep them on."""
    layers = {path: layer for path, layer in some(model).items() if layer.in_use}
    if not layers:
        raise ValueError("no adapter is in use; choose what to merge with adapt.use(model, name)")
    tied = _tied(model, layers)
    if tied:
        raise ValueError("merging would change another layer too: " + "; ".join(tied))
    errors = {path: _error(layer) for path, layer in layers.items()}  # on copies: what fails, fails before any change
    lost = {path: (error, size) for path, (error, size) in errors.items() if not error <= size}  # NaN is lost, too
    if lost and not lossy:
        listing = "\n  ".join(
            f"{path}: rounding error {error:.4g}, adapter {size:.4g}" for path, (error, size) in lost.items()
        )
        raise ValueError(
            f"the base's format rounds the adapter away on {len(lost)} of {len(layers)} layers (Frobenius norms):\n"
            f"  {listing}\nDecode the base to plain weights first (compress.decompress), or pass lossy=True"
        )
    for layer in layers.values():
        wanted, size = _wanted(layer)
        if size > 0:  # an adapter that adds nothing must not make the format round once more
            write_weight(layer.base, wanted.to(weight_of(layer.base).dtype))


@torch.no_grad()
def merge_error(model: nn.Module) -> dict[str, float]:
    """Measure what `merge` would lose, by path: ||stored after merging - wanted|| / ||change||; nothing is changed.

    0 is exact; above 1 the format's rounding is larger than the adapter, and `merge` refuses.
    """
    errors = {path: _error(layer) for path, layer in some(model).items() if layer.in_use}
    return {path: error / size if size else 0.0 for path, (error, size) in errors.items()}


def _wanted(layer: AdaptedLinear) -> tuple[Float[Tensor, "out_features in_features"], float]:
    """Return the weight after an exact merge, and the norm of the change."""
    weight, change = weight_of(layer.base), layer.change()
    assert change is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = change.to(weight.device, wide)
    return weight.to(wide) + change, change.norm().item()


def _error(layer: AdaptedLinear) -> tuple[float, float]:
    """Return the norm of what storing the merged weight loses, and the norm of the change; on a copy of the base."""
    wanted, size = _wanted(layer)
    if size == 0:
        return 0.0, 0.0
    trial = copy.deepcopy(layer.base)
    write_weight(trial, wanted.to(weight_of(trial).dtype))
    return (weight_of(trial).to(wanted.dtype) - wanted).norm().item(), size


def _tied(model: nn.Module, layers: dict[str, AdaptedLinear]) -> list[str]:
    """Say which layers to be merged hold a weight that another module holds as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return [
        f"{path} shares its weight with {', '.join(set(owners[id(weight)]) - {f'{path}.base.{name}'})}"
        for path, layer in layers.items()
        for name, weight in layer.base.named_parameters()
        if len(owners[id(weight)]) > 1
    ]
