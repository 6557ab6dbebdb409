"""What each step was: loss, elements, gradient norm; and whether they were finite.

On a CPU the numbers are read at every step. Reading a number of a GPU makes the processor wait for it, so there they
stay on the device, `finite` keeps the update from being applied, and `read` looks at the numbers of several steps at
once. In both cases the weights stay those before the first step that was not finite.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A loss scale that halves this often in a row has fallen from 2^16 to 2^-14: no gradient is that large, it is broken.
SKIPPED_IN_A_ROW = 30


class Diverged(ArithmeticError):
    """A loss, gradient or weight is not finite; the weights are those before the step that the message names."""


class StepResult(NamedTuple):
    """Numbers of one step."""

    step: int
    loss: float
    elements: float  # tokens, where the loss counts them, else items
    grad_norm: float


class BatchPosition(NamedTuple):
    """A micro-batch: the step that it belongs to, counted from 1; epoch and batch, counted from 0."""

    step: int
    epoch: int
    batch: int

    def __str__(self) -> str:
        return f"step {self.step}, batch {self.batch} of epoch {self.epoch} (batch and epoch counted from 0)"


class _Entry(NamedTuple):
    positions: list[BatchPosition]
    items: float | None  # None where the loss counts its elements
    numbers: list[float] | Tensor  # the loss sum of each micro-batch, then the count, then the gradient norm


class StepLog:
    """The steps since the last `read`.

    deferred: leave the numbers on their device until `read`.
    scaled: gradients of a step may overflow (float16 with a loss scale); such steps are left out, not errors.
    """

    def __init__(self, deferred: bool, scaled: bool) -> None:
        self.deferred, self.scaled = deferred, scaled
        self._entries: list[_Entry] = []
        self._finite: Tensor | None = None  # whether all steps so far were, on the device
        self._skipped = 0

    def add(
        self, positions: list[BatchPosition], losses: list[Any], count: Any, items: float | None, norm: Tensor
    ) -> bool | Tensor:
        """Record a step; whether its update is to be applied: a bool, or where deferred a bool tensor on the device.

        Raises Diverged, or ValueError where nothing was counted, unless deferred.
        """
        if self.deferred:
            numbers = _on_device(losses, count, norm)
            finite = numbers.isfinite().all() & (numbers[-2] > 0)
            self._finite = finite if self._finite is None else self._finite & finite
            self._entries.append(_Entry(positions, items, numbers))
            return self._finite
        entry = _Entry(positions, items, [*(float(loss) for loss in losses), float(count), norm.item()])
        _require_finite(entry.positions, entry.numbers, overflow=self.scaled)
        self._entries.append(entry)
        return self._has_finite_gradient(entry)

    def _has_finite_gradient(self, entry: _Entry) -> bool:
        if math.isfinite(entry.numbers[-1]):
            self._skipped = 0
            return True
        self._skipped += 1
        if self._skipped > SKIPPED_IN_A_ROW:
            _require_finite(entry.positions, entry.numbers, overflow=False)
        return False

    def read(self) -> list[StepResult]:
        """Results of the steps since the last call. Raises as `add` for the first that is not finite."""
        entries, self._entries = self._entries, []
        if self.deferred and entries:
            widths = [len(entry.numbers) for entry in entries]
            flat = torch.cat([entry.numbers for entry in entries]).cpu()  # type: ignore[misc]
            entries = [e._replace(numbers=n.tolist()) for e, n in zip(entries, flat.split(widths), strict=True)]
        results = []
        for positions, items, numbers in entries:
            if self.deferred:
                _require_finite(positions, numbers, overflow=False)
            *losses, count, norm = numbers
            elements = count if items is None else items
            results.append(StepResult(positions[-1].step, sum(losses, 0.0) / count, elements, norm))
        return results


def _on_device(losses: list[Any], count: Any, norm: Tensor) -> Tensor:
    numbers = [torch.as_tensor(each, dtype=torch.float64).to(norm.device) for each in (*losses, count, norm)]
    return torch.stack(numbers)


def _require_finite(positions: list[BatchPosition], numbers: list[float] | Tensor, overflow: bool) -> None:
    *losses, count, norm = numbers
    for position, loss in zip(positions, losses, strict=True):
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at {position}; {_ADVICE}")
    if count == 0:
        raise ValueError(
            f"the loss counted 0 elements at {positions[-1]}: every target is masked or padding; leave such batches out"
        )
    if not math.isfinite(norm) and not overflow:
        raise Diverged(f"the norm of the gradient is {norm} at {positions[-1]}; {_ADVICE}")


_ADVICE = (
    "the weights are those before this step. Lower lr, clip the gradient, lengthen the warm-up, "
    "or look at this batch for values that are not finite"
)
