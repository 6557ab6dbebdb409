"""The numbers of a run, line by line as JSON, and to whoever else wants them."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from paperworks.core import atomic

Record = dict[str, Any]
Callback = Callable[[Record], object]


class Log:
    """Keeps the records of a run: in memory, in a JSONL file, and handed to every callback.

    path: the file; None writes none. It is cut back to `step`, for after a kill it may be ahead of the checkpoint.
    """

    def __init__(self, path: Path | None, step: int, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)
        self.records: list[Record] = []
        self._file: TextIO | None = None
        if path is not None:
            self.records = _read(path, step)
            with atomic.writing_file(path) as temporary:
                temporary.write_text("".join(map(_line, self.records)), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")

    def add(self, record: Record) -> None:
        """Keep one record, write its line at once, and hand a copy to the callbacks."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()
        for callback in self.callbacks:
            callback(dict(record))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _line(record: Record) -> str:
    return json.dumps({key: _plain(value) for key, value in record.items()}) + "\n"


def _plain(value: Any) -> Any:
    """Write numbers that JSON does not know as null, so that every reader takes the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _read(path: Path, step: int) -> list[Record]:
    """Records up to `step`; a line that a kill tore is the last one, and its step will be taken again."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            records.append(record)
    return records
