"""Linear-like modules: what adapters wrap and weight formats replace, ours or another library's."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Layers that are linear under another name, by class name: whether the weight is stored (in, out).
# transformers.pytorch_utils.Conv1D computes x @ weight + bias; its sizes are nx (in) and nf (out).
_TRANSPOSED_LINEARS = {"Conv1D": ("nx", "nf")}


def residual_output(linear: nn.Linear) -> nn.Linear:
    """Mark a linear that writes to the residual stream, so that its initialization is scaled with depth."""
    linear.writes_residual = True  # type: ignore[assignment]
    return linear


def undecayed(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that weight decay must leave alone, though it has the shape of a matrix."""
    parameter.undecayed = True  # type: ignore[attr-defined]
    return parameter


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module stores its weight as (in, out)."""
    return type(module).__name__ in _TRANSPOSED_LINEARS and not hasattr(module, "in_features")


def is_linear_like(module: nn.Module) -> bool:
    """Return whether the module maps in_features to out_features linearly (plus a bias)."""
    if is_transposed(module):
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and weight.dim() == 2
    return (
        isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and (hasattr(module, "decoded_weight") or isinstance(getattr(module, "weight", None), Tensor))
    )


def features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear-like module."""
    weight = getattr(module, "weight", None)
    if is_transposed(module) and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> Float[Tensor, "out_features in_features"]:
    """Return the weight a linear-like module multiplies by, decoded if it is stored in a weight format.

    A plain linear gives its parameter (or a view of it); a compressed one gives a fresh dense tensor.
    """
    decoded: Any = getattr(module, "decoded_weight", None)
    if callable(decoded):
        return decoded()
    if not is_linear_like(module):
        raise TypeError(f"{type(module).__name__} is not linear-like: it needs in_features, out_features and a weight")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a linear-like module, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


@torch.no_grad()
def write_weight(module: nn.Module, weight: Float[Tensor, "out_features in_features"]) -> None:
    """Store a new weight in a linear-like module, encoding it if the module keeps a weight format."""
    encode: Any = getattr(module, "encode_weight", None)
    if callable(encode):
        encode(weight)
    else:
        weight_of(module).copy_(weight)
