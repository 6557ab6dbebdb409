"""Seeds of Python, NumPy and torch, and how many seeds a comparison is judged on."""

from __future__ import annotations

import random
from collections.abc import Sequence

DESIGN_SEED = 100  # a design is tried on seeds from here up; it is judged on 0, 1, 2, ...


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # NumPy's legacy generator takes 32 bits
    torch.manual_seed(seed)


def default_count(seconds: float) -> int:
    """Number of seeds where one arm and seed takes `seconds`: ten under 3 s, three under 30 s, two otherwise."""
    return 10 if seconds < 3 else 3 if seconds < 30 else 2


def offsets(seeds: int | Sequence[int]) -> list[int]:
    """Seeds as offsets from the first one: a count gives 0, 1, 2, ...

    Raises ValueError for a count below 1, an empty list, a negative seed or one that is given twice.
    """
    if isinstance(seeds, int):
        if seeds < 1:
            raise ValueError(f"seeds={seeds}; a comparison needs at least one seed")
        return list(range(seeds))
    listed = [int(seed) for seed in seeds]
    if not listed or min(listed) < 0 or len(set(listed)) < len(listed):
        raise ValueError(f"seeds={listed}; list different numbers, 0 or above")
    return listed
