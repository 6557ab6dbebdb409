"""One optimizer step. `Stepper.take` is the whole of it, in the order in which things happen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paperworks.core import processes
from paperworks.kernels import half_precision
from paperworks.nn import auxiliary
from paperworks.train import objective
from paperworks.train.batches import Source
from paperworks.train.distributed import distribution, sharding
from paperworks.train.objective import Loss, Tally, Value
from paperworks.train.settings import Settings
from paperworks.train.step_log import BatchPosition, StepLog


class Stepper:
    """Takes the steps of one run.

    rate: learning rate of the newest step, of the first parameter group.
    counted: whether the loss counts its elements (tokens), or is a mean over items.
    metrics: sums of the newest step's metrics.
    log: what the steps were.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: Optimizer, settings: Settings, device: torch.device
    ) -> None:
        self.model, self.loss, self.optimizer, self.settings, self.device = model, loss, optimizer, settings, device
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        local = processes.tensors_kept_apart(model)
        self._rank_local = [parameter for parameter in self.parameters if id(parameter) in local]
        self._shared = [parameter for parameter in self.parameters if id(parameter) not in local]
        self._uniform = len({(parameter.device, parameter.dtype) for parameter in self.parameters}) == 1
        self._alone = distribution.processes() == 1
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.rate = self.peaks[0]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        scaled = self.scaler.is_enabled()
        can_skip_on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))  # torch's fused ones
        self.log = StepLog(device.type == "cuda" and not scaled and can_skip_on_device, scaled)
        self.counted = False
        self.metrics = Tally()
        self._autocast = nullcontext() if settings.precision == "float32" else self._make_autocast()

    def take(self, source: Source, number: int) -> None:
        """Take step `number` (from 1) on the next `accumulate` micro-batches.

        Raises Diverged where a loss or gradient is not finite, ValueError where there is nothing to learn from: at once
        on a CPU, elsewhere in `log.read`. The weights are those before the step then.
        """
        self.metrics = Tally()
        positions: list[BatchPosition] = []
        losses: list[Any] = []
        count: Any = 0.0
        items = 0
        try:
            # 1. Forward and backward of each micro-batch: gradients of summed losses add up.
            for index in range(self.settings.accumulate):
                batch = source.next()
                positions.append(BatchPosition(number, source.epoch, source.position - 1))
                part = distribution.share(batch, index, self.settings.accumulate)
                if part is None:  # another process computes it
                    losses.append(0.0)
                    continue
                batch, share = part
                with processes.one_batch(share < 1):
                    value, extra = self._forward(batch, share)
                    self._backward(value, extra)
                losses.append(value.sum.detach())
                count = count + value.elements
                items += 0 if value.counted else objective.items(batch)

            # 2. Sums over all processes, then one division by the elements of all of them.
            if not self._alone:
                *losses, count, items = distribution.totals(*losses, count, items)
            gradients = self._summed_gradients(positions[-1])
            if self.settings.accumulate > 1 or not self._alone:
                for gradient in gradients:
                    sharding.local(gradient).div_(count)

            # 3. Clipping.
            norm = self._norm(gradients)
            if self.settings.clip is not None:
                _clip(gradients, norm, self.settings.clip)

            # 4. The update at this step's rate, unless a number is not finite.
            self._set_rate(number - 1)
            finite = self.log.add(positions, losses, count, None if self.counted else items, norm)
            self._update(finite)
        finally:
            for parameter in self.parameters:
                parameter.grad = None

    def _forward(self, batch: Any, share: float) -> tuple[Value, Tensor | None]:
        """Loss of one micro-batch (or of this process's share of its rows), and the auxiliary losses."""
        if self.device.type != "cpu":
            batch = distribution.move(batch, self.device)
        with self._autocast, self._products(), distribution.rank_local_draws(), auxiliary.collecting() as collected:
            value = objective.read(self.loss(self.model, batch))
            extra = collected.total()
        objective.require_gradient(value.sum)
        self.counted = value.counted
        if not value.counted and share < 1:
            value = value._replace(sum=value.sum * share, elements=share)
        if extra is not None:
            named = {f"auxiliary/{name}": part for name, part in collected.sums().items()}
            self.metrics.add_metrics(named, value.elements)
        if value.metrics:
            self.metrics.add_metrics(value.metrics, value.elements)
        return value, extra

    def _backward(self, value: Value, extra: Tensor | None) -> None:
        """Add the gradients of the loss sum and of `elements` times the auxiliary losses."""
        total = value.sum if extra is None else value.sum + extra * value.elements
        if self._alone and self.settings.accumulate == 1 and value.counted:
            total = total / value.elements  # cheaper than dividing every gradient
        with self._products():
            self.scaler.scale(total).backward()

    def _summed_gradients(self, position: BatchPosition) -> list[Tensor]:
        """Gradients over all processes, without a loss scale; of sparse ones the rows they have, dense."""
        if not self.settings.sharded:  # FSDP has summed them
            distribution.add_gradients(self._shared)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = _coalesced(parameter.grad)  # a row that several elements touched is one row
        gradients = [_values(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        if not gradients:
            raise ValueError(
                f"no parameter that is optimized got a gradient at {position}: the loss depends on other parameters "
                "only"
            )
        return gradients

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Euclidean norm of all gradients together, over all processes."""
        if self._rank_local:
            local, shared = (
                torch.nn.utils.get_total_norm([_values(p.grad) for p in some if p.grad is not None])
                for some in (self._rank_local, self._shared)
            )
            (squares,) = distribution.totals(local.square())
            norm: Tensor = (shared.square() + squares).sqrt()
            return norm.to(shared.dtype)
        if not self._alone:
            return sharding.whole(torch.nn.utils.get_total_norm(gradients))
        if self._uniform:  # a third of the time of torch's function for small models
            out: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            return out
        return torch.nn.utils.get_total_norm(gradients)

    def _set_rate(self, step: int) -> None:
        """Set the learning rate of every group for `step`, counted from 0."""
        factor = self.settings.factor(step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor
        self.rate = self.peaks[0] * factor

    def _update(self, finite: bool | Tensor) -> None:
        """Update the weights where `finite`; a tensor is left on its device, whose kernel obeys it."""
        optimizer: Any = self.optimizer
        if isinstance(finite, Tensor):
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif finite:
            self.scaler.step(optimizer)  # without a loss scale, just optimizer.step()
        self.scaler.update()

    def measured(self) -> dict[str, float]:
        """Means of the newest step's metrics, over all processes."""
        names = sorted(self.metrics.sums)
        flat = distribution.totals(*(number for name in names for number in self.metrics.sums[name])) if names else []
        tally = Tally()
        for index, name in enumerate(names):
            tally.add(name, flat[2 * index], flat[2 * index + 1])
        return {name: tally.means()[name] for name in self.metrics.sums}

    def _make_autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, getattr(torch, self.settings.precision))

    def _products(self) -> AbstractContextManager[Any]:
        """Half-precision products at float32's speed, on processors that have no instructions for them."""
        if self.settings.precision == "float32" or self.device.type != "cpu":
            return nullcontext()
        return half_precision.products_in_float32(getattr(torch, self.settings.precision))


def _clip(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients by min(1, limit / (norm + 1e-6)), as torch does; here also shares of them."""
    if norm.device.type == "cpu" and norm.item() + 2e-6 <= limit:
        return  # the factor is exactly 1: spare the passage over memory
    torch._foreach_mul_([sharding.local(g) for g in gradients], torch.clamp(limit / (norm + 1e-6), max=1.0))


def _coalesced(gradient: Tensor) -> Tensor:
    """Sparse gradient that has each row once; autograd does not mark one that has them sorted as coalesced."""
    rows = gradient._indices()
    if len(rows) == 1 and bool((rows[0, 1:] > rows[0, :-1]).all()):
        return gradient._coalesced_(True)
    return gradient.coalesce()


def _values(gradient: Tensor) -> Tensor:
    """Numbers of a gradient as a dense tensor that shares its memory: of a sparse one, the rows it has."""
    return gradient.values() if gradient.is_sparse else gradient
