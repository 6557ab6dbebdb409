"""Writing GGUF files, one tensor in memory at a time, so that a file appears whole or not at all."""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from paperworks.compress.ggml.blocks import BLOCKS, block_format, encode
from paperworks.core.atomic import writing_file

if TYPE_CHECKING:
    from gguf import GGUFValueType, GGUFWriter

    _Typed = tuple[object, GGUFValueType, GGUFValueType | None]

ARCHITECTURE = "general.architecture"
ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class _Encoded:
    """One tensor's place in the spool file."""

    name: str
    row_shape: tuple[int, ...]  # stored bytes: (..., bytes of a row)
    type: str
    start: int
    nbytes: int


def write(
    path: str | Path,
    metadata: Mapping[str, object],
    tensors: Iterable[tuple[str, Tensor, str]],
    *,
    fallback: str | None = None,
) -> None:
    """Write a GGUF v3 file, atomically.

    Args:
        path: the file to write; an older one stays whole until the new one is complete.
        metadata: str, bool, int, float, or lists of one of these. Whole numbers are stored as uint32 (as int32 in
            lists), wider ones as 64 bits, fractions as float32. A numpy number or array fixes another type. Must
            hold "general.architecture".
        tensors: (name, tensor, ggml type) one by one; a generator keeps only one in memory. Tensors of fewer than two
            dimensions are stored as F32 whatever the type, since readers demand it of norms and biases.
        fallback: the type for tensors whose rows are not whole blocks of their own type; None makes that an error.

    Raises:
        ValueError: a type that cannot be written, rows that are not whole blocks, a name or value GGUF cannot hold.
    """
    path = Path(path)
    kinds = {key: _typed(key, value) for key, value in metadata.items()}
    architecture = metadata.get(ARCHITECTURE)
    if not isinstance(architecture, str) or not architecture:
        raise ValueError(f"GGUF metadata needs {ARCHITECTURE!r}, such as 'llama', got {architecture!r}")
    if ALIGNMENT in metadata:
        raise ValueError(f"{ALIGNMENT} is set by the writer (32); leave it out of the metadata")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing_file(path) as temporary,
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".spool") as spool,
    ):
        encoded = _spool(tensors, fallback, spool)
        spool.flush()
        _assemble(temporary, architecture, kinds, encoded, Path(spool.name))


def _typed(key: str, value: object) -> "_Typed":
    """Pair a metadata value with its GGUF value type, and the element type of an array."""
    from gguf import GGUFValueType

    if isinstance(value, np.ndarray) or (isinstance(value, list | tuple) and value):
        items = value.tolist() if isinstance(value, np.ndarray) else list(value)
        if isinstance(value, np.ndarray):
            return items, GGUFValueType.ARRAY, GGUFValueType[value.dtype.name.upper()]
        types = {_scalar_type(key, item, in_list=True) for item in items}
        if types <= {GGUFValueType.INT32, GGUFValueType.INT64}:
            types = {max(types)}
        if len(types) != 1:
            raise ValueError(f"the metadata list {key!r} mixes types; GGUF arrays hold values of one type")
        return items, GGUFValueType.ARRAY, types.pop()
    if isinstance(value, list | tuple):
        raise ValueError(f"the metadata list {key!r} is empty, so it has no element type; leave it out")
    plain = value.item() if isinstance(value, np.generic) else value
    return plain, _scalar_type(key, value, in_list=False), None


def _scalar_type(key: str, value: object, *, in_list: bool) -> "GGUFValueType":
    from gguf import GGUFValueType

    if isinstance(value, np.generic):
        name = "BOOL" if value.dtype.name == "bool" else value.dtype.name.upper()
        if name in GGUFValueType.__members__:
            return GGUFValueType[name]
    elif isinstance(value, bool):
        return GGUFValueType.BOOL
    elif isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31 and (in_list or value < 0):
            return GGUFValueType.INT32
        if 0 <= value < 1 << 32 and not in_list:
            return GGUFValueType.UINT32
        if -(1 << 63) <= value < 1 << 63:
            return GGUFValueType.INT64
    elif isinstance(value, float):
        return GGUFValueType.FLOAT32
    elif isinstance(value, str):
        return GGUFValueType.STRING
    raise ValueError(
        f"GGUF cannot hold {value!r} (metadata {key!r}): use str, bool, int, float or lists of one of them"
    )


def _spool(tensors: Iterable[tuple[str, Tensor, str]], fallback: str | None, spool: object) -> list[_Encoded]:
    """Encode the tensors one after another to a file: the header comes first in GGUF, but is known last."""
    encoded: list[_Encoded] = []
    names: set[str] = set()
    start = 0
    for name, tensor, type in tensors:
        if name in names:
            raise ValueError(f"the tensor {name!r} is given twice")
        names.add(name)
        type = _stored_type(name, tensor, type, fallback)
        data = encode(tensor.cpu(), type).numpy()
        data.tofile(spool)  # type: ignore[arg-type]
        encoded.append(_Encoded(name, data.shape, type, start, data.nbytes))
        start += data.nbytes
    return encoded


def _stored_type(name: str, tensor: Tensor, type: str, fallback: str | None) -> str:
    block = block_format(type)
    if not tensor.is_floating_point() or not 1 <= tensor.ndim <= 4 or tensor.numel() == 0:
        raise ValueError(
            f"the tensor {name!r} must be floating, of 1 to 4 dimensions and not empty, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if tensor.ndim == 1:
        return "F32"
    if tensor.shape[-1] % block.values == 0:
        return type
    if fallback is None or tensor.shape[-1] % block_format(fallback).values:
        raise ValueError(
            f"the tensor {name!r} has rows of {tensor.shape[-1]} values, not a multiple of the {block.values} of {type}"
            "; pass fallback='F16' (or another type that fits) to store such tensors in that"
        )
    return fallback


def _assemble(
    target: Path,
    architecture: str,
    kinds: dict[str, "_Typed"],
    encoded: list[_Encoded],
    spool: Path,
) -> None:
    """Write header, metadata, descriptions and then the spooled bytes with the padding between them."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, architecture)
    for key, (value, kind, element) in kinds.items():
        if key != ARCHITECTURE:
            writer.add_key_value(key, value, kind, sub_type=element)
    for piece in encoded:
        type = GGMLQuantizationType(BLOCKS[piece.type].type_id)
        writer.add_tensor_info(piece.name, piece.row_shape, np.dtype(np.uint8), piece.nbytes, raw_dtype=type)
    try:
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _copy(writer, encoded, spool)
    finally:
        writer.close()


def _copy(writer: "GGUFWriter", encoded: list[_Encoded], spool: Path) -> None:
    for piece in encoded:
        writer.write_tensor_data(np.memmap(spool, dtype=np.uint8, mode="r", offset=piece.start, shape=(piece.nbytes,)))
