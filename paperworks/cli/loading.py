"""Loads the model a command was given."""

from __future__ import annotations

import sys
from typing import Any


def load_model(name: str) -> Any:
    """Load a model by name or path; what goes wrong with the name becomes a ValueError in plain words."""
    import paperworks as pw

    if sys.stderr.isatty():
        print(f"loading {name} ...", end="\r", file=sys.stderr, flush=True)
    try:
        return pw.load(name)
    except KeyError as error:
        raise ValueError(str(error.args[0]) if error.args else f"cannot load {name!r}") from error
    finally:
        if sys.stderr.isatty():
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)
