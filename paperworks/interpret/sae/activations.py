"""The activation buffer: one tap of any model as shuffled batches of vectors, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperworks.core.selection import select
from paperworks.interpret.taps import record

Keep = Callable[[Any], Bool[Tensor, "batch time"]]


class Activations:
    """Batches (size, dim) of what one tap of a model gives for some inputs, shuffled across them.

    Each time it is gone through, the model runs over the inputs again. Rows wait in a buffer of `capacity`; whenever it
    is full, half of it is drawn at random. So a batch mixes rows of as many inputs as the buffer holds, and memory does
    not grow with the data. The model runs only as far as the tap, without gradients, as it is (set `eval()` before).

    Args:
        model: any module, ours or another library's.
        tap: path of the module whose output is wanted (batch, time, dim); a tap that runs twice counts the first time.
        batches: what the model is called with: tensors, mappings (keyword arguments) or tuples (arguments). A
            re-iterable or a function that returns an iterable, for more than one passage.
        size: rows of a batch.
        capacity: rows that wait.
        leave_out_first: positions left out at the start of every sequence. The first token's activations are often
            orders of magnitude larger than all others and would be all that is learned.
        read: function of the tap's output that gives vectors (batch, time, dim), where it does not: `merged_heads`.
        keep: function of an input that says which positions count, (batch, time); for padding.
        longest: rows longer than this, in units of the tap, are left out. A few tokens besides the first can be as
            large (13 of 45,568 after block 15 of SmolLM2 hold four fifths of the mean square): see `median_length`.
        factor: what every row is multiplied with; see `normalized`.
        seed: of the shuffling.

    Raises ValueError when the tap is not one module, and while going through it when the tap gives no vectors, vectors
    of changing size, or values that are not finite: which tap, which batch.
    """

    def __init__(
        self,
        model: nn.Module,
        tap: str,
        batches: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        size: int = 512,
        capacity: int = 65_536,
        leave_out_first: int = 1,
        read: Callable[[Tensor], Tensor] | None = None,
        keep: Keep | None = None,
        longest: float | None = None,
        factor: float = 1.0,
        seed: int = 0,
    ) -> None:
        if size < 1 or capacity < 2 * size:
            raise ValueError(f"capacity must hold two batches or more to shuffle; got size {size}, capacity {capacity}")
        if leave_out_first < 0:
            raise ValueError(f"leave_out_first is {leave_out_first}; a number of positions is needed")
        found = list(select(model, tap))
        if len(found) != 1:
            raise ValueError(f"an autoencoder reads one tap, {tap!r} matches {len(found)}: {', '.join(found[:4])}")
        self.model, self.tap, self.batches = model, found[0], batches
        self.size, self.capacity, self.leave_out_first = size, capacity, leave_out_first
        self.read, self.keep, self.longest = read, keep, longest
        self.factor, self.seed = factor, seed

    def __iter__(self) -> Iterator[Float[Tensor, "size dim"]]:
        """Go through all inputs once; rows that do not fill a last batch are left over."""
        generator = torch.Generator().manual_seed(self.seed)
        buffer: Tensor | None = None
        filled = 0
        for rows in self.rows():
            if buffer is None:
                buffer = rows.new_empty(self.capacity, rows.shape[1])
            while len(rows):
                part, rows = rows[: self.capacity - filled], rows[self.capacity - filled :]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                if filled == self.capacity:
                    yield from self._drawn(buffer, filled, filled - filled // 2, generator)
                    filled = self._compact(buffer, filled)
        if buffer is not None:
            yield from self._drawn(buffer, filled, filled, generator)

    def _drawn(self, buffer: Tensor, filled: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Draw `count` rows, in whole batches, and note which remain."""
        order = torch.randperm(filled, generator=generator).to(buffer.device)
        whole = count // self.size * self.size
        self._remaining = order[whole:]
        for start in range(0, whole, self.size):
            yield buffer[order[start : start + self.size]]

    def _compact(self, buffer: Tensor, filled: int) -> int:
        """Move the rows that remain to the front, into the places of rows that were drawn."""
        remaining = len(self._remaining)
        stays = self._remaining < remaining
        gone = torch.ones(remaining, dtype=torch.bool, device=buffer.device)
        gone[self._remaining[stays]] = False
        buffer[:remaining][gone] = buffer[self._remaining[~stays]]
        return remaining

    def rows(self) -> Iterator[Float[Tensor, "rows dim"]]:
        """Run the model over the inputs and give each input's rows in order, not shuffled."""
        dim: int | None = None
        batches = self.batches() if callable(self.batches) else self.batches
        for number, batch in enumerate(batches):
            value = self._run(batch)
            value = self.read(value) if self.read is not None else value
            if value.dim() < 2 or (value.dim() < 3 and (self.leave_out_first or self.keep)):
                raise ValueError(
                    f"{self.tap} gives shape {tuple(value.shape)}; (batch, time, dim) is needed, or (batch, dim) with "
                    "leave_out_first=0"
                )
            if dim is not None and value.shape[-1] != dim:
                raise ValueError(
                    f"{self.tap} gave vectors of size {dim}, and of size {value.shape[-1]} in batch {number}"
                )
            dim = value.shape[-1]
            yield self._chosen(value, batch, number) * self.factor

    def _chosen(self, value: Tensor, batch: Any, number: int) -> Tensor:
        value = value[:, self.leave_out_first :] if self.leave_out_first else value
        if self.keep is None:
            rows = value.flatten(0, -2)
        else:
            mask = self.keep(batch).to(value.device)[:, self.leave_out_first :]
            if mask.shape != value.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"keep(batch {number}) gave {mask.dtype} for positions {tuple(mask.shape)} after the first "
                    f"{self.leave_out_first}, {self.tap} has {tuple(value.shape[:2])}; bool (batch, time) is needed"
                )
            rows = value[mask]
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"the activations of {self.tap} hold NaN or infinity in batch {number} (counted from 0), row {bad} of "
                f"{len(rows)}: look at the model's input there, or compute in a wider dtype"
            )
        return rows if self.longest is None else rows[rows.norm(dim=1) <= self.longest]

    @torch.no_grad()
    def _run(self, batch: Any) -> Tensor:
        """The tap's output for one input; the model stops there."""
        with record(self.model, self.tap) as seen:
            handle = self.model.get_submodule(self.tap).register_forward_hook(_stop)
            try:
                _call(self.model, batch)
            except _Reached:
                pass
            finally:
                handle.remove()
        if self.tap not in seen:
            raise ValueError(f"the model ran, but not through {self.tap}: it has no activations there for this input")
        return seen[self.tap]

    def gather(self, rows: int) -> Float[Tensor, "rows dim"]:
        """About so many shuffled rows, in whole batches; fewer when the inputs have no more."""
        parts = []
        for batch in self:
            parts.append(batch)
            if len(parts) * self.size >= rows:
                break
        if not parts:
            raise ValueError(f"the inputs give fewer than the {self.size} rows of one batch")
        return torch.cat(parts)

    def median_length(self, rows: int = 4096) -> float:
        """The median of ||x|| over the first `rows` rows or more, in units of the tap: what is typical."""
        lengths: list[Tensor] = []
        for part in self.rows():
            lengths.append(part.norm(dim=1) / self.factor)
            if sum(map(len, lengths)) >= rows:
                break
        if not lengths:
            raise ValueError(f"{self.tap} gives no rows")
        return float(torch.cat(lengths).median())

    def mean_square(self, rows: int = 16_384) -> float:
        """The mean of ||x||^2 over the first `rows` rows or more."""
        total, count = 0.0, 0
        for part in self.rows():
            total, count = total + float(part.double().square().sum()), count + len(part)
            if count >= rows:
                break
        if not count or not total > 0:
            raise ValueError(f"{self.tap} gives no rows, or only zeros: there is no scale to bring them to")
        return total / count

    def normalized(self, mean_square: float, rows: int = 16_384) -> Activations:
        """The same activations multiplied with the one scalar that brings the mean of ||x||^2 to `mean_square`.

        One scalar for the data set, so that the autoencoder can be brought back to the model's own scale:
        `sae.rescale(1 / activations.factor)`.
        """
        scaled = copy(self)
        scaled.factor = self.factor * (mean_square / self.mean_square(rows)) ** 0.5
        return scaled


class _Reached(Exception):
    """The tap has run; nothing after it is needed."""


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Reached


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)
