"""A whole model as a value: any spec that builds one, whatever its inputs are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from paperworks.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """A spec that stands for a whole model of any modality: input part -> backbone -> head.

    `build()` gives the module, whose `spec` is this value. `paperworks.build`, `count_parameters`, `save` and `load`
    take any of them. A module may have `tie()`, which makes one tensor of parameters that are one by the spec: it is
    called after building and after loading.
    """

    def build(self) -> Any:
        """The model, an `nn.Module` with freshly drawn weights (`torch.manual_seed` makes them reproducible)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def layers(self) -> int:
        """Number of layers that the spec asks for, in all its backbones: what a hostile file is measured by."""
        return sum(getattr(part, "depth", 0) for part in parts_of(self) if isinstance(getattr(part, "depth", 0), int))


def parts_of(spec: Spec) -> Iterator[Spec]:
    """The spec and every spec inside it, each once as it stands; a tuple's are passed one by one."""
    yield spec
    for field in fields(spec):
        value = getattr(spec, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Spec):
                yield from parts_of(part)


def tie(model: nn.Module) -> None:
    """Let parameters that are one by the spec be one tensor, where the model has such."""
    own: Any = getattr(model, "tie", None)
    if callable(own):
        own()
