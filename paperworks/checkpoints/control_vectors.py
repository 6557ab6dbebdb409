"""Control vectors as GGUF files, as repeng (vgel, 2024) writes them and llama.cpp reads them.

Architecture "controlvector", and one float32 tensor `direction.N` for the output of block N, counted from 0. Block 0
has none: llama.cpp numbers directions from 1, and so does repeng, which leaves the first block out.
"""

import re
from pathlib import Path

import torch

from paperworks.checkpoints.gguf.reader import read, write
from paperworks.core.errors import CorruptFile
from paperworks.interpret import ControlVector

ARCHITECTURE = "controlvector"
_OUR_PATH = re.compile(r"blocks\.([1-9][0-9]*)")
_TENSOR = re.compile(r"direction\.([1-9][0-9]*)")


def save_control_vector(vector: ControlVector, path: str | Path, *, model_hint: str = "llama") -> None:
    """Write a control vector; the file appears whole or not at all.

    Args:
        vector: directions (dim,) for paths "blocks.N" with N of at least 1.
        path: the file.
        model_hint: the kind of model it is for, in llama.cpp's words ("llama", "qwen2"); readers only show it.

    Raises:
        ValueError: for paths a file cannot name, no direction, or one that is not a finite float32 vector.
    """
    tensors = []
    for name, direction in vector.directions.items():
        match = _OUR_PATH.fullmatch(name)
        if match is None:
            raise ValueError(f"a control vector's file names block outputs from 'blocks.1' on, it cannot hold {name!r}")
        if direction.dim() != 1 or direction.dtype != torch.float32 or not bool(torch.isfinite(direction).all()):
            raise ValueError(
                f"{name}: a direction in a file is a finite float32 vector, got {direction.dtype} of shape "
                f"{tuple(direction.shape)}"
            )
        tensors.append((f"direction.{match[1]}", direction.detach().cpu(), "F32"))
    if not tensors:
        raise ValueError("the control vector has no direction to write")
    metadata = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": model_hint,
        f"{ARCHITECTURE}.layer_count": len(tensors),
    }
    write(path, metadata, tensors)


def load_control_vector(path: str | Path) -> ControlVector:
    """Read a control vector that `save_control_vector`, repeng or llama.cpp wrote; paths are "blocks.N".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a GGUF file of something else.
        CorruptFile: a damaged file, or one whose tensors are not directions of one size.
    """
    file = read(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(f"{path} holds a {architecture!r}, not a control vector (architecture {ARCHITECTURE!r})")
    directions: dict[str, torch.Tensor] = {}
    for name, tensor in file.tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(tensor.shape) != 1:
            raise CorruptFile(
                f"{path}: the tensor {name!r} of shape {tensor.shape} is no direction of a control vector"
            )
        directions[f"blocks.{match[1]}"] = tensor.load(torch.float32)
    if not directions:
        raise CorruptFile(f"{path} holds no direction")
    sizes = {len(direction) for direction in directions.values()}
    if len(sizes) > 1:
        raise CorruptFile(f"{path} holds directions of different sizes: {sorted(sizes)}")
    return ControlVector(directions)
