"""What the linear layers of a model are: plain ones, or what a `LinearKind` makes of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from paperworks.core.selection import replace_module
from paperworks.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class LinearKind(Spec):
    """What the linear layers of a model are: `convert(linear)` gives the module that stands in a plain one's place."""

    def convert(self, linear: nn.Linear) -> nn.Module:
        """The module, with the weights of `linear`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it makes of a linear layer")


def convert_linears(root: nn.Module, kind: LinearKind) -> None:
    """Replace every plain linear layer under `root`, in place."""
    for path, module in list(root.named_modules()):
        if type(module) is nn.Linear:
            replace_module(root, path, kind.convert(module))
