"""The settings of one training run: a value, checked when it is made."""

import math
import struct
import zlib
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from paperworks.core.errors import unknown
from paperworks.train.optim import schedules
from paperworks.train.optim.adamw import AdamW
from paperworks.train.optim.groups import Group
from paperworks.train.optim.optimizer import OptimizerFunction, OptimizerSpec, name_of
from paperworks.train.optim.schedules import Schedule

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS = ("float32", "bfloat16", "float16")

# Keywords of earlier versions, and where their values go now.
MOVED = {
    "betas": "optimizer=train.AdamW(betas={!r})",
    "eps": "optimizer=train.AdamW(eps={!r})",
    "weight_decay": "optimizer=train.AdamW(weight_decay={!r})",
    "decay_embeddings": 'groups=(train.Group("*embedding.weight", weight_decay=0.0),) in place of {!r}',
}

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
    optimizer: `train.AdamW(...)` or another of the optimizer values, with all numbers of the method but the rate; or a
        function of the parameter groups that returns a `torch.optim.Optimizer`, called once, for optimizers of other
        libraries: of a function the run records only the name. The learning rates that its groups have then are their
        peaks; optimizers whose `step` needs a closure do not work.
    groups: rates and decays of their own for the parameters that patterns name (`train.Group`). Without any, matrices
        are decayed; vectors, biases and norms are not.
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
    optimizer: OptimizerSpec | OptimizerFunction = field(default_factory=AdamW)
    groups: tuple[Group, ...] = ()
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

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Refuse the keywords of earlier versions with the place where their values go now."""
        moved = {name: MOVED[name].format(value) for name, value in given.items() if name in MOVED}
        if moved:
            places = "; ".join(f"{name} goes to {place}" for name, place in moved.items())
            raise TypeError(f"Settings has no field {', '.join(moved)}: {places}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", schedules.named(self.schedule))
        object.__setattr__(self, "groups", tuple(self.groups))
        self._require_optimizer()
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
        self._require("groups", all(isinstance(each, Group) for each in self.groups), "a tuple of train.Group")
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

    def _require_optimizer(self) -> None:
        if isinstance(self.optimizer, type) and issubclass(self.optimizer, OptimizerSpec):
            name = self.optimizer.__name__
            raise TypeError(f"optimizer is the class train.{name}; give a value of it: optimizer=train.{name}(...)")
        if not isinstance(self.optimizer, OptimizerSpec) and not callable(self.optimizer):
            raise TypeError(
                f"optimizer is {self.optimizer!r}; give a value such as train.AdamW(), or a function of the parameter "
                "groups that returns a torch.optim.Optimizer"
            )

    @property
    def warmup_steps(self) -> int:
        """Length of the warm-up in steps."""
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def factor(self, step: int) -> float:
        """Learning rate at `step` (counted from 0) as a fraction of the peak.

        Warm-up over w steps: (step + 1) / w. Then min_lr + (1 - min_lr) * schedule(step - w, steps - w).
        """
        warmup = self.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        assert isinstance(self.schedule, Schedule)
        return self.min_lr + (1 - self.min_lr) * self.schedule(step - warmup, self.steps - warmup)

    def described(self) -> dict[str, Any]:
        """Every field as a JSON value: a schedule by its repr, a function that makes the optimizer by its name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        made = self.optimizer
        optimizer = made.to_dict() if isinstance(made, OptimizerSpec) else name_of(made)
        groups = [group.to_dict() for group in self.groups]
        return values | {"schedule": repr(self.schedule), "optimizer": optimizer, "groups": groups}


def rates_digest(settings: Settings, step: int, start: int = 0, digest: int = 0) -> int:
    """Checksum of the learning rates of the steps `start` to `step`, continued from `digest`."""
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
    return [f"settings.{name}: was {_shown(earlier.get(name))}, now {_shown(current[name])}" for name in names]


def _shown(value: Any) -> str:
    """The value as it is written in code where it is a spec's description, else its repr."""
    if isinstance(value, dict) and "type" in value:
        return f"{value['type']}({', '.join(f'{k}={_shown(v)}' for k, v in value.items() if k != 'type')})"
    if isinstance(value, list):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)
