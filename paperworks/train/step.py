"""One optimizer step: micro-batches forward and backward, one division by their count, clipping, the update."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

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

# A loss scale that halves this often in a row has fallen from 2^16 to 2^-14: no gradient is that large, it is broken.
SKIPPED_IN_A_ROW = 30


class Diverged(ArithmeticError):
    """A loss, gradient or weight is not finite; the weights are those before the step that the message names."""


class Taken(NamedTuple):
    """A step as seen from outside: numbers only."""

    step: int
    loss: float
    elements: float  # tokens, where the loss counts them, else items
    grad_norm: float


class Place(NamedTuple):
    """Where a step stands: its number, counted from 1, and its last batch."""

    step: int
    epoch: int
    batch: int

    def __str__(self) -> str:
        return f"step {self.step}, batch {self.batch} of epoch {self.epoch} (batch and epoch counted from 0)"


class _Pending(NamedTuple):
    place: Place
    items: int
    seen: Any  # loss sum, count, gradient norm: three floats, or one tensor still on its device


class Stepper:
    """Takes steps, and knows whether they were sound.

    On a CPU each loss and gradient is looked at before the update. Elsewhere looking would make the processor wait for
    the device at every step, so optimizers that can leave out an update on the device (torch's fused ones) are told
    there whether to, from the first unsound step on, and `look` reads the numbers of several steps at once. In both
    cases the weights stay those before the unsound step.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: Optimizer, settings: Settings, device: torch.device
    ) -> None:
        self.model, self.loss, self.optimizer, self.settings, self.device = model, loss, optimizer, settings, device
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        apart = processes.tensors_kept_apart(model)
        self._own = [parameter for parameter in self.parameters if id(parameter) in apart]
        self._common = [parameter for parameter in self.parameters if id(parameter) not in apart]
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.deferred = (
            device.type == "cuda"
            and not self.scaler.is_enabled()
            and getattr(optimizer, "_step_supports_amp_scaling", False)
        )
        self._uniform = len({(parameter.device, parameter.dtype) for parameter in self.parameters}) == 1
        self.counted = False
        self.metrics = Tally()
        self._autocast = self._make_autocast()
        self._alone = distribution.processes() == 1
        self._skipped = 0
        self._items = 0
        self._pending: list[_Pending] = []
        self._unsound: Tensor | None = None

    def _make_autocast(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return nullcontext()
        dtype = getattr(torch, self.settings.precision)
        return torch.autocast(self.device.type, dtype)

    def _products(self) -> AbstractContextManager[Any]:
        """Half-precision products at float32's speed, on processors that have no instructions for them."""
        if self.settings.precision == "float32" or self.device.type != "cpu":
            return nullcontext()
        return half_precision.products_in_float32(getattr(torch, self.settings.precision))

    def rate(self, step: int) -> float:
        """Set the learning rate of every group for `step` and return that of the first."""
        factor = self.settings.factor(step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor
        return self.peaks[0] * factor

    def take(self, source: Source, step: int) -> None:
        """Take step number `step` (counted from 1) on the next `accumulate` micro-batches."""
        self.metrics = Tally()
        self._items = 0
        loss: Any = 0.0
        count: Any = 0.0
        for index in range(self.settings.accumulate):
            part = distribution.share(source.next(), index, self.settings.accumulate)
            place = Place(step, source.epoch, source.position - 1)
            if part is None:
                continue
            with processes.one_batch(part[1] < 1):
                value = self._gradient(*part, place)
            loss, count = loss + value.sum, count + value.elements
        if not self._alone and self.deferred:
            loss, count, self._items = distribution.totals(loss, count, self._items)
        self._update(loss, count, place)
        for parameter in self.parameters:
            parameter.grad = None

    def _gradient(self, batch: Any, share: float, place: Place) -> Value:
        """Add the gradient of one micro-batch, or this process's share of it; return its value.

        It is floats, over all processes, where looking costs nothing.
        """
        if self.device.type != "cpu":
            batch = distribution.move(batch, self.device)
        with self._autocast, self._products(), distribution.drawing_apart(), auxiliary.collecting() as collected:
            value = objective.read(self.loss(self.model, batch))
            extra = collected.total()
        objective.require_gradient(value.sum)
        self.counted = value.counted
        items = 0 if value.counted else objective.items(batch)
        if not value.counted and share < 1:
            value = value._replace(sum=value.sum * share, elements=share)
        goal = value.sum if extra is None else value.sum + extra * value.elements
        own, value = value, self._look_early(value, items, place)
        if extra is not None:
            parts = {f"auxiliary/{name}": part for name, part in collected.sums().items()}
            self.metrics.add_metrics(parts, own.elements)
        if value.metrics:
            self.metrics.add_metrics(value.metrics, own.elements)
        if self._alone and self.settings.accumulate == 1 and value.counted:
            goal = goal / value.elements  # cheaper than dividing every gradient
        with self._products():
            self.scaler.scale(goal).backward()
        return value

    def _look_early(self, value: Value, items: int, place: Place) -> Value:
        if self.deferred:
            self._items += items
            wide = value.sum.detach()
            return value._replace(sum=wide if wide.dtype == torch.float64 else wide.float())
        # a loss that is not finite in one process is so in the sum, and all stop at the same place
        loss, count, items = distribution.totals(value.sum.item(), float(value.elements), items)
        self._items += int(items)
        if not math.isfinite(loss):
            self._forget()
            raise Diverged(f"the loss is {loss} at {place}; {_ADVICE}")
        if count == 0 and self.settings.accumulate == 1:
            self._forget()
            raise ValueError(_nothing_counted(place))
        return value._replace(sum=loss, elements=count)

    def _update(self, loss: Any, count: Any, place: Place) -> None:
        if not self.deferred and count == 0:
            self._forget()
            raise ValueError(_nothing_counted(place))
        if not self.settings.sharded:
            distribution.add_gradients(self._common)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = _coalesced(parameter.grad)  # a row that several elements touched is one row
        gradients = [_numbers(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        if not gradients:
            raise ValueError(
                f"no parameter that is optimized got a gradient at {place}: the loss depends on other parameters only"
            )
        if self.settings.accumulate > 1 or not self._alone:
            for gradient in gradients:
                sharding.local(gradient).div_(count)
        norm = self._norm(gradients)
        if self.deferred:
            self._update_blindly(loss, count, norm, place)
        else:
            self._update_openly(loss, count, norm, place)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of all gradients together: on one device, a third of the time of torch's for small models."""
        if self._own:
            return self._norm_of_everybodys()
        if not self._alone:
            return sharding.whole(torch.nn.utils.get_total_norm(gradients))
        if self._uniform:
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return torch.nn.utils.get_total_norm(gradients)

    def _norm_of_everybodys(self) -> Tensor:
        """Return the norm over the parameters of all processes: what each keeps for itself, and what is common."""
        own, common = (
            torch.nn.utils.get_total_norm([_numbers(p.grad) for p in some if p.grad is not None])
            for some in (self._own, self._common)
        )
        (squares,) = distribution.totals(own.square())
        norm: Tensor = (common.square() + squares).sqrt()
        return norm.to(common.dtype)

    def _clip(self, norm: Tensor) -> None:
        """Scale all gradients by min(1, clip / (norm + 1e-6)), as torch does; here also shares of them."""
        assert self.settings.clip is not None
        gradients = [sharding.local(_numbers(p.grad)) for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, torch.clamp(self.settings.clip / (norm + 1e-6), max=1.0))

    def _update_openly(self, loss: float, count: float, norm: Tensor, place: Place) -> None:
        length, clip = norm.item(), self.settings.clip
        if math.isfinite(length):
            self._skipped = 0
            # Torch scales by min(1, clip / (norm + 1e-6)): where that is exactly 1, spare the passage over memory.
            if clip is not None and length + 2e-6 > clip:
                self._clip(norm)
        else:
            self._skipped += 1
            if not self.scaler.is_enabled() or self._skipped > SKIPPED_IN_A_ROW:
                self._forget()
                raise Diverged(f"the norm of the gradient is {length} at {place}; {_ADVICE}")
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self._pending.append(_Pending(place, self._items, (loss, count, length)))

    def _update_blindly(self, loss: Tensor, count: Any, norm: Tensor, place: Place) -> None:
        seen = torch.stack([torch.as_tensor(each, dtype=torch.float64).to(norm.device) for each in (loss, count, norm)])
        sound = seen.isfinite().all() & (seen[1] > 0)
        self._unsound = ~sound if self._unsound is None else self._unsound | ~sound
        if self.settings.clip is not None:
            self._clip(norm)
        optimizer: Any = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, self._unsound.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        self._pending.append(_Pending(place, self._items, seen))

    def look(self) -> list[Taken]:
        """Return the steps taken since the last look. Raises Diverged, or ValueError, for the first unsound one."""
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        taken = []
        seen = torch.stack([each.seen for each in pending]).tolist() if self.deferred else [p.seen for p in pending]
        for each, (loss, count, norm) in zip(pending, seen, strict=True):
            if self.deferred:
                _require_sound(loss, count, norm, each.place)
            taken.append(Taken(each.place.step, loss / count, count if self.counted else float(each.items), norm))
        return taken

    def measured(self) -> dict[str, float]:
        """Return the means of the last step's metrics, over all processes."""
        names = sorted(self.metrics.sums)
        flat = distribution.totals(*(number for name in names for number in self.metrics.sums[name])) if names else []
        tally = Tally()
        for index, name in enumerate(names):
            tally.add(name, flat[2 * index], flat[2 * index + 1])
        return {name: tally.means()[name] for name in self.metrics.sums}

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _coalesced(gradient: Tensor) -> Tensor:
    """Return a sparse gradient that has each row once; autograd forgets of one that has them that it does."""
    rows = gradient._indices()
    if len(rows) == 1 and bool((rows[0, 1:] > rows[0, :-1]).all()):
        return gradient._coalesced_(True)
    return gradient.coalesce()


def _numbers(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient as a dense tensor that shares its memory: of a sparse one, the rows it has."""
    return gradient.values() if gradient.is_sparse else gradient


_ADVICE = (
    "the weights are those before this step. Lower lr, clip the gradient, lengthen the warm-up, "
    "or look at this batch for values that are not finite"
)


def _nothing_counted(place: Place) -> str:
    return f"the loss counted 0 elements at {place}: every target is masked or padding; leave such batches out"


def _require_sound(loss: float, count: float, norm: float, place: Place) -> None:
    if count == 0:
        raise ValueError(_nothing_counted(place))
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at {place}; {_ADVICE}")
    if not math.isfinite(norm):
        raise Diverged(f"the norm of the gradient is {norm} at {place}; {_ADVICE}")
