"""The errors every room shares, and the sentence that names the nearest known name."""

from collections.abc import Iterable
from difflib import get_close_matches


class AssetUnavailable(RuntimeError):
    """A weight file or data set that cannot be had on this machine now; the message says how to provide it."""


class CorruptFile(ValueError):
    """A file that is truncated, damaged or hostile; the message says what is wrong with it and where."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names closest to `name`, best first; substrings count as close."""
    options = list(known)
    lowered = {option.lower(): option for option in options}
    close = [lowered[match] for match in get_close_matches(name.lower(), list(lowered), n=most, cutoff=0.5)]
    if len(name) >= 3:
        close += [option for option in options if name.lower() in option.lower() and option not in close]
    return close[:most]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Compose "unknown preset 'lama'; did you mean 'llama-7b'? Known: ..." for an error message."""
    options = sorted(known)
    close = nearest(name, options)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    listing = ", ".join(options[:12]) + (f", ... ({len(options)} in all)" if len(options) > 12 else "")
    return f"unknown {kind} {name!r}{hint} Known: {listing or 'none'}"
