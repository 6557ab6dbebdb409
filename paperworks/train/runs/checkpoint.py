"""One checkpoint: a folder of safetensors and JSON that is there whole or not at all, and executes nothing."""

import errno
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paperworks.core import atomic
from paperworks.core.errors import CorruptFile
from paperworks.train.runs import trees

FORMAT = 1
WEIGHTS, TENSORS, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def write(folder: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint: the model's tensors, and a nested state of which tensors go to the other file.

    weights.safetensors is the model's own state under its own names; optimizer.safetensors the tensors of everything
    else; state.json the rest. Raises OSError when the disk does not take it; an existing `folder` stays whole then.
    """
    tensors: dict[str, Tensor] = {}
    described = trees.flatten(state, "state", tensors)
    with atomic.writing_directory(folder) as temporary:
        _save(trees.storable(weights), temporary / WEIGHTS)
        _save(trees.storable(tensors), temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps({"format": FORMAT, "state": described}), encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The library reports a full disk as its own error; to callers it is a file that could not be written.
        code = errno.ENOSPC if f"(os error {errno.ENOSPC})" in str(error) else errno.EIO
        raise OSError(code, f"could not write the checkpoint: {error}", str(path)) from error


def read_state(folder: Path) -> dict[str, Any]:
    """Nested state of a checkpoint. Raises CorruptFile when it is not whole."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{folder / STATE} cannot be read: {error}. {_ADVICE}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        written = content.get("format") if isinstance(content, dict) else None
        raise CorruptFile(f"{folder / STATE} has format {written!r}; this version reads format {FORMAT}")
    try:
        state: dict[str, Any] = trees.unflatten(content["state"], _load(folder / TENSORS))
    except (KeyError, TypeError) as error:
        raise CorruptFile(f"{folder / STATE} and {TENSORS} do not belong together: {error!r}. {_ADVICE}") from error
    return state


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint. Raises CorruptFile when they are not whole."""
    return _load(folder / WEIGHTS)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}. {_ADVICE}") from error


_ADVICE = "Remove this checkpoint's folder to go on from the one before it"
