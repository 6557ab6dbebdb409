"""Generated images of 8 x 8 in ten classes: what small classifiers learn here in place of photographs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train


@dataclass(frozen=True)
class Images:
    """Images and their classes."""

    pixels: Float[Tensor, "count 64"]
    labels: Int[Tensor, " count"]

    def __getitem__(self, rows: Tensor) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Classes:
    """Ten classes of so many patterns each. An image is a pattern of its class with noise on it."""

    patterns: Float[Tensor, "classes styles pixels"]
    noise: float

    @classmethod
    def smooth(cls, styles: int, noise: float, *, seed: int = 1, degrees: float = 0.0) -> Classes:
        """Draw smooth patterns (standard deviation about 0.7); the same ones for a seed, turned by an angle."""
        count = 10 * styles
        coarse = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        patterns = functional.interpolate(coarse, size=(8, 8), mode="bicubic")
        if degrees:
            turn = math.radians(degrees)
            angle = torch.tensor([[math.cos(turn), -math.sin(turn), 0.0], [math.sin(turn), math.cos(turn), 0.0]])
            grid = functional.affine_grid(angle.expand(count, 2, 3), [count, 1, 8, 8], align_corners=False)
            patterns = functional.grid_sample(patterns, grid, padding_mode="reflection", align_corners=False)
        return cls(patterns.view(10, styles, 64), noise)

    def draw(self, count: int, seed: int, classes: int = 10) -> Images:
        """Draw images of the first `classes` classes."""
        draws = torch.Generator().manual_seed(seed)
        label = torch.randint(classes, (count,), generator=draws)
        style = torch.randint(self.patterns.shape[1], (count,), generator=draws)
        return Images(self.patterns[label, style] + self.noise * torch.randn(count, 64, generator=draws), label)


def network(seed: int) -> nn.Sequential:
    """A fresh classifier: 64 - 64 - 64 - 10."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cross_entropy(model: nn.Module, batch: Images) -> Tensor:
    """The loss of the classes."""
    return functional.cross_entropy(model(batch.pixels), batch.labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """The share of images whose class the model finds."""
    return (model(images.pixels).argmax(-1) == images.labels).float().mean().item()


def fit(
    model: nn.Module,
    images: Images,
    *,
    steps: int,
    rate: float,
    seed: int,
    batch: int = 128,
    schedule: Literal["constant", "linear"] = "constant",
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int], bool | None] | None = None,
) -> None:
    """Train what is trainable on batches drawn by `seed`, with AdamW without decay unless given an optimizer."""
    rows = torch.randint(len(images), (steps, batch), generator=torch.Generator().manual_seed(seed))
    settings = train.Settings(
        steps=steps,
        lr=rate,
        optimizer=train.AdamW(weight_decay=0.0) if optimizer is None else lambda groups: optimizer,
        warmup=0,
        schedule=schedule,
        clip=None,
        seed=None,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    train.fit(model, loss, [images[row] for row in rows], settings, on_step=on_step)
