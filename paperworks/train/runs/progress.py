"""The progress bar: loss, learning rate, speed and remaining time, on a terminal only, a few times a second."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

# A person reads no faster, and drawing takes about a millisecond.
SECONDS_BETWEEN_DRAWINGS = 0.2


class Bar:
    """A progress bar that costs one look at the clock a step, and nothing when it is not shown.

    shown: None shows it when standard output is a terminal.
    """

    def __init__(self, shown: bool | None, steps: int, done: int) -> None:
        self._progress: Progress | None = None
        self._next = 0.0
        self._started, self._counted = time.monotonic(), 0.0
        if shown if shown is not None else sys.stdout.isatty():
            from rich import progress  # here, because importing it costs 0.2 s

            columns = (
                progress.TextColumn("[bold]training"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[said]}"),
            )
            times = (progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn())
            self._progress = progress.Progress(*columns, *times, auto_refresh=False)
            self._task = self._progress.add_task("training", total=steps, completed=done, said="")
            self._progress.start()

    @property
    def due(self) -> bool:
        """Whether it is shown and time to draw it again."""
        return self._progress is not None and time.monotonic() >= self._next

    def draw(self, done: int, loss: float, rate: float, counted: float, unit: str) -> None:
        """Draw it: `done` steps, the last known loss, the learning rate, and `counted` more tokens or items."""
        if self._progress is None:
            return
        self._counted += counted
        now = time.monotonic()
        self._next = now + SECONDS_BETWEEN_DRAWINGS
        speed = self._counted / max(now - self._started, 1e-9)
        said = f"loss {loss:.4g}  lr {rate:.2e}  {speed:,.0f} {unit}/s"
        self._progress.update(self._task, completed=done, said=said)
        self._progress.refresh()

    def close(self) -> None:
        """Stop drawing."""
        if self._progress is not None:
            self._progress.stop()
