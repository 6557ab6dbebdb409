"""Ctrl-C while training: finish the step, save, say how to go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from paperworks.train.runs.report import Report


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after a whole step; `report` tells what was done until then."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class Wish:
    """Whether somebody wishes the run to stop."""

    stop = False


@contextmanager
def listening() -> Iterator[Wish]:
    """Turn the first Ctrl-C inside the block into a wish; the second interrupts at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    wish = Wish()

    def note(number: int, frame: FrameType | None) -> None:
        if wish.stop:
            raise KeyboardInterrupt
        wish.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGINT, before)
