"""What a claim's check is handed: scale, seed, device, progress, a place for figures and tables, and the judge."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from paperworks.core.errors import unknown
from paperworks.lab import figures
from paperworks.lab.paper import Verdict
from paperworks.lab.progress import Board
from paperworks.lab.results import SCALES
from paperworks.lab.values import plain_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        self._stem = stem

    def pick(self, *, smoke: T, small: T, large: T | None = None) -> T:
        """Return the setting for this scale; large falls back to small."""
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
        """Compute on so many threads inside the block: very small steps run faster on one than on several."""
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
        if any(known.rpartition(".")[0] == stem for known in self.images):
            raise ValueError(f"there is already a figure named {name!r}; give this one another name")
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

    def judge(
        self,
        checks: Mapping[str, object],
        measured: Mapping[str, object],
        control: Mapping[str, object] | None = None,
        note: str = "",
    ) -> Verdict:
        """Turn checks and numbers into a verdict; the check named first is the main effect (see `Verdict.of`)."""
        return Verdict.of(checks, measured, control, note)
