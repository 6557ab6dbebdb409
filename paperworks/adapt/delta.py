"""A linear-like layer with adapters on it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.adapt.contract import Adapter, Delta
from paperworks.core.linear import LazyWeight, bias_of, features, form_of, linear_kind, weight_of, write_weight


class AdaptedLinear(nn.Module):
    """A linear-like `base`, frozen, with named deltas, of which some are in use with a weight each.

    output = base(x) + sum over those in use of weight * (delta's output - base(x)), which for additive methods is the
    weighted sum of the changes; merging adds the same sum to the base's weight. Whatever else the base has (`weight`,
    `bias`, sizes under other names ...) is read from the wrapper as before; `weight` is the one in effect.

    Attributes:
        deltas: the trainable parts by adapter name.
        adapters: what each was built from.
        in_use: the names that take part and the factor of each; empty means the base alone.
        enabled: False gives the base alone, whatever is in use (see `adapt.disabled`).
        rows: the adapter of each row of the batch (see `adapt.per_row`).
    """

    def __init__(self, base: nn.Module, delta: Delta, adapter: Adapter, name: str = "default") -> None:
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleDict()
        self.adapters: dict[str, Adapter] = {}
        self.in_use: dict[str, float] = {}
        self.in_features, self.out_features = features(base)
        self.linear_kind = linear_kind(base)
        self.enabled = True
        self.rows: tuple[str | None, ...] | None = None
        self._removing: tuple[str, ...] = ()  # deltas whose part was taken out of the base
        self._untouched: dict[str, Tensor] | None = None  # the base's tensors before that, in host memory
        self.add(name, delta, adapter)

    def add(self, name: str, delta: Delta, adapter: Adapter) -> None:
        """Hold one more delta, not in use unless it is the first. Raises `ValueError` for a name that is taken."""
        check_name(name)
        if name in self.deltas:
            raise ValueError(f"the layer has an adapter named {name!r} already")
        delta.layer = replace(delta.layer, source=self)
        self.deltas[name] = delta
        self.adapters[name] = adapter
        if len(self.deltas) == 1:
            self.in_use = {name: 1.0}

    def drop(self, name: str) -> None:
        """Forget a delta."""
        del self.deltas[name], self.adapters[name]
        self.in_use = {known: weight for known, weight in self.in_use.items() if known != name}

    @property
    def adapter_names(self) -> list[str]:
        """The names of the deltas."""
        return list(self.deltas)

    def use(self, wanted: Mapping[str, float]) -> None:
        """Choose the deltas that act; those are trained."""
        self.in_use = {name: weight for name, weight in wanted.items() if name in self.deltas}
        for name, delta in self.deltas.items():
            delta.requires_grad_(name in wanted)

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
        return self._delta(self.name)

    def _delta(self, name: str) -> Delta:
        delta = self.deltas[name]
        assert isinstance(delta, Delta)
        return delta

    @property
    def adapter(self) -> Adapter:
        """What `delta` was built from."""
        return self.adapters[self.name]

    def extra_repr(self) -> str:
        """Describe what is in use in `print(model)`."""
        return "in use: " + (", ".join(f"{name} x {weight:g}" for name, weight in self.in_use.items()) or "none")

    def forward(self, x: Tensor) -> Tensor:
        """The base's output with the deltas in use."""
        modules = self._modules  # looked up by hand: this runs for each layer in each step
        out: Tensor = modules["base"](x)  # type: ignore[misc]
        in_use = self.in_use
        if (
            len(in_use) == 1
            and self.enabled
            and self.rows is None
            and not self._removing
            and self.linear_kind != "patches"
        ):
            for name, weight in in_use.items():
                if weight == 1:
                    adapted: Tensor = modules["deltas"]._modules[name](x, out)  # type: ignore[union-attr, misc]
                    return adapted
        if self.rows is not None:
            return self._by_row(x, out)
        return self._adapted(x, out, in_use if self.enabled else {})

    def _adapted(self, x: Tensor, out: Tensor, in_use: Mapping[str, float]) -> Tensor:
        if self.linear_kind == "patches":
            patches = _patches(x, self.base)
            return self._summed(patches, out.movedim(1, -1), in_use).movedim(-1, 1)
        return self._summed(x, out, in_use)

    def _summed(self, x: Tensor, out: Tensor, in_use: Mapping[str, float]) -> Tensor:
        alone = len(in_use) == 1 and 1.0 in in_use.values()
        if self._removing and not (alone and self._removing == tuple(in_use)):
            parts = {name: self._delta(name).removed_output(x) for name in self._removing}
            base = out = out + sum(parts.values()).to(out.dtype)  # type: ignore[union-attr]
            for name, weight in in_use.items():
                change = self._delta(name).change(x, base)
                change = change - parts[name] if name in parts else change
                out = out + (change * weight).to(out.dtype)
            return out
        if alone:
            (name,) = in_use
            adapted: Tensor = self.deltas[name](x, out)
            return adapted
        base = out
        for name, weight in in_use.items():
            out = out + (self._delta(name).change(x, base) * weight).to(out.dtype)
        return out

    def _by_row(self, x: Tensor, out: Tensor) -> Tensor:
        rows = self.rows or ()
        if x.dim() < 1 or x.shape[0] != len(rows):
            raise ValueError(
                f"adapt.per_row names adapters for {len(rows)} rows, but a layer was given {tuple(x.shape)}: the first "
                "dimension of the model's inputs must be the rows, all the way through the model"
            )
        for name in dict.fromkeys(rows):
            index = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            in_use = {name: 1.0} if name is not None and name in self.deltas else {}
            if in_use or self._removing:
                out = out.index_copy(0, index, self._adapted(x[index], out[index], in_use))
        return out

    def removed(self, names: tuple[str, ...] | None = None) -> Tensor | None:
        """The sum of what the deltas took out of the base's weight."""
        return _total(self._delta(name).removed() for name in (self._removing if names is None else names))

    def original_weight(self) -> Float[Tensor, "out_features in_features"]:
        """The base's weight without any adapter: with what was taken out of it."""
        weight, removed = weight_of(self.base).detach(), self.removed()
        return weight if removed is None else weight + removed.to(weight)

    def weight_change(self, keep: bool = False) -> Float[Tensor, "out_features in_features"] | None:
        """The weight in effect less the base's stored one, over the deltas in use; None where nothing changes.

        Args:
            keep: leave out what deltas that are not in use took: what merging those in use adds.
        """
        in_use = self.in_use if self.enabled or keep else {}
        names = tuple(in_use) if keep else tuple(dict.fromkeys((*in_use, *self._removing)))
        parts = []
        for name in names:
            weight, removed = in_use.get(name, 0.0), self._delta(name).removed()
            if weight:
                change = self._delta(name).weight()
                parts.append(change if weight == 1 else change * weight)
            if removed is not None and weight != 1:
                parts.append(removed * (1 - weight))
        return _total(parts)

    def bias_change(self) -> Float[Tensor, " out_features"] | None:
        """The bias in effect less the base's; None where nothing changes."""
        in_use = self.in_use if self.enabled else {}
        parts = ((weight, self._delta(name).bias()) for name, weight in in_use.items())
        return _total(change * weight for weight, change in parts if change is not None)

    def decoded_weight(self) -> Float[Tensor, "out_features in_features"]:
        """The weight in effect: the base's with the deltas in use, while enabled."""
        base, change = weight_of(self.base), self.weight_change()
        return base if change is None else base + change.to(base.dtype)

    def encode_weight(self, weight: Tensor) -> None:
        """Refuse: the weight in effect is a sum. Merge or remove the adapters first."""
        raise ValueError("an adapted layer's weight is a sum and cannot be written: merge or remove its adapters")

    @property
    def weight(self) -> Tensor:
        """The weight in effect, as the base stores it: its own parameter where nothing is in use.

        Else computed when something is done with it, with gradients to the deltas; owners that multiply by it (torch's
        MultiheadAttention) are adapted as well, those that ask for its dtype lose no time.
        """
        held: Any = self.base.weight
        if not self._removing and not (self.in_use and self.enabled):
            assert isinstance(held, Tensor)
            return held
        trained = any(parameter.requires_grad for name in self.in_use for parameter in self.deltas[name].parameters())
        return LazyWeight.of(tuple(held.shape), held.dtype, held.device, self._stored_weight, trained)

    def _stored_weight(self) -> Tensor:
        if self.rows is not None:
            raise ValueError("adapt.per_row needs layers that are called; the owner of this one reads its weight")
        weight, form = self.decoded_weight(), form_of(self.base)
        if form is not None and form.kind == "patches":
            return weight.view(self.base.weight.shape)  # type: ignore[arg-type]
        return weight.mT if form is not None and form.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias in effect: the base's own where no delta changes it."""
        held, change = bias_of(self.base), self.bias_change()
        return held if held is None or change is None else held + change.to(held)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weight."""
        return self.base.weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Of the base's weight."""
        return self.base.weight.device  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("__"):
                raise
            return getattr(base, name)

    @torch.no_grad()
    def take_out(self, name: str) -> None:
        """Take out of the base what a delta removes, and remember the base as it was."""
        part = self._delta(name).removed()
        if part is None:
            return
        held = _tensors(self.base)
        if self._untouched is None and not self._removing:
            self._untouched = {key: _on_host(tensor) for key, tensor in held.items()}
        if isinstance(held.get("weight"), nn.Parameter):  # a fresh one: the old one is what is remembered
            self.base.weight = nn.Parameter(held["weight"].detach().clone(), requires_grad=False)
        write_weight(self.base, weight_of(self.base) - part.to(weight_of(self.base)))
        self._removing = (*self._removing, name)

    @torch.no_grad()
    def give_back(self, name: str, restore: bool = True) -> None:
        """Undo `take_out`; the last one gives the base its own tensors again. Without `restore` only forget it."""
        if name not in self._removing:
            return
        part, held = self._delta(name).removed(), _tensors(self.base)
        self._removing = tuple(known for known in self._removing if known != name)
        if not restore:
            self._untouched = None
        elif self._untouched is not None and not self._removing and self._untouched.keys() == held.keys():
            for key, now in held.items():
                value = self._untouched[key]
                if (value.device, value.dtype) != (now.device, now.dtype):
                    value = value.to(now.device, now.dtype if now.is_floating_point() else value.dtype)
                is_parameter = isinstance(now, nn.Parameter) and not isinstance(value, nn.Parameter)
                setattr(self.base, key, nn.Parameter(value, requires_grad=False) if is_parameter else value)
            self._untouched = None
        else:  # the base was compressed, merged into or holds more parts taken out: add this one back
            assert part is not None
            write_weight(self.base, weight_of(self.base) + part.to(weight_of(self.base)))


def _on_host(tensor: Tensor) -> Tensor:
    """The very tensor where it lies in host memory, else a copy there."""
    return tensor if tensor.device.type in ("cpu", "meta") else tensor.detach().cpu()


def _tensors(base: nn.Module) -> dict[str, Tensor]:
    """What holds the base's weight: the format's tensors, or the parameter."""
    stored = getattr(base, "stored", None)
    if isinstance(stored, dict):
        return dict(stored)
    weight = base.weight
    assert isinstance(weight, Tensor)
    return {"weight": weight}


def _patches(x: Float[Tensor, "batch channels height width"], base: Any) -> Float[Tensor, "batch rows columns inputs"]:
    """The inputs of a convolution whose kernel is its stride, a row each patch."""
    height, width = base.kernel_size
    x = x[..., : x.shape[-2] // height * height, : x.shape[-1] // width * width]
    x = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # (batch, channels, rows, height, columns, width)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3)


def _total(parts: Any) -> Tensor | None:
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part.to(total)
    return total


def check_name(name: str) -> None:
    """Raise `ValueError` unless an adapter can be called so: it becomes part of parameter names."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name is a text without dots, got {name!r}")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adapter cannot be named {name!r}: torch's modules use that word; choose another")
