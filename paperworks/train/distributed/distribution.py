"""The one place that knows how many processes train together; under `torchrun` they are several.

All processes run the same program on the same batches, and each computes its share of every step: whole micro-batches
where a step has enough of them, else rows of each. Sums are added over all processes and divided once, by the elements
of all, so that a run has the same losses whatever the number of processes. Parts that look at all tokens of a batch
(routing balance, an expert's capacity) see those of all processes where a batch is shared out (`nn.processes`). Weights
that each process keeps for itself (`ParallelExperts`) are neither copied nor added. One process, and nothing here does
anything.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paperworks.core.processes import tensors_kept_apart

T = TypeVar("T")

# Gradients are added in pieces of this many numbers: few messages, little extra memory.
BUCKET = 2**23

# How long a process waits for the others before it takes them for dead. Saving and evaluating happen in between.
PATIENCE = timedelta(minutes=30)


def processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _several() else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def _several() -> bool:
    out: bool = dist.is_available() and dist.is_initialized()
    return out


@contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Join the processes that a launcher started, inside the block; yields the device this one trains on.

    The launcher (`torchrun`) says how many there are by WORLD_SIZE. A process group that is there already is used;
    one that is made here stays until the program ends, for the next run. Of several GPUs of a
    machine each process takes its own.

    Raises RuntimeError, instead of waiting for ever, when another process has ended.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1 and not _several():
        yield device
        return
    if device is not None and device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not _several() and "RANK" not in os.environ:
        raise RuntimeError(
            f"WORLD_SIZE is {launched}, but RANK is not set: start the processes with torchrun --nproc-per-node="
            f"{launched}, or unset WORLD_SIZE to train in one"
        )
    if not _several():
        dist.init_process_group("cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    try:
        yield device
    except (dist.DistError, RuntimeError) as error:
        if _lost_another(error):
            raise RuntimeError(
                f"process {rank()} of {processes()} stops because another one has ended; its own message says why. "
                "The newest complete checkpoint is whole: start the same again to go on from it"
            ) from error
        raise


def _leave() -> None:
    if _several():
        dist.destroy_process_group()


def _lost_another(error: Exception) -> bool:
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out", "remote process")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def place(model: nn.Module, device: str | None) -> torch.device:
    """Move the model to `device` (in place; None leaves it) and return the device its batches must go to."""
    if device is not None:
        model.to(device)
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


@torch.no_grad()
def replicate(model: nn.Module) -> None:
    """Let every process start from the first one's weights, but for those that each keeps for itself."""
    if processes() == 1:
        return
    local = tensors_kept_apart(model)
    for tensor in chain(model.parameters(), model.buffers()):
        if id(tensor) not in local:
            dist.broadcast(tensor.detach(), 0)


def move(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in its mappings, lists and tuples on `device`; other values as they are."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(move(value, device) for value in batch)
    return batch


def share(batch: T, index: int, accumulate: int) -> tuple[T, float] | None:
    """Rows of a step's micro-batch number `index` that this process computes, and their share of all its rows.

    None where another process computes it.

    Raises ValueError when rows must be shared out and there are too few, or the tensors have no common number of rows.
    """
    count = processes()
    if count == 1:
        return batch, 1.0
    if accumulate % count == 0:
        return (batch, 1.0) if index % count == rank() else None
    rows = {len(tensor) for tensor in _tensors(batch) if tensor.dim()}
    if len(rows) != 1 or min(rows) < count:
        raise ValueError(
            f"a batch whose tensors have {sorted(rows) or 'no'} rows cannot be shared out among {count} processes: "
            f"give batches of at least {count} rows, the same for all tensors, or accumulate a multiple of {count}"
        )
    total = rows.pop()
    part = slice(total * rank() // count, total * (rank() + 1) // count)
    return _rows(batch, total, part), (part.stop - part.start) / total


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _rows(batch: Any, total: int, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _rows(value, total, part) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_rows(value, total, part) for value in batch))
    if type(batch) in (list, tuple):
        if len(batch) == total and not any(True for _ in _tensors(batch)):  # texts, one a row
            return batch[part]
        return type(batch)(_rows(value, total, part) for value in batch)
    return batch


def totals(*numbers: Any) -> list[Any]:
    """Sum of each number over all processes, in float64: floats for floats, tensors on a GPU for tensors."""
    if processes() == 1:
        return list(numbers)
    on_device = [number for number in numbers if isinstance(number, Tensor) and number.device.type != "cpu"]
    device = on_device[0].device if on_device else torch.device("cpu")
    stacked = torch.stack([torch.as_tensor(n, dtype=torch.float64).detach().to(device) for n in numbers])
    dist.all_reduce(stacked)
    return list(stacked.unbind()) if on_device else stacked.tolist()


def any_process(condition: bool) -> bool:
    """Whether the condition holds in any process."""
    out: bool = totals(float(condition))[0] > 0
    return out


@torch.no_grad()
def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes.

    A parameter that took part elsewhere only (an expert without tokens here) counts as zero here.
    """
    if processes() == 1 or not parameters:
        return
    here = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    anywhere = here.clone()
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter, used in zip(parameters, anywhere.tolist(), strict=True):
        if used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            kinds.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
    for gradients in kinds.values():
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for gradient in gradients:
        if bucket and held + gradient.numel() > BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += gradient.numel()
    if bucket:
        yield bucket


@contextmanager
def rank_local_draws() -> Iterator[None]:
    """Give each process random draws of its own inside the block (dropout), and restore the generator afterwards.

    What is drawn after the block (the order of batches, say) is then the same in all processes.
    """
    if processes() == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))  # the same everywhere, and another one each time
    cpu = torch.get_rng_state()
    torch.manual_seed(seed + rank())
    try:
        yield
    finally:
        torch.set_rng_state(cpu)


def wait() -> None:
    """Wait until all processes have called this."""
    totals(0.0)
