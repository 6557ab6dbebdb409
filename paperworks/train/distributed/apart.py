"""Weights that each process keeps for itself (experts of its own): whole in checkpoints, and taken apart again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paperworks.core import processes


class Apart:
    """Which entries of a model's state only some process has. Without any, nothing here does anything.

    All processes must make it, and call its methods, together.
    """

    def __init__(self, model: nn.Module) -> None:
        paths = processes.paths_kept_apart(model) if processes.count() > 1 else []
        self.paths = tuple(f"{path}." for path in paths)
        self.elsewhere: frozenset[str] = frozenset()
        if paths:
            held = {name for name in model.state_dict() if self.holds(name)}
            self.elsewhere = frozenset().union(*self._everybodys(held)) - held

    def holds(self, name: str) -> bool:
        """Return whether the entry of this name, which is in the state here, is in no other process's."""
        return name.startswith(self.paths)

    def _everybodys(self, mine: Any) -> list[Any]:
        all_of_them: list[Any] = [None] * processes.count()
        dist.all_gather_object(all_of_them, mine)
        return all_of_them

    def in_order(self, names: list[str]) -> list[str]:
        """Return the names of all processes in the order that a model in one process has them."""
        if not self.paths:
            return names
        everybodys = self._everybodys(names)
        order: dict[str, None] = {}
        for name in everybodys[0]:
            path = next((path for path in self.paths if name.startswith(path)), None)
            beneath = [name] if path is None else [n for each in everybodys for n in each if n.startswith(path)]
            order |= dict.fromkeys(beneath)
        return list(order | dict.fromkeys(name for each in everybodys for name in each))

    def united(self, findings: list[str]) -> list[str]:
        """Return what any process found, each once."""
        if not self.paths:
            return findings
        return list(dict.fromkeys(each for found in self._everybodys(findings) for each in found))

    def whole_manifest(self, manifest: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the tables of all processes as one."""
        if not self.paths:
            return manifest
        whole = {key: dict(table) for key, table in manifest.items()}
        for each in self._everybodys({key: self._own(table) for key, table in manifest.items()}):
            for key, table in each.items():
                whole[key] |= table
        return whole

    def whole(self, tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
        """Return the tensors with those that other processes have of theirs; what is not to be kept is let go."""
        if not self.paths:
            return tensors
        own = {name: tensor for name, tensor in tensors.items() if self.holds(name)}
        return tensors | _sent_round(own, self._everybodys({name: _kind(t) for name, t in own.items()}), keep)

    def _own(self, table: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in table.items() if self.holds(name)}

    def whole_optimizer(self, state: Any, names: list[list[str]], keep: bool) -> Any:
        """Return an optimizer's state as that of one process would be: numbered by the order of all parameters."""
        if not self.paths:
            return state
        flat = [name for group in names for name in group]
        entries = {flat[index]: entry for index, entry in state["state"].items()}
        own = self._own(entries)
        tensors = {
            f"{name}\n{key}": value
            for name, entry in own.items()
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }
        rest = {name: {k: v for k, v in e.items() if not isinstance(v, Tensor)} for name, e in own.items()}
        for each in self._everybodys(rest):
            for name, entry in each.items():
                entries.setdefault(name, entry)
        sent = _sent_round(tensors, self._everybodys({name: _kind(t) for name, t in tensors.items()}), keep)
        for place, tensor in sent.items():
            name, key = place.split("\n")
            entries[name][key] = tensor
        return numbered(entries, state["param_groups"], [self.in_order(group) for group in names])

    def own_optimizer(self, whole: Any, whole_names: list[list[str]], names: list[list[str]]) -> Any:
        """Return the part of a whole optimizer's state that is this process's."""
        if not self.paths:
            return whole
        flat = [name for group in whole_names for name in group]
        entries = {flat[index]: entry for index, entry in whole["state"].items() if flat[index] not in self.elsewhere}
        return numbered(entries, whole["param_groups"], names)


def numbered(entries: dict[str, Any], groups: list[dict[str, Any]], names: list[list[str]]) -> dict[str, Any]:
    """Return an optimizer's state as torch has it: entries and groups by numbers, counted through all groups."""
    number = {name: index for index, name in enumerate(name for group in names for name in group)}
    return {
        "state": {number[name]: entries[name] for name in number if name in entries},
        "param_groups": [
            {**group, "params": [number[name] for name in members]}
            for group, members in zip(groups, names, strict=True)
        ],
    }


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, str]:
    return tensor.shape, tensor.dtype, tensor.device.type


def _sent_round(own: dict[str, Tensor], kinds: list[dict[str, Any]], keep: bool) -> dict[str, Tensor]:
    """Send every tensor to all, one after the other; return those of others, on the CPU."""
    kept = {}
    for owner, theirs in enumerate(kinds):
        for name, (shape, dtype, device) in theirs.items():
            mine = owner == processes.rank()
            tensor = own[name].detach().contiguous() if mine else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(tensor, owner)
            if keep and not mine:
                kept[name] = tensor.cpu()
    return kept
