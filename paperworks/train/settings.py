"""The settings of one training run: a value, checked when it is made."""

import math
import struct
import zlib
from dataclasses import dataclass, fields
from typing import Any, Literal

from paperworks.core.errors import unknown
from paperworks.train.optim import schedules
from paperworks.train.optim.schedules import Schedule

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS = ("float32", "bfloat16", "float16")

# Fields that only decide what is looked at and kept; a run may be resumed with other values of them.
OBSERVING = frozenset({"log_every", "evaluate_every", "save_every", "keep", "progress"})

# Where the numbers are held; a run may be resumed otherwise, or by another number of processes.
PLACING = frozenset({"sharded"})

# Fields that only make the learning rate of each step.
RATE = frozenset({"steps", "lr", "schedule", "warmup", "min_lr"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. Every field that takes part in the arithmetic must stay the same when a run is resumed.

    steps: optimizer steps of the whole run.
    lr: peak learning rate.
    schedule: "constant", "linear", "cosine", "wsd" or a `train.Schedule`; what follows the warm-up.
    warmup: steps over which the rate rises linearly to its peak; a float below 1 is a share of `steps`.
    min_lr: where the schedule ends, as a fraction of `lr`.
    weight_decay: decoupled decay of matrices; vectors, biases and norms are never decayed.
    decay_embeddings: whether embedding tables are decayed too.
    betas, eps: of AdamW.
    clip: largest Euclidean norm of the averaged gradient; None leaves it.
    accumulate: micro-batches a step; their gradients count by their elements, as if they were one batch.
    precision: arithmetic of the forward pass. The weights keep their own dtype: "bfloat16" and "float16" are autocast,
        "float16" with a loss scale that adapts itself.
    seed: of python, numpy and torch, set when a run starts (not when it is resumed); None leaves their states alone.
    log_every: steps between two lines of the metrics.
    evaluate_every: steps between two evaluations; None evaluates at the end only.
    save_every: steps between two checkpoints; None saves at the end only.
    keep: how many of the newest checkpoints stay on disk.
    device: where to train, such as "cuda"; None is where the model is.
    sharded: under a launcher of several processes, let each hold a share of weights, gradients and optimizer state
        (FSDP2) instead of all of them (the same losses, less memory, more messages).
    compile: run the model through torch.compile.
    deterministic: allow only deterministic kernels, which may be slower or raise where there is none.
    progress: show a progress bar; None shows it when standard output is a terminal.
    """

    steps: int = 1000
    lr: float = 1e-3
    schedule: str | Schedule = "cosine"
    warmup: float = 0.02
    min_lr: float = 0.1
    weight_decay: float = 0.01
    decay_embeddings: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    accumulate: int = 1
    precision: Precision = "float32"
    seed: int | None = 0
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int | None = 1000
    keep: int = 2
    device: str | None = None
    sharded: bool = False
    compile: bool = False
    deterministic: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", schedules.named(self.schedule))
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "accumulate", "log_every", "keep"):
            self._require_whole(name, getattr(self, name))
        for name in ("evaluate_every", "save_every"):
            if getattr(self, name) is not None:
                self._require_whole(name, getattr(self, name), none=True)
        self._require("lr", self.lr > 0 and math.isfinite(self.lr), "a positive, finite rate")
        self._require("warmup", self.warmup >= 0, "0 or more steps, or a share of `steps` below 1")
        self._require("warmup", self.warmup < 1 or self.warmup == int(self.warmup), "whole steps, or a share below 1")
        self._require("warmup", self.warmup_steps <= self.steps, f"at most the {self.steps} steps of the run")
        self._require("min_lr", 0 <= self.min_lr <= 1, "a fraction of lr, between 0 and 1")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._require("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._require("eps", 0 <= self.eps < math.inf, "0 or more")
        self._require("clip", self.clip is None or self.clip > 0, "a positive norm, or None for no clipping")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**32, "between 0 and 2**32 - 1, or None")
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", str(self.precision), PRECISIONS))

    def _require(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

    def _require_whole(self, name: str, value: Any, none: bool = False) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        self._require(name, whole, "a whole number of at least 1" + (", or None" if none else ""))

    @property
    def warmup_steps(self) -> int:
        """How many steps the warm-up takes."""
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def factor(self, step: int) -> float:
        """Return the learning rate at `step` (counted from 0) as a fraction of the peak.

        Warm-up over w steps: (step + 1) / w. Then min_lr + (1 - min_lr) * schedule(step - w, steps - w).
        """
        warmup = self.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        assert isinstance(self.schedule, Schedule)
        return self.min_lr + (1 - self.min_lr) * self.schedule(step - warmup, self.steps - warmup)

    def described(self) -> dict[str, Any]:
        """Return every field as a JSON value; a schedule by its repr, which holds all its fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"schedule": repr(self.schedule), "betas": list(self.betas)}


def rates_digest(settings: Settings, step: int, start: int = 0, digest: int = 0) -> int:
    """Return a checksum of the learning rates of the steps `start` to `step`, going on from `digest`."""
    for taken in range(start, step):
        digest = zlib.crc32(struct.pack("<d", settings.lr * settings.factor(taken)), digest)
    return digest


def differences(earlier: dict[str, Any], rates: int, step: int, now: Settings) -> list[str]:
    """List the fields in which a run, saved after `step` steps with settings `earlier`, differs from `now`.

    Fields that only observe are left out. Those that make the learning rate may change as long as the rates of the
    steps already taken (`rates`, their digest) stay the same: so a constant rate, or a warmup-stable-decay before its
    decay, can be prolonged.
    """
    current = now.described()
    names = [name for name in current if name not in OBSERVING | PLACING and current[name] != earlier.get(name)]
    if now.steps >= step and rates_digest(now, step) == rates:
        names = [name for name in names if name not in RATE]
    return [f"settings.{name}: was {earlier.get(name)!r}, now {current[name]!r}" for name in names]
