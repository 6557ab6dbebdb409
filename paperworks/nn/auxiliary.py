"""Auxiliary losses: a part says what else should be small (routing balance, for one), the training loop collects it.

A part's `forward` calls `add`; its return value stays what its contract says. Nothing is kept, and nothing is
computed for the sake of it, unless somebody further up the call stack stands inside `collecting`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Collected:
    """The auxiliary losses of one forward pass, by name; each is already weighted by the part that added it."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[Tensor]] = {}

    def total(self) -> Float[Tensor, ""] | None:
        """Sum everything collected; None when no part added anything."""
        values = [value for added in self.by_name.values() for value in added]
        if not values:
            return None
        total = values[0]
        for value in values[1:]:
            total = total + value.to(total.device)
        return total

    def sums(self) -> dict[str, Float[Tensor, ""]]:
        """One detached sum a name, for the log: layers that share a name are one quantity."""
        return {name: sum(value.detach() for value in added) for name, added in self.by_name.items()}  # type: ignore[misc]


_collector: ContextVar[Collected | None] = ContextVar("auxiliary losses", default=None)


def add(value: Float[Tensor, ""], name: str) -> None:
    """Hand a scalar loss, a mean over the tokens of this forward and weighted as it should enter the objective.

    Raises ValueError when `value` is not a scalar.
    """
    collected = _collector.get()
    if collected is None:
        return
    if value.dim() != 0:
        raise ValueError(f"auxiliary loss {name!r} has shape {tuple(value.shape)}; reduce it to a scalar first")
    collected.by_name.setdefault(name, []).append(value)


_real: ContextVar[Tensor | None] = ContextVar("tokens that are no padding", default=None)


@contextmanager
def counting(segments: Int[Tensor, "batch time"] | None) -> Iterator[None]:
    """Say, for the parts that run inside this block, which tokens are padding (segment 0) and count for no loss."""
    if segments is None:
        yield
        return
    token = _real.set(segments > 0)
    try:
        yield
    finally:
        _real.reset(token)


def real_tokens(count: int) -> Bool[Tensor, " tokens"] | None:
    """Which of `count` tokens (batch and time flattened) are no padding; None: all, as far as anybody said."""
    real = _real.get()
    return None if real is None or real.numel() != count else real.flatten()


@contextmanager
def collecting() -> Iterator[Collected]:
    """Collect what parts add inside this block; of nested blocks the innermost receives.

    Close it before `backward`: activation checkpointing runs `forward` again there, which must not count twice.
    """
    collected = Collected()
    token = _collector.set(collected)
    try:
        yield collected
    finally:
        _collector.reset(token)
