"""Adapters on stacked experts: modules that hold a matrix for each expert in one three-dimensional parameter."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from paperworks.adapt.contract import Adapter, Delta
from paperworks.adapt.delta import AdaptedLinear
from paperworks.adapt.layer_info import LayerInfo
from paperworks.core.linear import linear_kind, stacked_weight


class StackedParameter(AdaptedLinear):
    """One adapted parameter (experts, out, in); its weight in effect is put in the parameter's place by the stack."""


class Matrices(nn.Module):
    """A parameter of another module, looked at as a stack of matrices; holds nothing of its own."""

    linear_kind = "stacked"

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        super().__init__()
        self.parameter = parameter
        self.owner = (owner,)  # in a tuple, so that the owner is not registered below its own adapters
        _, self.out_features, self.in_features = stacked_weight(owner, parameter).shape

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored."""
        held = getattr(self.owner[0], self.parameter)
        assert isinstance(held, Tensor)
        return held

    def decoded_weight(self) -> Tensor:
        """The parameter as (experts, out, in), a view."""
        return stacked_weight(self.owner[0], self.parameter)

    @torch.no_grad()
    def encode_weight(self, weight: Tensor) -> None:
        """Write the parameter."""
        held = self.decoded_weight()
        held.copy_(weight.to(held.dtype))


class AdaptedStack(nn.Module):
    """A module whose stacked parameters are adapted: it runs with the weights in effect in their place."""

    PLACE = "stacks"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.stacks = nn.ModuleDict()

    def add(
        self, parameter: str, name: str, delta: Delta, adapter: Adapter, dtype: torch.dtype | None
    ) -> StackedParameter:
        """Hold one more delta on one of the parameters, and give that back."""
        delta.to(getattr(self.base, parameter).device, dtype).train(self.training)
        if parameter not in self.stacks:
            self.stacks[parameter] = StackedParameter(Matrices(self.base, parameter), delta, adapter, name)
            return self.stacks[parameter]  # type: ignore[return-value]
        held = self.stacks[parameter]
        assert isinstance(held, StackedParameter)
        held.add(name, delta, adapter)
        return held

    def drop_empty(self) -> bool:
        """Forget parameters without adapters; whether none is left."""
        for parameter in [key for key, held in self.stacks.items() if not held.deltas]:
            del self.stacks[parameter]
        return not self.stacks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with the weights in effect."""
        weights: dict[str, Tensor] = {}
        for parameter, held in self.stacks.items():
            assert isinstance(held, StackedParameter)
            change = held.weight_change()
            if change is not None:
                base = held.base.weight
                assert isinstance(base, Tensor)
                assert isinstance(held.base, Matrices)
                transposed = held.base.decoded_weight().stride() != base.stride()
                weights[parameter] = base + (change.mT if transposed else change).to(base.dtype)
        return functional_call(self.base, weights, args, kwargs) if weights else self.base(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}) or name.startswith("__"):
                raise
            return getattr(self.base, name)


def stacked_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The three-dimensional parameters of modules that are no layers themselves, by path: their owner and name."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        base: Any = module.base if isinstance(module, AdaptedStack) else module
        if linear_kind(base) is not None or path.endswith(".base"):
            continue
        for name, parameter in base.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.is_floating_point() and "conv" not in type(base).__name__.lower():
                found[f"{path}.{name}".removeprefix(".")] = (base, name)
    return found


def stack_info(owner: nn.Module, name: str, path: str) -> LayerInfo:
    """The description of a stacked parameter."""
    experts, outputs, inputs = stacked_weight(owner, name).shape
    parameter: Any = getattr(owner, name)
    return LayerInfo(
        path=path,
        in_features=inputs,
        out_features=outputs,
        dtype=parameter.dtype,
        device=parameter.device,
        kind="stacked",
        experts=experts,
        source=Matrices(owner, name),
    )
