"""Ten digits drawn by pen strokes under random hands: the small pictures that comparisons of activations train on.

No data set is downloaded: every digit is a few polylines, whose corners are jittered, then turned, slanted, stretched
and moved at random, drawn with a pen of random width, and covered with noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks import train
from paperworks.lab import Lab
from paperworks.testbeds.training import fit


def _arc(
    x: float, y: float, width: float, height: float, begin: float, end: float, pieces: int = 7
) -> list[tuple[float, float]]:
    """Corners on an ellipse; angles in turns, from the right, upwards."""
    angles = [2 * math.pi * (begin + (end - begin) * i / pieces) for i in range(pieces + 1)]
    return [(x + width * math.cos(angle), y - height * math.sin(angle)) for angle in angles]


# One or more pen strokes a digit, in a square from -1 to 1, y downwards.
STROKES: tuple[list[list[tuple[float, float]]], ...] = (
    [_arc(0, 0, 0.6, 0.9, 0, 1, 12)],
    [[(-0.35, -0.5), (0.1, -0.9), (0.1, 0.9)]],
    [[*_arc(0, -0.45, 0.55, 0.45, 0.45, -0.1), (-0.6, 0.9), (0.65, 0.9)]],
    [_arc(-0.05, -0.45, 0.55, 0.43, 0.4, -0.25), _arc(-0.05, 0.42, 0.62, 0.47, 0.25, -0.4)],
    [[(0.2, -0.9), (-0.65, 0.3), (0.65, 0.3)], [(0.3, -0.2), (0.3, 0.9)]],
    [[(0.55, -0.9), (-0.45, -0.9), (-0.5, -0.1)], [(-0.5, -0.1), *_arc(-0.05, 0.32, 0.6, 0.55, 0.3, -0.4)]],
    [[*_arc(0.25, 0.0, 0.8, 0.9, 0.25, 0.5, 5)], _arc(0, 0.4, 0.55, 0.5, 0, 1, 10)],
    [[(-0.6, -0.9), (0.6, -0.9), (-0.1, 0.9)]],
    [_arc(0, -0.45, 0.45, 0.42, 0, 1, 9), _arc(0, 0.43, 0.55, 0.47, 0, 1, 9)],
    [_arc(0, -0.4, 0.55, 0.5, 0, 1, 10), [(0.55, -0.4), (0.45, 0.3), (0.1, 0.9)]],
)


@cache
def _segments() -> Float[Tensor, "digit segment end axis"]:
    """The straight pieces of every digit, the last one repeated where a digit has fewer than others."""
    pieces = [[pair for stroke in strokes for pair in pairwise(stroke)] for strokes in STROKES]
    most = max(map(len, pieces))
    return torch.tensor([each + [each[-1]] * (most - len(each)) for each in pieces])


@dataclass(frozen=True)
class Digits:
    """Pictures (rows, side, side), about 0 (paper) to 1 (ink), and which digit each one is."""

    pictures: Float[Tensor, "rows side side"]
    labels: Int[Tensor, " rows"]


def draw(rows: int, seed: int, *, side: int = 8, noise: float = 0.15) -> Digits:
    """Draw so many digits, each by its own hand."""
    draws = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(rows, *shape, generator=draws)

    labels = torch.randint(10, (rows,), generator=draws)
    corners = _segments()[labels]
    corners = corners + 0.06 * torch.randn(corners.shape, generator=draws)
    turn, slant = between(-0.35, 0.35), between(-0.4, 0.4)
    wide, high = between(0.55, 0.95), between(0.6, 0.95)
    cos, sin = turn.cos(), turn.sin()
    hand = torch.stack(
        (
            torch.stack((wide * cos, wide * sin), -1),
            torch.stack((slant * cos - high * sin, slant * sin + high * cos), -1),
        ),
        1,
    )
    placed = corners.flatten(1, 2) @ hand + between(-0.18, 0.18, 1, 2)
    ends = placed.unflatten(1, (-1, 2))
    line = (torch.arange(side) + 0.5) * 2 / side - 1
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)  # x, then y
    width = between(0.08, 0.16, 1)
    inks = [_ink(some, pixels, w, side) for some, w in zip(ends.split(512), width.split(512), strict=True)]
    ink = torch.cat(inks).unflatten(1, (side, side))
    return Digits(ink + noise * torch.randn(ink.shape, generator=draws), labels)


def _ink(ends: Tensor, pixels: Tensor, width: Tensor, side: int) -> Tensor:
    """How dark each pixel is: 1 within the pen's width of a segment, fading over one pixel."""
    begin, along = ends[:, :, 0], ends[:, :, 1] - ends[:, :, 0]
    away = pixels[None, :, None] - begin[:, None]
    share = (away * along[:, None]).sum(-1) / along.square().sum(-1)[:, None].clamp(min=1e-9)
    distance = (away - share.clamp(0, 1)[..., None] * along[:, None]).norm(dim=-1).amin(-1)
    return (1 - (distance - width) * side / 2).clamp(0, 1)


def classified(lab: Lab, model: nn.Module, digits: Digits) -> tuple[float, float]:
    """(mean cross entropy, share of errors)."""
    with lab.threads(1):
        measured = train.evaluate(model, digit_loss, _batches(digits, 500))
    return measured["loss"], measured["error"]


def taught(
    lab: Lab,
    model: nn.Module,
    digits: Digits,
    *,
    steps: int,
    lr: float,
    rows: int,
    seed: int,
    on_step: Callable[[int], bool | None] | None = None,
    **settings: Any,
) -> nn.Module:
    """Train a classifier on shuffled batches of `rows` digits, whose order is that of the seed; settings as `fit`."""
    count = len(digits.labels)

    def epoch(number: int) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(count, generator=lab.generator(1000 * seed + number))
        return (
            {"x": digits.pictures[some], "y": digits.labels[some]} for some in order.split(rows) if len(some) == rows
        )

    with lab.threads(1):
        fit(model, digit_loss, epoch, steps=steps, lr=lr, seed=seed, on_step=on_step, **settings)
    return model.eval()


def digit_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The summed cross entropy, the pictures counted, and the share of wrong ones."""
    logits = model(batch["x"])
    wrong = (logits.argmax(-1) != batch["y"]).float().mean()
    return F.cross_entropy(logits, batch["y"], reduction="sum"), len(logits), {"error": wrong}


def _batches(digits: Digits, rows: int) -> list[dict[str, Tensor]]:
    return [{"x": x, "y": y} for x, y in zip(digits.pictures.split(rows), digits.labels.split(rows), strict=True)]
