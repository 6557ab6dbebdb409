"""What a claim's check is handed: scale, seed, device, progress, a place for figures and tables, and the judge."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from paperworks.core.errors import unknown
from paperworks.lab import drawings, figures
from paperworks.lab.checks import Beats, Check
from paperworks.lab.compare import Arm, Comparison, compare
from paperworks.lab.paper import Verdict
from paperworks.lab.progress import Board
from paperworks.lab.results import SCALES
from paperworks.lab.values import plain_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Generator

T = TypeVar("T")
Scale = Literal["smoke", "small", "large"]


class Lab:
    """The workbench of one claim; what is drawn or written here goes into the result and the report."""

    def __init__(
        self,
        scale: Scale = "small",
        seed: int = 0,
        device: str = "cpu",
        *,
        stem: str = "lab",
        board: Board | None = None,
        most_seeds: int | None = None,
        model: str | None = None,
        data: Path | None = None,
        drawn: Collection[str] = (),
    ) -> None:
        if scale not in SCALES:
            raise ValueError(unknown("scale", scale, SCALES))
        self.scale = scale
        self.seed = seed
        self.device = device
        self.board = board or Board(silent=True)
        self.images: dict[str, bytes] = {}
        self.texts: list[dict[str, str]] = []
        self.tables: list[dict[str, Any]] = []
        self.most_seeds = 1 if scale == "smoke" else most_seeds
        self.comparison: Comparison | None = None  # the last one, for `curves` and `points`
        self.choices: dict[str, str] = {}  # what the user chose instead of the claim's own model and data
        self._model, self._data = model, data
        self._stem = stem
        self._drawn = drawn  # file names of the figures of the paper's other claims

    def model_name(self, default: str) -> str:
        """Model to speak of: the user's (`--model`), else the default; a name or path that `pw.load` takes."""
        if self._model is None:
            return default
        self.choices["model"] = self._model
        return self._model

    def data_file(self, default: str | Path) -> Path:
        """Data to use: the user's file (`--data`), else the default."""
        if self._data is None:
            return Path(default)
        self.choices["data"] = self._data.name
        return self._data

    def generator(self, seed: int, device: str = "cpu") -> Generator:
        """A torch.Generator that starts from a seed; on the CPU its numbers are the same on every machine."""
        import torch

        return torch.Generator(device).manual_seed(seed)

    def pick(self, *, smoke: T, small: T, large: T | None = None) -> T:
        """Setting for this scale; large falls back to small."""
        if self.scale == "smoke":
            return smoke
        return large if self.scale == "large" and large is not None else small

    def track(self, items: Iterable[T] | int, description: str, total: float | None = None) -> Iterator[Any]:
        """Iterate over `items` (an int counts up to it) behind a progress bar with the remaining time."""
        sequence: Iterable[Any] = range(items) if isinstance(items, int) else items
        if total is None and isinstance(sequence, Sized):
            total = len(sequence)
        with self.progress(description, total) as advance:
            for item in sequence:
                yield item
                advance(1)

    @contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Show a bar for work that is not a loop of ours; yields `advance(amount)`."""
        with self.board.task(description, total) as advance:
            yield advance

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Compute on `count` threads inside the block: very small steps run faster on one than on several."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def figure(self, name: str, **options: Any) -> Iterator[Figure]:
        """Yield a matplotlib Figure (options go to its constructor); it is saved when the block ends well."""
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise ValueError(f"figure name {name!r} names a file; use lower-case words joined by hyphens")
        stem = f"{self._stem}-{name}"
        if any(known.rpartition(".")[0] == stem for known in (*self.images, *self._drawn)):
            raise ValueError(f"this paper already has a figure named {name!r}; give this one another name")
        with figures.drawing(**options) as figure:
            yield figure
            extension, content = figures.encode(figure, salt=stem)
        self.images[f"{stem}.{extension}"] = content

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show a table in the report; every row has one plain value a column."""
        plain: list[list[object]] = []
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"row {index} of table {title!r} has {len(row)} cells for {len(columns)} columns")
            plain.append(
                [
                    plain_value(cell, f"{title}, row {index}, {column}")
                    for cell, column in zip(row, columns, strict=True)
                ]
            )
        self.tables.append({"title": title, "columns": [str(column) for column in columns], "rows": plain})

    def text(self, title: str, body: str) -> None:
        """Show a text in the report as it stands, such as what a model wrote."""
        self.texts.append({"title": str(title), "body": str(body)})

    def compare(
        self,
        *,
        arms: Mapping[str, Arm],
        main: Beats,
        also: Sequence[Check] = (),
        seeds: int | Sequence[int] | None = None,
        measured: Mapping[str, object] | None = None,
        note: str = "",
    ) -> Verdict:
        """Run the arms over seeds and judge: does the method beat the control by the stated margin?

        Every arm runs on every seed, with Python, NumPy and torch seeded before each. `holds`: the main check in every
        seed, all others in the mean. `partly`: the main check in the mean but not in every seed, or another check
        fails. Else `not reproduced`. At the smoke scale one seed runs and nothing is judged.

        Args:
            arms: name -> function of a seed, which returns the same metrics in each arm: numbers, and lists of numbers
                as curves. An arm that may diverge returns a finite value then, such as the loss of guessing.
            main: the method against a control, by a margin above 0 stated before the run.
            also: further checks, judged in the mean: Beats, Within, AtLeast, AtMost.
            seeds: how many (0, 1, 2, ...) or which; default by the time the slowest arm takes for a seed: ten under
                3 s, three under 30 s, two otherwise. A run with --design adds 100 to each.
            measured: further numbers to show.
            note: limits and settings, for the reader of the result.

        Raises ValueError for a comparison that cannot bind (no control, no margin), a check of an unknown arm or
        metric, arms that return different metrics, and numbers that are not finite.
        """
        verdict, self.comparison = compare(
            self, arms=arms, main=main, also=also, seeds=seeds, measured=measured, note=note
        )
        return verdict

    def curves(
        self,
        *on: str,
        x: str | None = None,
        arms: Sequence[str] | None = None,
        name: str = "",
        title: str = "",
        log: str = "",
        **options: Any,
    ) -> None:
        """Draw curves of the last comparison: the mean of each arm, with a band from the lowest to the highest seed.

        Args:
            on: one curve or more, as returned by the arms; the second and later ones are dashed.
            x: another curve that holds the places on the horizontal axis; default 1, 2, 3, ...
            arms: which arms, default all; the control is grey.
            name: name of the figure, default that of the first curve; no two figures of a paper have the same.
            title: title of the figure, default the names of the curves.
            log: axes with a logarithmic scale: "x", "y" or "xy".
            options: of the figure, such as figsize.
        """
        comparison = self._compared("curves")
        with self.figure(name or _file_name(*on[:1]), **options) as figure:
            drawings.draw_curves(figure.subplots(), comparison, on, x=x, arms=arms, title=title, log=log)

    def points(self, on: str, *, name: str = "", title: str = "", log: bool = False, **options: Any) -> None:
        """Draw a number of the last comparison: one row an arm, one dot a seed, and the mean."""
        comparison = self._compared("points")
        options.setdefault("figsize", (7.2, 1.2 + 0.45 * len(comparison.numbers)))
        with self.figure(name or _file_name(on), **options) as figure:
            drawings.draw_points(figure.subplots(), comparison, on, title=title, log=log)

    def _compared(self, figure: str) -> Comparison:
        if self.comparison is None:
            raise ValueError(f"lab.{figure} draws the last comparison; call lab.compare(...) before it")
        return self.comparison

    def judge(
        self,
        checks: Mapping[str, object],
        measured: Mapping[str, object],
        control: Mapping[str, object] | None = None,
        note: str = "",
    ) -> Verdict:
        """Verdict of an exact or parity claim; the check named first is the main effect (see `Verdict.of`).

        A behaviour judged this way rests on one seed and is recorded as "one seed", never as "holds".
        """
        return Verdict.of(checks, measured, control, note)


def _file_name(metric: str = "curves") -> str:
    """A metric as the name of a figure: lower-case words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", metric.lower())) or "figure"
