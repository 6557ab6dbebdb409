"""Linear-like modules: what adapters wrap and weight formats replace, ours or another library's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Kind = Literal["linear", "patches", "lookup", "stacked"]


@dataclass(frozen=True, kw_only=True)
class LinearForm:
    """How a class of layers that is linear under another name is read as y = x W^T + bias (see `register_linear`)."""

    kind: Kind
    transposed: bool
    weight: Callable[[Tensor], Tensor]
    accepts: Callable[[Any], bool]


_FORMS: dict[str, LinearForm] = {}


def register_linear(
    class_name: str,
    *,
    kind: Kind = "linear",
    transposed: bool = False,
    weight: Callable[[Tensor], Tensor] | None = None,
    accepts: Callable[[Any], bool] = lambda module: True,
) -> None:
    """Teach a class of layers that is linear under another name; by name, so that its library need not be loaded.

    Args:
        class_name: `type(module).__name__`.
        kind: what the layer is called with and what stands in `weight`:
            "linear": vectors (..., in) give (..., out). Every transformation takes it.
            "patches": images (batch, channels, height, width), each patch of which is multiplied by the weight.
            "lookup": indices; the weight is multiplied by their one-hot vectors.
            "stacked": the module holds parameters of three dimensions, a matrix for each expert, under any names.
          The last three carry adapters where they are named, and no named set of targets includes them.
        transposed: whether the parameter is stored as (in, out), or (experts, in, out).
        weight: from the parameter to a view of it as (out, in), or (experts, out, in); None: by `transposed`.
        accepts: whether this instance is of that form.

    Raises:
        ValueError: for a class that is known already.
    """
    if class_name in _FORMS:
        raise ValueError(f"layers called {class_name} are known already, as {_FORMS[class_name].kind}")
    view = weight or ((lambda parameter: parameter.mT) if transposed else (lambda parameter: parameter))
    _FORMS[class_name] = LinearForm(kind=kind, transposed=transposed, weight=view, accepts=accepts)


def _whole_patches(module: Any) -> bool:
    return (
        tuple(module.kernel_size) == tuple(module.stride)
        and not any(module.padding if isinstance(module.padding, tuple) else [module.padding != "valid"])
        and tuple(module.dilation) == (1, 1)
        and module.groups == 1
    )


# transformers.pytorch_utils.Conv1D computes x @ weight + bias.
register_linear("Conv1D", transposed=True, accepts=lambda module: not hasattr(module, "in_features"))
register_linear("Conv2d", kind="patches", weight=lambda parameter: parameter.flatten(1), accepts=_whole_patches)
register_linear("Embedding", kind="lookup", transposed=True, accepts=lambda module: module.max_norm is None)
register_linear("GptOssExperts", kind="stacked", transposed=True)
register_linear("Llama4TextExperts", kind="stacked", transposed=True)


def form_of(module: nn.Module) -> LinearForm | None:
    """The registered form of a layer that is linear under another name; None for others."""
    form = _FORMS.get(type(module).__name__)
    return form if form is not None and form.accepts(module) else None


def residual_output(linear: nn.Linear) -> nn.Linear:
    """Mark a linear that writes to the residual stream, so that its initialization is scaled with depth."""
    linear.writes_residual = True  # type: ignore[assignment]
    return linear


def undecayed(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that weight decay must leave alone, though it has the shape of a matrix."""
    parameter.undecayed = True  # type: ignore[attr-defined]
    return parameter


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is linear and stores its weight as (in, out)."""
    form = form_of(module)
    return form is not None and form.kind == "linear" and form.transposed


def linear_kind(module: nn.Module) -> Kind | None:
    """What the module is called with where it multiplies by a weight (see `register_linear`); else None."""
    form = form_of(module)
    if form is not None:
        weight = getattr(module, "weight", None)
        return form.kind if form.kind != "stacked" and isinstance(weight, Tensor) else None
    sized = isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )
    held = sized and (hasattr(module, "decoded_weight") or isinstance(getattr(module, "weight", None), Tensor))
    return getattr(module, "linear_kind", "linear") if held else None


def is_linear_like(module: nn.Module) -> bool:
    """Whether the module maps vectors of in_features to vectors of out_features linearly (plus a bias)."""
    return linear_kind(module) == "linear"


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a module that has a `linear_kind`."""
    form, weight = form_of(module), getattr(module, "weight", None)
    if form is not None and isinstance(weight, Tensor):
        rows, columns = form.weight(weight).shape
        return columns, rows
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> Float[Tensor, "out_features in_features"]:
    """The weight a linear-like module multiplies by, decoded if it is stored in a weight format.

    A plain linear gives its parameter (or a view of it); a compressed one gives a fresh dense tensor.
    """
    decoded: Any = getattr(module, "decoded_weight", None)
    if callable(decoded):
        out: Tensor = decoded()
        return out
    if linear_kind(module) is None:
        raise TypeError(f"{type(module).__name__} is not linear-like: it needs in_features, out_features and a weight")
    weight, form = module.weight, form_of(module)
    assert isinstance(weight, Tensor)
    return weight if form is None else form.weight(weight)


def stacked_weight(module: nn.Module, name: str) -> Float[Tensor, "experts out_features in_features"]:
    """A view of a module's three-dimensional parameter as one matrix an expert.

    Raises `ValueError` for a parameter of another shape. Classes that are not registered, and say nothing of themselves
    by `is_transposed` as transformers' do, store (experts, out, in).
    """
    parameter = getattr(module, name)
    if not isinstance(parameter, Tensor) or parameter.dim() != 3 or not parameter.is_floating_point():
        raise ValueError(f"{name} of {type(module).__name__} is no stack of matrices (experts, out, in)")
    form = form_of(module)
    transposed = form.transposed if form is not None else bool(getattr(module, "is_transposed", False))
    if form is not None and form.kind == "stacked":
        return form.weight(parameter)
    return parameter.mT if transposed else parameter


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear-like module, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


@torch.no_grad()
def write_weight(module: nn.Module, weight: Float[Tensor, "out_features in_features"]) -> None:
    """Store a new weight in a linear-like module, encoding it if the module keeps a weight format."""
    encode: Any = getattr(module, "encode_weight", None)
    if callable(encode):
        encode(weight)
    else:
        held = weight_of(module)
        held.copy_(weight.to(held.dtype))


class LazyWeight(torch.Tensor):
    """A weight that is computed when something is done with it: its shape, dtype and device cost nothing.

    Wrappers give it as their `.weight`, because owners often ask only for `.weight.dtype`. It has torch's
    `__torch_function__`, so that fused paths that would go around a wrapper's `forward` are not taken.
    """

    _compute: Callable[[], Tensor]

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        compute: Callable[[], Tensor],
        requires_grad: bool = False,
    ) -> "LazyWeight":
        """A tensor that `compute` gives when it is needed, with gradients where it has them."""
        placeholder = torch.empty((), dtype=dtype, device=device).expand(shape)  # no memory
        lazy: LazyWeight = torch.Tensor._make_subclass(cls, placeholder, requires_grad)
        lazy._compute = compute
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FREE:
                return func(*args, **kwargs)
            return func(*map(_computed, args), **{key: _computed(value) for key, value in kwargs.items()})


def _computed(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value._compute()
    return type(value)(map(_computed, value)) if type(value) in (list, tuple) else value


_FREE = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "requires_grad", "layout", "is_cuda", "is_meta", "is_leaf")
    ),
    *(
        getattr(torch.Tensor, name)
        for name in ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "__len__")
    ),
}
