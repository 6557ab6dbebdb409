"""What may stand in a result: finite numbers, booleans, strings and lists of them."""

import math
from collections.abc import Mapping

Value = bool | int | float | str | list["Value"]


def plain_value(value: object, name: str) -> Value:
    """`value` as plain Python (NumPy and torch scalars are unwrapped, tuples and arrays become lists).

    Raises ValueError for NaN and infinity, TypeError for anything else that JSON cannot hold faithfully.
    """
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name!r} is {value}; a result holds finite numbers only (was there a division by zero?)")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain_value(element, f"{name}[{index}]") for index, element in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, torch tensors
        return plain_value(value.tolist(), name)
    kind = type(value).__name__
    raise TypeError(f"{name!r} is a {kind}; a result holds numbers, booleans, strings and lists of them")


def plain_values(values: Mapping[str, object]) -> dict[str, Value]:
    """A dictionary of plain values; see `plain_value`."""
    return {str(name): plain_value(value, str(name)) for name, value in values.items()}


def shown(value: Value) -> str:
    """Write a value for people: four significant digits, thousands grouped, lists with commas."""
    if isinstance(value, list):
        return ", ".join(shown(element) for element in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return value


def ordinal(number: int) -> str:
    """Write "first", "second", ... "tenth", "11th"."""
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    if 1 <= number <= len(words):
        return words[number - 1]
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
