"""Modules trained and saved whole beside an adapter: a new head, norms (peft's `modules_to_save`)."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.adapt.delta import check_name


class TrainedWhole(nn.Module):
    """A frozen module and a trained copy of it for each adapter; weights mix their outputs as `adapt.use` says.

    Whatever is read from it is read from the copy in use, where there is one, else from the frozen module. Tied weights
    come apart: the copy of an unembedding is no longer the embedding's.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.in_use: dict[str, float] = {}
        self.enabled = True
        self.rows: tuple[str | None, ...] | None = None

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that have a copy."""
        return list(self.copies)

    def add(self, name: str, held: nn.Module | None = None) -> None:
        """Hold a copy for one more adapter: of the frozen module, or the one given."""
        check_name(name)
        self.copies[name] = (copy.deepcopy(self.base) if held is None else held).train(self.training)

    def use(self, wanted: Mapping[str, float]) -> None:
        """Choose the copies that act; those are trained."""
        self.in_use = {name: weight for name, weight in wanted.items() if name in self.copies}
        for name, module in self.copies.items():
            module.requires_grad_(name in self.in_use)

    def drop(self, name: str, merged: bool = False) -> None:
        """Forget a copy; one that was merged takes the frozen module's place."""
        if name not in self.copies:
            return
        if merged and self.in_use.get(name) == 1:
            self.base = self.copies[name].requires_grad_(False)
        del self.copies[name]
        self.in_use.pop(name, None)

    def require_mergeable(self, path: str) -> None:
        """Raise `ValueError` where what is in use is not one copy alone."""
        if self.in_use and list(self.in_use.values()) != [1.0]:
            raise ValueError(f"{path} is trained whole, and merges only alone with weight 1, not as {self.in_use}")

    def _sole(self) -> nn.Module:
        alone = self.enabled and len(self.in_use) == 1
        return self.copies[next(iter(self.in_use))] if alone else self.base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the copy in use."""
        if self.rows is not None:
            return self._by_row(args, kwargs)
        if not self.enabled or not self.in_use:
            return self.base(*args, **kwargs)
        if list(self.in_use.values()) == [1.0]:
            return self._sole()(*args, **kwargs)
        base = out = self.base(*args, **kwargs)
        for name, weight in self.in_use.items():
            out = out + weight * (self.copies[name](*args, **kwargs) - base)
        return out

    def _by_row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        rows = self.rows or ()
        out: Tensor = self.base(*args, **kwargs)
        if out.shape[0] != len(rows):
            raise ValueError(f"adapt.per_row names adapters for {len(rows)} rows, but the output is {tuple(out.shape)}")
        for name in dict.fromkeys(row for row in rows if row is not None and row in self.copies):
            index = torch.tensor([i for i, row in enumerate(rows) if row == name], device=out.device)
            some = [value[index] if _has_rows(value, rows) else value for value in args]
            named = {key: value[index] if _has_rows(value, rows) else value for key, value in kwargs.items()}
            out = out.index_copy(0, index, self.copies[name](*some, **named))
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}) or name.startswith("__"):
                raise
            return getattr(self._sole(), name)


def _has_rows(value: Any, rows: tuple[str | None, ...]) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == len(rows)
