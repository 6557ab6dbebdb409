"""Runs the usage of a paper: the few lines that apply it to a real model through the public API."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol


class HasUsage(Protocol):
    """A paper, or what the index says about one."""

    @property
    def key(self) -> str:
        """The paper's key."""

    @property
    def usage(self) -> str:
        """Python source."""


def run_usage(paper: HasUsage) -> dict[str, Any]:
    """Run a paper's usage in a namespace of its own, in a temporary folder; returns the names it defined.

    Raises ValueError where there is no usage, and what the code raises, with the paper's key in a note.
    """
    source = paper.usage.strip()
    if not source:
        raise ValueError(f"paper {paper.key!r} has no usage; write usage= with at most 15 lines of Python")
    namespace: dict[str, Any] = {"__name__": "usage"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="paperworks-usage-") as folder:
        os.chdir(folder)
        try:
            exec(compile(source, f"usage of {paper.key}", "exec"), namespace)
        except Exception as error:
            error.add_note(f"raised by the usage of paper {paper.key!r}")
            raise
        finally:
            os.chdir(before)
    return namespace
