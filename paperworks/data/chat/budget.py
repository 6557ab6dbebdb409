"""How much an untrusted chat template may do: every value it makes is weighed, every iteration and call is counted."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

Value = TypeVar("Value")

LARGEST_VALUE = 1 << 24  # weight of one value: characters of text, and 64 for each element of a list or dict
WORK = 1 << 26  # weight of all values made in one rendering, beside 64 times that of the conversation
STEPS = 1 << 18  # loop iterations, calls, filters, comparisons
SECONDS = 5.0
_ELEMENT = 64


class Exhausted(Exception):
    """A template used up one of its limits."""


@dataclass
class Budget:
    """What one rendering may still use."""

    work: int
    steps: int = field(default_factory=lambda: STEPS)
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    @classmethod
    def for_input(cls, given: object) -> "Budget":
        """Allow work in proportion to the conversation."""
        return cls(WORK + 64 * weight(given, 1 << 40))

    def spend(self, amount: int) -> None:
        """Take from the work allowed; raises Exhausted when it is used up."""
        self.work -= amount
        if self.work < 0:
            raise Exhausted("it builds too much text")

    def step(self) -> None:
        """Count one step and look at the clock; raises Exhausted beyond either limit."""
        self.steps -= 1
        if self.steps < 0:
            raise Exhausted(f"it takes more than {STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise Exhausted(f"it runs for more than {SECONDS:g} seconds")


_budget: ContextVar[Budget | None] = ContextVar("chat_template_budget", default=None)


@contextmanager
def spending(budget: Budget) -> Iterator[Budget]:
    """Make `budget` the one that the sandbox takes from."""
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


def current() -> Budget:
    """The budget of the rendering under way."""
    return _budget.get() or Budget(WORK)


def weight(value: object, limit: int = LARGEST_VALUE) -> int:
    """Estimate the size of a value with all it contains, counting shared parts each time; stops beyond `limit`."""
    total = 0
    waiting = [value]
    while waiting and total <= limit:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += _ELEMENT * len(item)
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            total += _ELEMENT * len(item)
            waiting += item
        elif isinstance(item, int):
            total += item.bit_length() // 8
    return total


def allow(size: int) -> None:
    """Refuse to make a value of this weight if that is too large; for what could not be weighed once it is made."""
    if size > LARGEST_VALUE:
        raise Exhausted("it builds a value that is too large")


def weighed(value: Value) -> Value:
    """Pass a value on if it is not too large, and count it."""
    size = weight(value)
    allow(size)
    current().spend(size)
    return value


def stepped(value: Value) -> Value:
    """Pass a value on and count a step."""
    current().step()
    return value


def counted(values: Iterable[Value]) -> Iterator[Value]:
    """Count a step for each value that is taken."""
    for value in values:
        current().step()
        yield value
