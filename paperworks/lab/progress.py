"""One board of progress for a run: an overall bar with the remaining time, and a bar for the loop at work now."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# Of a terminal, by verdict.
VERDICT_COLORS = {
    "holds": "green",
    "partly": "yellow",
    "not reproduced": "red",
    "one seed": "cyan",
    "ran": "dim",
    "not run": "dim",
    "error": "red",
}

UNKNOWN_SECONDS = 15.0  # assumed for a claim that was never timed; a middling claim of the tour


class Clock:
    """Estimates the seconds that remain from the recorded seconds of each job and the pace of this machine."""

    def __init__(self, estimates: Sequence[float | None]) -> None:
        self.estimates = [UNKNOWN_SECONDS if estimate is None else max(estimate, 0.01) for estimate in estimates]
        self.spent = [0.0] * len(self.estimates)
        self.finished = [False] * len(self.estimates)
        self.current: int | None = None
        self._started = 0.0

    def begin(self, job: int) -> None:
        """Start the clock of a job."""
        self.current, self._started = job, time.monotonic()

    def end(self, *, counts: bool = True) -> None:
        """Stop the clock of the current job; one that was not really run says nothing about the pace."""
        if self.current is not None:
            self.finished[self.current] = True
            self.spent[self.current] = self._elapsed() if counts else 0.0
            self.current = None

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def pace(self) -> float:
        """Seconds here per recorded second, from the finished jobs, between a quarter and six."""
        timed = [job for job in range(len(self.estimates)) if self.finished[job] and self.spent[job] > 0]
        recorded = sum(self.estimates[job] for job in timed)
        # One second of each is added so that a first job of milliseconds does not set the pace of the rest.
        return min(max((sum(self.spent[job] for job in timed) + 1) / (recorded + 1), 0.25), 6.0)

    def remaining(self) -> float:
        """The seconds that the rest is expected to take."""
        waiting = sum(
            estimate for job, estimate in enumerate(self.estimates) if not self.finished[job] and job != self.current
        )
        now = 0.0 if self.current is None else self.pace() * self.estimates[self.current] - self._elapsed()
        return self.pace() * waiting + max(now, 0.0)

    def fraction(self) -> float:
        """How much of the expected total is behind us, 0 to 1, never going back while a job runs over."""
        total = sum(self.estimates)
        behind = sum(estimate for job, estimate in enumerate(self.estimates) if self.finished[job])
        if self.current is not None:
            estimate = self.estimates[self.current]
            behind += min(self._elapsed() / self.pace(), 0.98 * estimate)
        return behind / total if total else 1.0


class Board:
    """Shows progress on the terminal (bars) or in a log (a line a job); `silent` shows nothing."""

    def __init__(
        self,
        jobs: Sequence[tuple[str, float | None]] = (),
        *,
        title: str = "claims",
        console: Console | None = None,
        silent: bool = False,
    ) -> None:
        self.names = [name for name, _ in jobs]
        self.clock = Clock([estimate for _, estimate in jobs])
        self.title = title
        self.console = console
        self.silent = silent
        self._progress: Progress | None = None
        self._overall: TaskID | None = None

    def __enter__(self) -> Board:
        if not self.silent:
            self._open()
        return self

    def _open(self) -> None:
        from rich.console import Console

        self.console = self.console or Console(stderr=True)
        if self.console.is_terminal:
            self._progress = _bars(self)
            self._overall = self._progress.add_task(self.title, total=1.0, remaining=self.clock.remaining)
            self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def refresh(self) -> None:
        """Move the overall bar to where the clock stands."""
        if self._progress is not None and self._overall is not None:
            self._progress.update(self._overall, completed=self.clock.fraction())

    def begin(self, job: int) -> None:
        """Announce the job that starts now."""
        self.clock.begin(job)
        if self._progress is not None and self._overall is not None:
            self._progress.update(self._overall, description=f"{self.title} {job + 1}/{len(self.names)}")

    def end(self, job: int, status: str, seconds: float) -> None:
        """Announce how the job came out."""
        self.clock.end(counts=status != "not run")
        if self.silent or self.console is None:
            return
        from rich.markup import escape

        color = VERDICT_COLORS.get(status, "red")
        line = f"[{color}]{status:<14}[/] {escape(self.names[job])}  [dim]{seconds:.1f} s[/]"
        if self._progress is None:
            place = escape(f"[{job + 1}/{len(self.names)}]")
            line = f"{place} {line}  [dim]about {duration(self.clock.remaining())} left[/]"
        self.console.print(line, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Write a line of warning."""
        if self.silent or self.console is None:
            return
        from rich.markup import escape

        self.console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Callable[[float], None]]:
        """Show a bar for a loop inside a job; yields the function that advances it."""
        if self._progress is None:
            yield lambda amount: None
            return
        progress = self._progress
        handle = progress.add_task(f"  {description}", total=total, remaining=None)
        try:
            yield lambda amount: progress.advance(handle, amount)
        finally:
            progress.remove_task(handle)


def duration(seconds: float) -> str:
    """Write seconds as people say them: 8 s, 1:05."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d}"


def _bars(board: Board) -> Progress:
    """Build the rich progress whose overall task follows the board's clock at every refresh."""
    from rich.console import RenderableType
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Remaining(ProgressColumn):
        def render(self, task: Task) -> Text:
            estimate = task.fields.get("remaining")
            seconds = task.time_remaining if estimate is None else estimate()
            return Text("" if seconds is None else f"about {duration(seconds)} left", style="cyan")

    class Bars(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            board.refresh()
            yield from super().get_renderables()

    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(max_width=46, no_wrap=True)),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        Remaining(),
        console=board.console,
        transient=True,
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=sys.stderr.isatty(),
    )
