"""GGUF files: one file with typed metadata and tensors in ggml's block formats (ggml project, 2023).

`read` checks every length, count and offset against the file before it allocates anything, and leaves the tensors in
the file until they are asked for. The block formats themselves are in `paperworks.compress.ggml.blocks`.
"""

import mmap
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from paperworks.checkpoints.gguf.metadata import Cursor, read_metadata
from paperworks.checkpoints.gguf.writer import write
from paperworks.compress.ggml.blocks import BLOCKS, BlockFormat, decode
from paperworks.core.errors import CorruptFile

__all__ = ["GGUFFile", "GGUFTensor", "read", "write"]

_BY_ID = {block.type_id: block for block in BLOCKS.values()}

DEFAULT_ALIGNMENT = 32
# Limits on what a header may claim; the largest published files stay far below each of them.
MOST_HEADER_BYTES = 1 << 28
MOST_TENSORS = 1 << 17
MOST_KEYS = 1 << 16
MOST_DIMENSIONS = 4
# The smallest a key or a tensor's entry can be: bounds their number by the file's size before the first is read.
LEAST_KEY_BYTES = 8 + 4 + 1
LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8


class _OpenFile:
    """A file held open for as long as a tensor may still be read from it, whatever happens to its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file, still in the file."""

    name: str
    shape: tuple[int, ...]  # torch order: the last dimension is the one the blocks run along
    type: str
    nbytes: int
    _start: int
    _file: _OpenFile

    def raw(self) -> UInt8[Tensor, "*rows bytes"]:
        """The stored bytes, one row of blocks to a row; mapped, so pages are read when they are looked at.

        Writing to it changes this process's memory only, never the file.
        """
        first = self._start - self._start % mmap.ALLOCATIONGRANULARITY
        skip = self._start - first
        try:
            pages = mmap.mmap(self._file.descriptor, skip + self.nbytes, access=mmap.ACCESS_COPY, offset=first)
        except ValueError as error:
            raise CorruptFile(f"{self._file.path} has become shorter since it was opened; load it again") from error
        block = BLOCKS[self.type]
        row = self.shape[-1] // block.values * block.bytes if self.shape else block.bytes
        return torch.frombuffer(pages, dtype=torch.uint8, offset=skip).view(*self.shape[:-1], row)

    def load(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Float[Tensor, "*shape"]:
        """Decode into memory of its own; `out` fills a given contiguous tensor of the same size instead."""
        return decode(self.raw(), self.type, dtype=dtype, out=out).view(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """A checked GGUF file: its metadata as Python values (arrays as lists) and its tensors by name."""

    path: Path
    version: int
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]


def read(path: str | Path) -> GGUFFile:
    """Open a GGUF file of version 2 or 3, little-endian, and check its whole header.

    Raises:
        CorruptFile: anything in it that does not fit the format or the file's size; says what and at which byte.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    file = _OpenFile(path)
    size = os.fstat(file.descriptor).st_size
    if size < 24:
        raise CorruptFile(f"{path} is not a GGUF file: it has {size} bytes, and the header alone needs 24")
    end = min(size, MOST_HEADER_BYTES)
    with mmap.mmap(file.descriptor, end, access=mmap.ACCESS_READ) as header:
        cursor = Cursor(header, end, str(path))
        version, tensor_count, key_count = _preamble(cursor)
        metadata = read_metadata(cursor, key_count)
        entries = [_entry(cursor, index) for index in range(tensor_count)]
        alignment = _alignment(cursor, metadata)
        start = (cursor.at + alignment - 1) // alignment * alignment
    return GGUFFile(path, version, metadata, _placed(entries, start, alignment, size, file))


def _preamble(cursor: Cursor) -> tuple[int, int, int]:
    """Check magic and version; return (version, number of tensors, number of keys)."""
    magic = cursor.buffer[:4]
    if magic != b"GGUF":
        raise cursor.error(f"it begins with {magic!r} instead of b'GGUF'")
    cursor.at = 4
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
            raise cursor.error("the version reads as big-endian; only little-endian files are read: convert it again")
        raise cursor.error(f"the version is {version}; versions 2 and 3 are read: convert the model again")
    tensor_count = cursor.number("<Q", "the number of tensors")
    key_count = cursor.number("<Q", "the number of keys")
    left = cursor.end - cursor.at
    if tensor_count > MOST_TENSORS or tensor_count * LEAST_TENSOR_BYTES > left:
        raise cursor.error(f"it claims {tensor_count:,} tensors, more than its {left:,} further bytes can describe")
    if key_count > MOST_KEYS or key_count * LEAST_KEY_BYTES > left:
        raise cursor.error(f"it claims {key_count:,} keys, more than its {left:,} further bytes can hold")
    return version, tensor_count, key_count


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    block: BlockFormat
    nbytes: int
    offset: int


def _entry(cursor: Cursor, index: int) -> _Entry:
    """Read one tensor's description; its size is checked against the file by `_placed`."""
    name = cursor.string(f"the name of tensor {index}")
    count = cursor.number("<I", f"the number of dimensions of tensor {name!r}")
    if count > MOST_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} has {count} dimensions; at most {MOST_DIMENSIONS} are possible")
    fastest_first = [cursor.number("<Q", f"the shape of tensor {name!r}") for _ in range(count)]
    shape = tuple(reversed(fastest_first))
    type_id = cursor.number("<I", f"the type of tensor {name!r}")
    offset = cursor.number("<Q", f"the offset of tensor {name!r}")
    block = _BY_ID.get(type_id)
    if block is None:
        raise cursor.error(f"tensor {name!r} has the unknown type {type_id}; known are {', '.join(BLOCKS)}")
    if any(size == 0 for size in shape) or prod(shape) >= 1 << 63:
        raise cursor.error(f"tensor {name!r} has the impossible shape {shape}")
    row = shape[-1] if shape else 1
    if row % block.values:
        raise cursor.error(
            f"tensor {name!r} has rows of {row} values, not a multiple of the {block.values} of {block.name}"
        )
    return _Entry(name, shape, block, prod(shape) // block.values * block.bytes, offset)


def _alignment(cursor: Cursor, metadata: dict[str, object]) -> int:
    """What the start of the data and every offset in it are multiples of."""
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}; it must be a power of two up to 1,048,576")
    return alignment


def _placed(entries: list[_Entry], start: int, alignment: int, size: int, file: _OpenFile) -> dict[str, GGUFTensor]:
    """Check that every tensor lies in the file, aligned and apart from the others, whose order is kept."""
    previous_end, previous = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.offset):
        problem = ""
        if entry.offset + entry.nbytes > size - start:
            end = start + entry.offset + entry.nbytes
            problem = f"ends at byte {end:,}, but the file has {size:,}: it is truncated or damaged, get it again"
        elif entry.offset % alignment:
            problem = f"begins at offset {entry.offset:,}, which is not a multiple of the alignment {alignment}"
        elif entry.offset < previous_end:
            problem = f"begins at offset {entry.offset:,}, inside the tensor {previous!r}"
        if problem:
            raise CorruptFile(f"{file.path} is not a valid GGUF file: the tensor {entry.name!r} {problem}")
        previous_end, previous = entry.offset + entry.nbytes, entry.name
    tensors: dict[str, GGUFTensor] = {}
    for entry in entries:
        if entry.name in tensors:
            raise CorruptFile(f"{file.path} is not a valid GGUF file: the tensor {entry.name!r} is given twice")
        tensors[entry.name] = GGUFTensor(
            entry.name, entry.shape, entry.block.name, entry.nbytes, start + entry.offset, file
        )
    return tensors
