"""The random generators of python, numpy and torch: seeded, captured and put back, to draw the same again."""

import base64
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def seed(value: int) -> None:
    """Seed every generator; torch seeds its accelerators too."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class States(NamedTuple):
    """The state of every global generator at one moment; `cuda` is empty where no GPU has been used."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: list[Tensor]


def capture() -> States:
    """Current states; cheap enough for every epoch of a toy run."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if used else []
    return States(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)


def restore(states: States) -> None:
    """Put every global generator where `capture` found it.

    The state of a GPU that is not there is left out: the arithmetic is another one without it anyway.
    """
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch)
    for index, device in enumerate(states.cuda):
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(device, index)


def to_json(states: States) -> dict[str, Any]:
    """Write the states as JSON values."""
    version, words, gauss = states.python
    inner = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in states.numpy["state"].items()}
    return {
        "python": [version, list(words), gauss],
        "numpy": states.numpy | {"state": inner},
        "torch": to_text(states.torch),
        "cuda": [to_text(device) for device in states.cuda],
    }


def from_json(saved: dict[str, Any]) -> States:
    """Read back what `to_json` wrote."""
    version, words, gauss = saved["python"]
    inner = {
        key: np.array(value, np.uint32) if key == "key" else value for key, value in saved["numpy"]["state"].items()
    }
    cuda = [from_text(device) for device in saved["cuda"]]
    return States((version, tuple(words), gauss), saved["numpy"] | {"state": inner}, from_text(saved["torch"]), cuda)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run a block whose draws leave no trace: an evaluation must not change what training draws next."""
    before = capture()
    try:
        yield
    finally:
        restore(before)


@contextmanager
def deterministic_kernels(only: bool) -> Iterator[None]:
    """Allow deterministic kernels only, if asked to, inside the block."""
    if not only:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def to_text(generator_state: Tensor) -> str:
    """Write the bytes of a torch generator's state as text."""
    return base64.b64encode(generator_state.numpy().tobytes()).decode("ascii")


def from_text(text: str) -> Tensor:
    """Read back what `to_text` wrote."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
