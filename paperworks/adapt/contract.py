"""The contract of an adapter: a trainable change on top of a frozen linear layer, whatever that layer is made of."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from jaxtyping import Float
from torch import Tensor, nn

from paperworks.adapt.layer_info import LayerInfo
from paperworks.core.errors import unknown
from paperworks.core.spec import Spec


class Delta(nn.Module):
    """The trainable part of an adapter on one layer. All its tensors are parameters or persistent buffers.

    A method gives `change`, or `forward` where the adapted output is simpler to say than the change. `layer` describes
    the base and reads its weight as it is now.
    """

    layer: LayerInfo

    def forward(
        self, x: Float[Tensor, "... in_features"], base_output: Float[Tensor, "... out_features"]
    ) -> Float[Tensor, "... out_features"]:
        """The adapted output, in the dtype of the base's."""
        return base_output + self.change(x, base_output).to(base_output.dtype)

    def change(
        self, x: Float[Tensor, "... in_features"], base_output: Float[Tensor, "... out_features"]
    ) -> Float[Tensor, "... out_features"]:
        """The adapted output less the base's."""
        if type(self).forward is Delta.forward:
            raise NotImplementedError(f"{type(self).__name__} does not say what it changes: define change or forward")
        out: Tensor = self(x, base_output) - base_output
        return out

    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The adapted weight less the base's."""
        raise NotImplementedError(f"{type(self).__name__} does not say its weight")

    def bias(self) -> Float[Tensor, " out_features"] | None:
        """The adapted bias less the base's; None where it stays."""
        return None

    def removed(self) -> Float[Tensor, "out_features in_features"] | None:
        """What this delta took out of the base's weight when it was put on (PiSSA); None for most."""
        return None

    def removed_output(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """x times `removed`, which the base's output lacks."""
        raise NotImplementedError(f"{type(self).__name__} takes nothing out of the base")

    def to_peft(self) -> dict[str, Tensor]:
        """The tensors under peft's names. Raises `ValueError` where peft has none for them."""
        raise ValueError(f"peft's layout has no place for a {type(self).__name__}")

    def read_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors under peft's names, of the shapes that `to_peft` gives. Raises `ValueError` for others."""
        raise ValueError(f"peft's layout has no place for a {type(self).__name__}")


_PEFT_NAMES = {
    "r": "rank=",
    "lora_alpha": "alpha=",
    "lora_dropout": "dropout=",
    "use_rslora": "rank_stabilized=",
    "use_dora": "adapt.DoRA",
    "init_lora_weights": "adapt.PiSSA for 'pissa'",
    "feedforward_modules": "feedforward=",
    "target_modules": "targets= of adapt.apply",
    "target_parameters": "targets= of adapt.apply",
    "modules_to_save": "modules_to_save= of adapt.apply",
}


@dataclass(frozen=True, kw_only=True)
class Adapter(Spec):
    """A method of parameter-efficient adaptation: makes a `Delta` for each chosen layer.

    Attributes:
        kinds: the kinds of layers it is made for (see `core.linear.register_linear`).
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "patches")

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Say a field's name here where peft's was given."""
        known = {field.name for field in dataclasses.fields(cls)}
        for field in fields:
            if field not in known:
                ours = _PEFT_NAMES.get(field)
                hint = f"; peft's {field!r} is {ours} here" if ours else ""
                raise ValueError(f"{unknown(f'field of {cls.__name__}', field, known)}{hint}")
        if args:
            raise ValueError(f"{cls.__name__} takes its fields by name ({', '.join(sorted(known))}), got {args!r}")
        return super().__new__(cls)

    def build(self, layer: LayerInfo) -> Delta:
        """A fresh delta for one layer. Raises `ValueError` if it does not fit."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def build_all(self, layers: Mapping[str, LayerInfo]) -> dict[str, Delta]:
        """A fresh delta for each layer by path.

        Methods whose layers share parameters override this; the default builds each layer for itself.

        Raises:
            ValueError: that lists every layer the adapter does not fit.
        """
        deltas: dict[str, Delta] = {}
        problems = []
        for path, layer in layers.items():
            try:
                self.require_kind(layer)
                deltas[path] = self.build(layer)
            except ValueError as error:
                problems.append(f"{path}: {error}")
        if problems:
            raise ValueError("\n  ".join(problems[:20]))
        return deltas

    def require_kind(self, layer: LayerInfo) -> None:
        """Raise `ValueError` for a kind of layer that the method is not made for."""
        if layer.kind not in self.kinds:
            what = {"lookup": "an embedding", "stacked": "a stack of experts", "patches": "a map of patches"}
            raise ValueError(f"{type(self).__name__} cannot adapt {what.get(layer.kind, 'a linear layer')}")

    def own(self) -> Self:
        """An equal adapter that is a different object: layers that hold the same one were built together."""
        return replace(self)

    def to_peft(self) -> dict[str, Any]:
        """The fields of peft's configuration. Raises `ValueError` where peft has no such method."""
        raise ValueError(f"peft's layout has no place for {type(self).__name__}")
