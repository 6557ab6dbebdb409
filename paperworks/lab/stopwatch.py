"""Seconds of work, about the same on a quiet machine and on one that other programs share."""

from __future__ import annotations

import os
import time


def now() -> tuple[float, float]:
    """Wall clock and processor time of this process and of its children that have ended, in seconds."""
    used = os.times()
    return time.perf_counter(), used.user + used.system + used.children_user + used.children_system


class Stopwatch:
    """Counts from its construction."""

    def __init__(self) -> None:
        self._wall, self._processor = now()

    def seconds(self) -> float:
        """Wall-clock seconds, or processor seconds where those are fewer: then the process had to wait for its turn.

        Waiting for a file or the network is no work of the experiment and does not count either.
        """
        wall, processor = now()
        return min(wall - self._wall, processor - self._processor)
