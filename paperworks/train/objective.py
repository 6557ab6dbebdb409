"""What a loss function may return, and the exact mean over micro-batches of unequal size."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Any]

RETURNS = "a scalar tensor, (sum, count), or either followed by a dictionary of metrics"


class Value(NamedTuple):
    """The loss of one micro-batch: its sum over `elements`; `counted` is False when the loss was a plain mean."""

    sum: Tensor
    elements: float | Tensor
    metrics: Mapping[str, Any]
    counted: bool


def read(returned: Any) -> Value:
    """Read what a loss function returned.

    A scalar is the mean of a micro-batch that weighs as much as any other: count 1. A pair is (sum, count). Metrics
    come last, as a dictionary of means over the same elements, or of (sum, count) pairs of their own.
    Raises TypeError or ValueError that says what was returned instead.
    """
    if isinstance(returned, Tensor):
        return Value(_scalar(returned), 1.0, {}, False)
    if not isinstance(returned, tuple) or not 1 <= len(returned) <= 3:
        raise TypeError(f"the loss returned {type(returned).__name__}; expected {RETURNS}")
    parts = list(returned)
    metrics = parts.pop() if isinstance(parts[-1], Mapping) else {}
    if not parts or len(parts) > 2 or not isinstance(parts[0], Tensor):
        kinds = ", ".join(type(part).__name__ for part in returned)
        raise TypeError(f"the loss returned ({kinds}); expected {RETURNS}")
    if len(parts) == 1:
        return Value(_scalar(parts[0]), 1.0, metrics, False)
    return Value(_scalar(parts[0]), _count(parts[1]), metrics, True)


def _scalar(loss: Tensor) -> Tensor:
    if loss.dim() != 0:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; return a scalar: its mean, or (its sum, its count)")
    return loss


def _count(count: Any) -> float | Tensor:
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(f"the count has shape {tuple(count.shape)}; return the number of elements summed")
        single = count.detach().reshape(())
        if single.device.type != "cpu":
            return single  # reading it would wait for the device; `Tally` and the loop look at it later
    value = float(count)
    if not 0 <= value < float("inf"):
        raise ValueError(f"the count is {value}; return the number of elements summed, 0 or more")
    return value


def require_gradient(loss: Tensor) -> None:
    """Raise ValueError when `loss` depends on nothing that is trained."""
    if not loss.requires_grad:
        raise ValueError(
            "the loss carries no gradient: it depends on no trainable parameter of the model; "
            "look for .detach(), .item() or torch.no_grad() between the model and the loss"
        )


def items(batch: Any) -> int:
    """Number of examples in a batch: the length of its first tensor, else 1."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    return items(batch[0]) if isinstance(batch, tuple | list) and batch else 1


class Tally:
    """Sums and counts by name; `means` divides once, at the end. Tensors stay on their device until then."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, sum: Any, count: Any) -> None:
        """Add `sum` over `count` elements to what stands under `name`."""
        earlier = self.sums.get(name)
        self.sums[name] = (sum, count) if earlier is None else (earlier[0] + sum, earlier[1] + count)

    def add_metrics(self, metrics: Mapping[str, Any], count: float | Tensor) -> None:
        """Add a micro-batch's metrics: pairs as they are, means weighted by `count`."""
        for name, value in metrics.items():
            if isinstance(value, tuple):
                part, number = value
                self.add(name, _plain(part), _plain(number))
            else:
                self.add(name, _plain(value) * count, count)

    def means(self) -> dict[str, float]:
        """Every mean as a float; a name that counted nothing is nan."""
        totals = {name: (float(part), float(count)) for name, (part, count) in self.sums.items()}
        return {name: part / count if count else float("nan") for name, (part, count) in totals.items()}


def _plain(value: Any) -> Any:
    """Detach a tensor and widen it: sums of half-precision metrics must not saturate."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"a metric has shape {tuple(value.shape)}; return scalars")
    return value.detach().reshape(()).to(torch.float32 if value.dtype != torch.float64 else torch.float64)
