"""Pen strokes of digit strings: polylines walked by an unsteady hand, as offsets with lifts of the pen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Point = tuple[float, float]


def _turn(x: float, y: float, width: float, height: float, begin: float, end: float, corners: int = 8) -> list[Point]:
    """Corners on an ellipse, from one angle to another, in turns from the right and upwards."""
    angles = [2 * math.pi * (begin + (end - begin) * i / corners) for i in range(corners + 1)]
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


# How each digit is written, stroke by stroke, in a box of width 1 and height 2, y upwards.
FONT: tuple[list[list[Point]], ...] = (
    [_turn(0.5, 1.0, 0.45, 1.0, 0.25, 1.25, 10)],
    [[(0.2, 1.5), (0.6, 2.0), (0.6, 0.0)]],
    [[*_turn(0.5, 1.5, 0.45, 0.5, 0.45, -0.12, 5), (0.05, 0.0), (0.95, 0.0)]],
    [[*_turn(0.45, 1.5, 0.45, 0.5, 0.4, -0.25, 5), *_turn(0.45, 0.5, 0.5, 0.5, 0.25, -0.4, 5)]],
    [[(0.6, 2.0), (0.05, 0.7), (1.0, 0.7)], [(0.75, 1.3), (0.75, 0.0)]],
    [[(0.15, 2.0), (0.1, 1.1), *_turn(0.45, 0.6, 0.5, 0.6, 0.3, -0.4, 5)], [(0.15, 2.0), (0.9, 2.0)]],
    [[(0.75, 2.0), (0.2, 1.1), *_turn(0.5, 0.5, 0.42, 0.5, 0.5, 1.45, 7)]],
    [[(0.05, 2.0), (0.95, 2.0), (0.35, 0.0)]],
    [[*_turn(0.5, 1.5, 0.4, 0.5, -0.25, 0.75, 7), *_turn(0.5, 0.5, 0.45, 0.5, 0.25, -0.75, 7)]],
    [[*_turn(0.5, 1.4, 0.42, 0.55, 0.0, 1.0, 7), (0.8, 0.0)]],
)


@dataclass(frozen=True)
class Strokes:
    """Rows of offsets, padded with zeros, and the digits they write.

    Attributes:
        offsets: x, y in units of their own deviation, and 1 where the pen is lifted after the offset.
        real: which offsets are no padding.
        text: digits, padded with 0; lengths: how many each row has.
    """

    offsets: Float[Tensor, "rows time 3"]
    real: Bool[Tensor, "rows time"]
    text: Int[Tensor, "rows digits"]
    lengths: Int[Tensor, " rows"]

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `models.handwriting.handwriting_loss` takes."""
        return self.offsets, self.real, self.text, self.lengths


@dataclass(frozen=True, kw_only=True)
class Hand:
    """How unsteady a hand is. Each row is written by a hand of its own, drawn anew.

    Attributes:
        stride: the mean length of an offset, in widths of a digit; haste: its deviation from row to row, as a share.
        slant: deviation of the lean; stretch: of the width, as a share; shake: of every point, in widths.
        missed: the share of points that the tablet misses, ends of strokes excepted, so that offsets join into one.
    """

    stride: float = 0.45
    haste: float = 0.15
    slant: float = 0.15
    stretch: float = 0.1
    shake: float = 0.02
    missed: float = 0.0

    def __post_init__(self) -> None:
        if not self.stride > 0:
            raise ValueError(f"stride must be above 0, got {self.stride}: the pen would never arrive")
        for name in ("haste", "slant", "stretch", "shake"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is a deviation, at least 0, got {getattr(self, name)}")
        if not 0 <= self.missed < 1:
            raise ValueError(f"missed is a share, in [0, 1), got {self.missed}")

    def write(self, rows: Sequence[Sequence[int]], draws: torch.Generator) -> Strokes:
        """Write each row of digits, from left to right. Raises ValueError for a row without, or with other things."""
        for row in rows:
            if not len(row) or not all(0 <= digit <= 9 for digit in row):
                raise ValueError(f"a row must be one or more digits from 0 to 9, got {list(row)}")
        if not rows:
            raise ValueError("there is no row to write")
        written = [self._row(row, draws) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        text = [torch.tensor(list(row)) for row in rows]
        return Strokes(
            pad(written, batch_first=True),
            pad([torch.ones(len(each), dtype=torch.bool) for each in written], batch_first=True),
            pad(text, batch_first=True),
            torch.tensor([len(row) for row in rows]),
        )

    def draw(self, count: int, digits: tuple[int, int], draws: torch.Generator) -> Strokes:
        """Write `count` rows of random digits, from `digits[0]` to `digits[1]` of them each."""
        sizes = torch.randint(digits[0], digits[1] + 1, (count,), generator=draws).tolist()
        return self.write([torch.randint(10, (size,), generator=draws).tolist() for size in sizes], draws)

    def _row(self, digits: Sequence[int], draws: torch.Generator) -> Float[Tensor, "time 3"]:
        haste, slant, stretch = torch.randn(3, generator=draws) * torch.tensor([self.haste, self.slant, self.stretch])
        stride = self.stride * max(0.5, 1 + float(haste))
        points, lifts = [], []
        for place, digit in enumerate(digits):
            for stroke in FONT[digit]:
                walked = _walked(torch.tensor(stroke), stride) + torch.tensor([1.6 * place, 0.0])
                kept = torch.rand(len(walked), generator=draws) >= self.missed
                kept[0] = kept[-1] = True
                walked = walked[kept]
                points.append(walked)
                lifts += [0.0] * (len(walked) - 1) + [1.0]
        path = torch.cat(points)
        path = torch.stack((path[:, 0] * (1 + stretch) + slant * path[:, 1], path[:, 1]), 1)
        path = path + self.shake * torch.randn(path.shape, generator=draws)
        offsets = torch.cat((torch.zeros(1, 2), path.diff(dim=0)))
        return torch.cat((offsets / self.stride, torch.tensor(lifts)[:, None]), 1)


def _walked(corners: Float[Tensor, "corners 2"], stride: float) -> Float[Tensor, "points 2"]:
    """Points about a stride apart along a line of corners, both ends among them."""
    lengths = corners.diff(dim=0).norm(dim=1)
    along = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    count = max(1, round(float(along[-1]) / stride))
    wanted = torch.linspace(0.0, float(along[-1]), count + 1)
    piece = (torch.searchsorted(along, wanted, right=True) - 1).clamp(0, len(lengths) - 1)
    share = ((wanted - along[piece]) / lengths[piece].clamp(min=1e-9))[:, None]
    return corners[piece] * (1 - share) + corners[piece + 1] * share
