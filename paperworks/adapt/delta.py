"""The contract of an adapter: a trainable change on top of a frozen linear layer, whatever that layer is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core.linear import bias_of, features, weight_of
from paperworks.core.spec import Spec


class Delta(nn.Module):
    """The trainable part of an adapter on one layer. All its tensors are parameters or persistent buffers."""

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Return what is added to the base layer's output."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it adds")

    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return the change of the weight that this delta amounts to."""
        raise NotImplementedError(f"{type(self).__name__} does not say its weight")


@dataclass(frozen=True, kw_only=True)
class Adapter(Spec):
    """A method of parameter-efficient adaptation: makes a `Delta` for each chosen layer."""

    def build(self, in_features: int, out_features: int) -> Delta:
        """Return a fresh delta, which adds nothing yet. Raises `ValueError` if the layer is too small for it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def build_all(self, layers: Mapping[str, tuple[int, int]]) -> dict[str, Delta]:
        """Return a fresh delta for each layer, given its (in_features, out_features) by path.

        Methods whose layers share parameters override this; the default builds each layer for itself.

        Raises:
            ValueError: that lists every layer the adapter does not fit.
        """
        deltas: dict[str, Delta] = {}
        problems = []
        for path, shape in layers.items():
            try:
                deltas[path] = self.build(*shape)
            except ValueError as error:
                problems.append(f"{path}: {error}")
        if problems:
            raise ValueError("\n  ".join(problems[:20]))
        return deltas

    def own(self) -> Self:
        """Return an equal adapter that is a different object: layers that hold the same one were built together."""
        return replace(self)


class AdaptedLinear(nn.Module):
    """A linear-like `base`, frozen, with named deltas; those in use are added, each times its weight.

    Attributes:
        deltas: the trainable parts by adapter name.
        adapters: what each was built from.
        in_use: the names that take part and the factor of each; empty means the base alone.
        enabled: False gives the base alone, whatever is in use (see `adapt.disabled`).
    """

    def __init__(self, base: nn.Module, delta: Delta, adapter: Adapter, name: str = "default") -> None:
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleDict()
        self.adapters: dict[str, Adapter] = {}
        self.in_use: dict[str, float] = {}
        self.in_features, self.out_features = features(base)
        self.enabled = True
        self.add(name, delta, adapter)

    def add(self, name: str, delta: Delta, adapter: Adapter) -> None:
        """Hold one more delta, not in use unless it is the first. Raises `ValueError` for a name that is taken."""
        check_name(name)
        if name in self.deltas:
            raise ValueError(f"the layer has an adapter named {name!r} already")
        self.deltas[name] = delta
        self.adapters[name] = adapter
        if len(self.deltas) == 1:
            self.in_use = {name: 1.0}

    def drop(self, name: str) -> None:
        """Forget a delta."""
        del self.deltas[name], self.adapters[name]
        self.in_use = {known: weight for known, weight in self.in_use.items() if known != name}

    @property
    def name(self) -> str:
        """The one adapter that is meant when none is named: the only one in use, else the only one there is."""
        for names in (list(self.in_use), list(self.deltas)):
            if len(names) == 1:
                return names[0]
        raise ValueError(f"the layer has several adapters ({', '.join(self.deltas)}); take one of `deltas` by its name")

    @property
    def delta(self) -> Delta:
        """The delta called `name`."""
        delta = self.deltas[self.name]
        assert isinstance(delta, Delta)
        return delta

    @property
    def adapter(self) -> Adapter:
        """What `delta` was built from."""
        return self.adapters[self.name]

    def extra_repr(self) -> str:
        """Describe what is in use in `print(model)`."""
        return "in use: " + (", ".join(f"{name} x {weight:g}" for name, weight in self.in_use.items()) or "none")

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Return base(x) + the weighted sum of the deltas in use."""
        out = self.base(x)
        if self.enabled:
            for name, weight in self.in_use.items():
                change = self.deltas[name](x)
                out = out + (change if weight == 1 else change * weight).to(out.dtype)
        return out

    def change(self) -> Float[Tensor, "out_features in_features"] | None:
        """Return the change of the weight that all deltas in use amount to; None where none is."""
        total = None
        for name, weight in self.in_use.items():
            delta = self.deltas[name]
            assert isinstance(delta, Delta)
            change = delta.weight() if weight == 1 else delta.weight() * weight
            total = change if total is None else total + change.to(total)
        return total

    def decoded_weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return the weight in effect: the base's, plus the deltas in use while enabled."""
        base = weight_of(self.base)
        change = self.change() if self.enabled else None
        return base if change is None else base + change.to(base.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return bias_of(self.base)


def check_name(name: str) -> None:
    """Raise `ValueError` unless an adapter can be called so: it becomes part of parameter names."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name is a text without dots, got {name!r}")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adapter cannot be named {name!r}: torch's modules use that word; choose another")
