"""Learning-rate range test (Smith 2015, arXiv:1506.01186): one short sweep, and the model as it was afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.train.batches import Batches, Stateful
from paperworks.train.loop import fit
from paperworks.train.objective import Loss
from paperworks.train.optim.schedules import Schedule
from paperworks.train.runs import randomness
from paperworks.train.settings import Settings
from paperworks.train.step_log import Diverged

# The sweep ends when the loss stands this many times as far above its lowest as it began: nothing is learned beyond.
EXPLODED = 4.0


@dataclass(frozen=True, kw_only=True)
class RateSweep:
    """What `find_lr` measured.

    rates: learning rate of each step.
    losses: loss of each step, before its update; as many as `rates`.
    limit: rate at which the (median-smoothed) loss is lowest; above it the loss rises. Where it is the last of the
        rates, the sweep did not reach the limit.
    suggestion: rate at which the smoothed loss falls most steeply over log(rate), at most half of `limit`.
    """

    rates: list[float]
    losses: list[float]
    limit: float
    suggestion: float


def find_lr(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    settings: Settings | None = None,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
) -> RateSweep:
    """Sweep the learning rate from `low` to `high`, by equal factors, over `steps` steps of the run that is planned.

    The model's parameters, buffers, gradients and modes, the global random generators, and the place of batches that
    have one are put back bit for bit afterwards. The sweep ends early when the loss explodes.

    model, loss, batches: as for `fit`.
    settings: of the run that is planned, with its optimizer and groups; steps, lr, schedule and warm-up are not used.

    Raises ValueError for rates that do not rise, fewer than 10 steps, or sharded training.
    """
    settings = settings or Settings()
    if not 0 < low < high < math.inf:
        raise ValueError(f"low is {low!r} and high is {high!r}; 0 < low < high is needed")
    if steps < 10:
        raise ValueError(f"steps is {steps}; at least 10 are needed to see the loss fall and rise")
    if settings.sharded:
        raise ValueError("a sharded model cannot be put back as it was: sweep with sharded=False, in one process")
    sweep = replace(
        settings, steps=steps, lr=high, schedule=_Exponential(low / high), warmup=0, min_lr=0.0, seed=settings.seed,
        log_every=1, evaluate_every=None, save_every=None, progress=False,
    )  # fmt: skip
    records: list[dict[str, Any]] = []

    def exploded(step: int) -> bool:
        losses = [record["loss"] for record in records]
        if len(losses) < 2:
            return False
        lowest = min(losses)
        out: bool = losses[-1] - lowest > EXPLODED * max(losses[0] - lowest, 0.1 * abs(losses[0]))
        return out

    with _restored(model), _restored_place(batches), randomness.undisturbed(), suppress(Diverged):
        fit(model, loss, batches, sweep, on_step=exploded, callbacks=[records.append])
    rates = [high * sweep.factor(index) for index in range(len(records))]
    return _summary(rates, [record["loss"] for record in records])


@dataclass(frozen=True)
class _Exponential(Schedule):
    """start^(1 - step / (steps - 1)): from `start` to 1 by equal factors."""

    start: float

    def __call__(self, step: int, steps: int) -> float:
        """Height of the curve."""
        out: float = self.start ** (1 - step / (steps - 1))
        return out


def _summary(rates: list[float], losses: list[float]) -> RateSweep:
    if len(losses) < 3:
        raise ValueError(
            f"the loss was not finite after {len(losses)} steps at rates up to {max(rates, default=0):.1e}: lower `low`"
        )
    smooth = _smoothed(losses)
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    limit = rates[lowest]
    below = [index for index in range(1, lowest + 1) if rates[index] <= limit / 2]
    steepest = min(below, key=lambda index: smooth[index] - smooth[index - 1], default=0)
    return RateSweep(rates=rates, losses=losses, limit=limit, suggestion=rates[steepest])


def _smoothed(losses: list[float]) -> list[float]:
    """Median over a centred window of about a twentieth of the steps: a noisy batch is ignored, an edge is kept."""
    reach = len(losses) // 40
    return [median(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put parameters, buffers and gradients back afterwards: the same objects, with the numbers and device they had."""
    parameters = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before, gradient in parameters:
                if parameter.device != before.device:
                    parameter.data = before
                else:
                    parameter.copy_(before)
                parameter.grad = gradient
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                buffer.copy_(before)


@contextmanager
def _restored_place(batches: Any) -> Iterator[None]:
    before = batches.state_dict() if isinstance(batches, Stateful) else None
    try:
        yield
    finally:
        if before is not None:
            batches.load_state_dict(before)
