"""Running a model block by block: the parts that can be run alone, each on what the parts before it left."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
Tune = Callable[[nn.Module, list[Tensor], list[Tensor], Callable[[int, Tensor], Tensor]], None]


class Enough(Exception):
    """Raised by a hook to end a forward pass early."""


class Unit:
    """A part of the model that runs by itself: a block on stored hidden states, or the model as a whole."""

    path = ""
    may_stop = True

    def __init__(self, model: nn.Module, paths: Sequence[str], batches: Sequence[Batch]) -> None:
        self.model, self.paths, self.batches = model, list(paths), batches

    def run(self, index: int) -> Any:
        """Run one batch; return the output, or None if the run was stopped."""
        try:
            return _call(self.model, self.batches[index])
        except Enough:
            return None

    def groups(self) -> list[tuple[str, ...]]:
        """The layers by the input they read, in order of execution."""
        order = _execution_order(self)
        for path in self.paths:
            if not any(path in group for group in order):
                if len(self.batches) > 1:  # an expert that the first batch does not reach, say
                    order.append((path,))
                    continue
                raise ValueError(f"{path}: the calibration batches never reach it; give more text, or other targets")
        return order

    def advance(self) -> None:
        """Go on to what follows."""

    def outputs(self) -> list[Tensor]:
        """The outputs of all batches, before anything in this unit changes."""
        return [_first(self.run(index)) for index in range(len(self.batches))]

    def tune(self, tune: Tune, targets: list[Tensor]) -> None:
        """Let the caller train what is continuous in the compressed unit."""
        raise ValueError("tuning block by block needs a model made of blocks in a ModuleList, each feeding the next")


class _BlockUnit(Unit):
    """One block, run on the hidden states that the blocks before it left."""

    def __init__(
        self, model: nn.Module, path: str, paths: Sequence[str], chain: "_Chain", place: int, *, last: bool
    ) -> None:
        super().__init__(model, paths, chain.batches)
        self.path, self.chain, self.place, self.last = path, chain, place, last

    def run(self, index: int) -> Any:
        return self._run(index, self.chain.hidden[index])

    def _run(self, index: int, hidden: Tensor) -> Any:
        arguments, options = self.chain.extras[index][self.place if len(self.chain.extras[index]) > 1 else 0]
        try:
            return self.model.get_submodule(self.path)(hidden, *arguments, **options)
        except Enough:
            return None

    def advance(self) -> None:
        if self.last:  # what comes after is not looked at, or run as a whole
            return
        for index, hidden in enumerate(self.chain.hidden):
            self.chain.hidden[index] = _first(self._run(index, hidden))

    def tune(self, tune: Tune, targets: list[Tensor]) -> None:
        block = self.model.get_submodule(self.path)
        with torch.enable_grad():
            tune(block, self.chain.hidden, targets, lambda index, hidden: _first(self._run(index, hidden)))


@dataclass
class _Chain:
    """The hidden states on their way through a list of blocks, and the other arguments each block is called with."""

    batches: Sequence[Batch]
    hidden: list[Tensor] = field(default_factory=list)
    extras: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)  # by batch, by block


def units(model: nn.Module, paths: list[str], batches: Sequence[Batch]) -> Iterator[Unit]:
    """Cut the model into units, in order of execution."""
    whole = Unit(model, paths, batches)
    lists = _block_lists(model, paths)
    order = [path for group in whole.groups() for path in group] if lists else paths
    left = order[:]
    while left:
        owner = next((name for name, owned in lists.items() if left[0] in owned), None)
        if owner is None:
            run = []
            while left and not any(left[0] in owned for owned in lists.values()):
                run.append(left.pop(0))
            yield Unit(model, run, batches)
            continue
        owned = lists.pop(owner)
        left = [path for path in left if path not in owned]
        yield from _block_units(model, owner, sorted(owned, key=order.index), batches)


def _block_units(model: nn.Module, owner: str, paths: list[str], batches: Sequence[Batch]) -> Iterator[Unit]:
    names = [f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_children()]
    chain = _capture(model, names, batches)
    if chain is None:
        yield Unit(model, paths, batches)
        return
    owned = [[path for path in paths if path == name or path.startswith(name + ".")] for name in names]
    last = max(place for place, inside in enumerate(owned) if inside)
    for place, (name, inside) in enumerate(zip(names[: last + 1], owned, strict=False)):
        unit = _BlockUnit(model, name, inside, chain, place, last=place == last)
        if inside:
            yield unit
        else:
            unit.advance()


def _block_lists(model: nn.Module, paths: Sequence[str]) -> dict[str, set[str]]:
    """The paths below each outermost ModuleList."""
    found: dict[str, set[str]] = {}
    for path in paths:
        parts = path.split(".")
        for cut in range(1, len(parts)):
            parent = ".".join(parts[:cut])
            if isinstance(model.get_submodule(parent), nn.ModuleList):
                found.setdefault(parent, set()).add(path)
                break
    return found


def _capture(model: nn.Module, names: list[str], batches: Sequence[Batch]) -> _Chain | None:
    """Run up to the first block (the first batch: up to the last) and keep what it is called with.

    Returns None when the blocks do not feed one another directly.
    """
    chain = _Chain(batches)
    blocks = [model.get_submodule(name) for name in names]
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []
    stop_at = len(blocks) - 1

    def before(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append((arguments[0] if arguments else None, arguments[1:], options))
        if module is blocks[stop_at]:
            raise Enough

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        outputs.append(_first(output))

    hooks: list[Any] = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        for index, batch in enumerate(batches):
            calls.clear()
            outputs.clear()
            with contextlib.suppress(Enough):
                _call(model, batch)
            if index == 0:
                if not _chained(calls, outputs, len(blocks)):
                    return None
                if all(_same(call[1:], calls[0][1:]) for call in calls):
                    stop_at = 0  # every block gets the same arguments: the first block's call tells all
            if not calls or not isinstance(calls[0][0], Tensor):
                return None
            chain.hidden.append(calls[0][0])
            chain.extras.append([call[1:] for call in (calls[:1] if stop_at == 0 else calls)])
    finally:
        for hook in hooks:
            hook.remove()
    return chain


def _chained(calls: list[Any], outputs: list[Any], blocks: int) -> bool:
    return len(calls) == blocks and all(
        isinstance(call[0], Tensor) and call[0] is output for call, output in zip(calls[1:], outputs, strict=False)
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two calls pass the very same objects."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


def _execution_order(unit: Unit) -> list[tuple[str, ...]]:
    """Run the first batch and note which layers read which input, in order."""
    seen: list[tuple[Tensor, list[str]]] = []
    modules = dict(unit.model.named_modules())

    def note(path: str) -> Callable[[nn.Module, Any], None]:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if any(path in paths for _, paths in seen):
                return
            for tensor, paths in seen:
                if tensor is inputs[0]:
                    paths.append(path)
                    return
            seen.append((inputs[0], [path]))

        return see

    hooks = [modules[path].register_forward_pre_hook(note(path)) for path in unit.paths]
    try:
        unit.run(0)
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(paths) for _, paths in seen]


def _call(model: nn.Module, batch: Batch) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
