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


class StopRequest:
    """Whether Ctrl-C has been pressed."""

    pending = False


@contextmanager
def deferred_interrupt() -> Iterator[StopRequest]:
    """Record the first Ctrl-C inside the block as a request; the second interrupts at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.pending:
            raise KeyboardInterrupt
        request.pending = True

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)
