"""Interleaved timing: block by block in turn, so that a machine's moods strike both sides alike."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Row:
    """One comparison: seconds of each block on both sides; the ratio is the peer's time over ours."""

    name: str
    ours: list[float]
    peer: list[float]
    bar: float
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median of the ratios of neighbouring blocks: above 1, ours is faster."""
        return statistics.median(peer / ours for ours, peer in zip(self.ours, self.peer, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and highest of those ratios."""
        ratios = [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]
        return min(ratios), max(ratios)

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "ratio": round(self.ratio, 3),
            "spread": [round(each, 3) for each in self.spread],
            "bar": self.bar,
            "met": self.ratio >= self.bar,
            "note": self.note,
            **{name: round(value, 4) for name, value in self.details.items()},
        }


def compare(
    name: str, ours: Callable[[], object], peer: Callable[[], object], *, bar: float, blocks: int = 5, note: str = ""
) -> Row:
    """Run both once to warm up, then alternate."""
    ours()
    peer()
    row = Row(name, [], [], bar, note)
    for block in range(blocks):
        for side, times in ((ours, row.ours), (peer, row.peer)) if block % 2 else ((peer, row.peer), (ours, row.ours)):
            gc.collect()
            began = time.perf_counter()
            side()
            times.append(time.perf_counter() - began)
    return row


def best(function: Callable[[], object], repeats: int = 5) -> float:
    """Return the least seconds of several runs: the machine's own limit, undisturbed."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def matrix_rate(dtype: torch.dtype = torch.float32, size: int = 1536) -> float:
    """Return the machine's matrix-product rate in FLOP/s."""
    a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / best(lambda: a @ a)


def read_bandwidth(megabytes: int = 256) -> float:
    """Return the machine's reading rate in bytes/s, by summing a large array."""
    data = torch.ones(megabytes * 2**20 // 4)
    return data.nbytes / best(data.sum)


def machine() -> dict[str, object]:
    """Say what was measured on, its limits and its load."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "float32_gflops": round(matrix_rate() / 1e9, 1),
        "bfloat16_gflops": round(matrix_rate(torch.bfloat16, 384) / 1e9, 2),
        "read_gbytes_per_second": round(read_bandwidth() / 1e9, 1),
        "load_average": [round(each, 2) for each in os.getloadavg()],
    }
