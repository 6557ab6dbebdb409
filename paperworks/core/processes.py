"""What parts of networks know of other processes: tensors that travel, batches that are spread, weights kept apart.

Several processes that compute one thing have one goal, the sum of theirs. So the gradient of rows that were sent away
comes back the way they went, and that of a sum over processes is the sum of what each has of it. All must go through
the same exchanges in the same order, forwards and backwards. One process, and nothing here does anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])


def _not_compiled(function: Function) -> Function:
    """Do as `torch.compiler.disable`, at the first call: applied at import, it would import all of the compiler."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return call  # type: ignore[return-value]


def count() -> int:
    """How many processes there are in the default group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


@_not_compiled
def exchanged(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send the first `sent[0]` rows to process 0, the next `sent[1]` to process 1, and return the rows that come.

    `received[i]` is how many process i sends here. Gradients travel back.
    """
    out: Tensor = _Exchange.apply(x, sent, received)  # type: ignore[no-untyped-call]
    return out


@_not_compiled
def counts_exchanged(counts: Tensor) -> Tensor:
    """Send row i of whole numbers to process i, and return what each sends here, one row a process."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous())
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sizes = sent, received
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.sizes
        return exchanged(above[0], received, sent), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(above[0])  # type: ignore[no-untyped-call]
        return total


# No context variable: on a GPU activations are computed again in a thread of autograd's own, which knows none of them.
_spread = False


@contextmanager
def one_batch(spread: bool = True) -> Iterator[None]:
    """Say that the rows which the processes have in this block are one batch, in the order of the processes.

    A mean over its tokens (routing balance) and a limit to them (an expert's capacity) are then those of all. Elsewhere
    each process's rows are a batch of their own. Close it after `backward`, which may compute a forward pass again.
    """
    global _spread
    before, _spread = _spread, spread and count() > 1
    try:
        yield
    finally:
        _spread = before


def is_spread() -> bool:
    """Whether the rows of other processes belong to the same batch."""
    return _spread


def summed(x: Tensor) -> Tensor:
    """The sum of x over the processes that share a batch; x itself where it is not spread."""
    return _summed(x) if _spread else x


@_not_compiled
def _summed(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return total


def gathered(x: Tensor) -> Tensor:
    """The x of each process that shares the batch, (processes, *x.shape), without a gradient."""
    return _gathered(x) if _spread else x[None]


@_not_compiled
def _gathered(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(count())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.stack(parts)


def kept_apart(module: Module) -> Module:
    """Mark a module whose parameters are others in each process: no other process has a gradient for them."""
    module.kept_apart = True  # type: ignore[assignment]
    return module


def paths_kept_apart(model: nn.Module) -> list[str]:
    """The paths of the modules that are marked so."""
    return [path for path, module in model.named_modules() if getattr(module, "kept_apart", False)]


def tensors_kept_apart(model: nn.Module) -> set[int]:
    """The ids of all parameters and buffers that lie in them: an expert's own, and those of its adapters."""
    marked = [model.get_submodule(path) for path in paths_kept_apart(model)]
    return {id(tensor) for module in marked for tensor in chain(module.parameters(), module.buffers())}
