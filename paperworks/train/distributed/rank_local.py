"""State that only one process holds (its own experts): gathered for checkpoints, split again when one is loaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paperworks.core import processes


class RankLocalState:
    """Entries of a model's state that only one process holds. Without any, every method returns its argument.

    All processes must construct it, and call its methods, together.

    paths: prefixes of the names of rank-local entries. held_elsewhere: names that only other processes hold.
    """

    def __init__(self, model: nn.Module) -> None:
        paths = processes.paths_kept_apart(model) if processes.count() > 1 else []
        self.paths = tuple(f"{path}." for path in paths)
        self.held_elsewhere: frozenset[str] = frozenset()
        if paths:
            held = {name for name in model.state_dict() if self.holds(name)}
            self.held_elsewhere = frozenset().union(*self._gathered(held)) - held

    def holds(self, name: str) -> bool:
        """Whether the entry of this name, if it is in the state here, is in no other process's."""
        return name.startswith(self.paths)

    def _gathered(self, mine: Any) -> list[Any]:
        gathered: list[Any] = [None] * processes.count()
        dist.all_gather_object(gathered, mine)
        return gathered

    def in_order(self, names: list[str]) -> list[str]:
        """Names of all processes, in the order that a model in one process has them."""
        if not self.paths:
            return names
        gathered = self._gathered(names)
        order: dict[str, None] = {}
        for name in gathered[0]:
            path = next((path for path in self.paths if name.startswith(path)), None)
            beneath = [name] if path is None else [n for each in gathered for n in each if n.startswith(path)]
            order |= dict.fromkeys(beneath)
        return list(order | dict.fromkeys(name for each in gathered for name in each))

    def combined(self, findings: list[str]) -> list[str]:
        """Findings of all processes, each once."""
        if not self.paths:
            return findings
        return list(dict.fromkeys(each for found in self._gathered(findings) for each in found))

    def whole_manifest(self, manifest: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Manifests of all processes as one."""
        if not self.paths:
            return manifest
        whole = {key: dict(table) for key, table in manifest.items()}
        for each in self._gathered({key: self._own(table) for key, table in manifest.items()}):
            for key, table in each.items():
                whole[key] |= table
        return whole

    def whole(self, tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
        """Tensors of all processes by name; those of others on the CPU, or left out unless `keep`."""
        if not self.paths:
            return tensors
        own = {name: tensor for name, tensor in tensors.items() if self.holds(name)}
        return tensors | _broadcast_all(own, self._gathered({name: _kind(t) for name, t in own.items()}), keep)

    def _own(self, table: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in table.items() if self.holds(name)}

    def whole_optimizer(self, state: Any, names: list[list[str]], keep: bool) -> Any:
        """Optimizer state as one process would have it: numbered by the order of all parameters."""
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
        for each in self._gathered(rest):
            for name, entry in each.items():
                entries.setdefault(name, entry)
        sent = _broadcast_all(tensors, self._gathered({name: _kind(t) for name, t in tensors.items()}), keep)
        for place, tensor in sent.items():
            name, key = place.split("\n")
            entries[name][key] = tensor
        return numbered(entries, state["param_groups"], [self.in_order(group) for group in names])

    def own_optimizer(self, whole: Any, whole_names: list[list[str]], names: list[list[str]]) -> Any:
        """This process's part of a whole optimizer state."""
        if not self.paths:
            return whole
        flat = [name for group in whole_names for name in group]
        named = {flat[index]: entry for index, entry in whole["state"].items()}
        entries = {name: entry for name, entry in named.items() if name not in self.held_elsewhere}
        return numbered(entries, whole["param_groups"], names)


def numbered(entries: dict[str, Any], groups: list[dict[str, Any]], names: list[list[str]]) -> dict[str, Any]:
    """Optimizer state as torch has it: entries and groups by numbers, counted through all groups."""
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


def _broadcast_all(own: dict[str, Tensor], kinds: list[dict[str, Any]], keep: bool) -> dict[str, Tensor]:
    """Send every rank-local tensor to all processes; those of others, on the CPU, unless not to `keep`."""
    kept = {}
    for owner, theirs in enumerate(kinds):
        for name, (shape, dtype, device) in theirs.items():
            mine = owner == processes.rank()
            tensor = own[name].detach().contiguous() if mine else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(tensor, owner)
            if keep and not mine:
                kept[name] = tensor.cpu()
    return kept
