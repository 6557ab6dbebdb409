"""The folder of a run: its checkpoints, the lock that keeps a second run out, and what dead runs left behind."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"\.step-\d+\..*\.?partial")


class RunFolder:
    """`checkpoints/step-000123/`, `metrics.jsonl` and `.lock` in one folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` steps stands or would stand."""
        return self.checkpoints / f"step-{step:06d}"

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [(match, path) for path in self.checkpoints.iterdir() if (match := _STEP.fullmatch(path.name))]
        return [path for match, path in sorted(found, key=lambda pair: int(pair[0].group(1)))]

    def clean(self) -> None:
        """Remove the unfinished folders of runs that were killed. The lock must be held: a live run has one too."""
        if not self.checkpoints.is_dir():
            return
        for path in list(self.checkpoints.iterdir()):
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the newest `keep`; a kill on the way leaves no half of one."""
        for path in self.complete()[:-keep]:
            doomed = path.with_name(f".{path.name}.removed.partial")
            path.rename(doomed)
            shutil.rmtree(doomed)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the system lets go of the lock when this process dies, however.

        Raises RuntimeError when another process is training here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, self.path)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # a system without POSIX locks: the caller alone sees to it that runs do not share a folder
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(
            f"another process is training in {path}; wait for it, end it, or use another run_dir"
        ) from error


def latest(run_dir: str | Path) -> Path | None:
    """Newest complete checkpoint of a run; its weights.safetensors holds the model's state. None if none."""
    complete = RunFolder(run_dir).complete()
    return complete[-1] if complete else None
