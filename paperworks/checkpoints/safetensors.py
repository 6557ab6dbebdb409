"""Weights in safetensors files, one or many shards, read tensor by tensor and checked before they are believed.

The layout is Hugging Face's: model.safetensors, or model-00001-of-00003.safetensors ... with an index. Files written
here also carry a checksum of every tensor, so that a flipped bit is noticed when they are read.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paperworks.core.errors import CorruptFile, unknown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHECKSUMS = "paperworks.checksums"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DEFAULT_SHARD_BYTES = 5 * 1024**3
_SUMMED_BYTES = 4096

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class _Shard:
    """One open safetensors file; its header has been checked against its size by the safetensors library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            opened: Any = safe_open
            self.file = opened(path, framework="pt")
            self.names = list(self.file.keys())
            metadata = self.file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptFile(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
        self.checksums = self._read_checksums(metadata.get(CHECKSUMS, "{}"))

    def _read_checksums(self, text: str) -> dict[str, str]:
        try:
            checksums = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CorruptFile(f"{self.path} has unreadable checksums in its header: {error}") from error
        if not isinstance(checksums, dict):
            raise CorruptFile(f"{self.path} has checksums that are not a JSON object")
        return checksums

    def slice(self, name: str) -> Any:
        return self.file.get_slice(name)

    def dtype(self, name: str) -> torch.dtype:
        code = self.slice(name).get_dtype()
        if code not in _DTYPES:
            raise CorruptFile(f"{self.path}: the tensor {name!r} has the dtype {code}, known are {', '.join(_DTYPES)}")
        return _DTYPES[code]

    def load(self, name: str, verify: bool) -> Tensor:
        try:
            tensor: Tensor = self.file.get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise CorruptFile(f"{self.path}: the tensor {name!r} cannot be read ({error})") from error
        if verify and name in self.checksums and checksum(tensor) != self.checksums[name]:
            raise CorruptFile(
                f"{self.path}: the tensor {name!r} is not what was written (its checksum differs); "
                "copy or download the file again"
            )
        return tensor


class TensorStore:
    """Tensors by name in one or many safetensors files; each is read when it is asked for."""

    def __init__(self, origin: Path, shards: dict[str, _Shard], verify: bool) -> None:
        self.origin = origin
        self._shards = shards
        self._verify = verify

    def keys(self) -> list[str]:
        """The tensors' names."""
        return list(self._shards)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def _of(self, name: str) -> _Shard:
        if name not in self._shards:
            raise KeyError(f"{self.origin}: {unknown('tensor', name, self._shards)}")
        return self._shards[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape without reading it."""
        return tuple(self._of(name).slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype without reading it."""
        return self._of(name).dtype(name)

    def load(self, name: str) -> Tensor:
        """Read a tensor; raises CorruptFile where its checksum is recorded and differs."""
        return self._of(name).load(name, self._verify)

    def __getitem__(self, name: str) -> Tensor:
        return self.load(name)

    def nbytes(self, name: str) -> int:
        """The bytes a tensor takes."""
        size = self.dtype(name).itemsize
        for length in self.shape(name):
            size *= length
        return size


def open_store(path: str | Path, *, verify: bool = True) -> TensorStore:
    """Open a .safetensors file, an index of shards, or the folder that holds either.

    `verify` compares each tensor with its recorded checksum as it is read, and an index with its recorded total.

    Raises:
        CorruptFile: a truncated, damaged or contradictory file.
        FileNotFoundError: no weights there, or a shard is missing.
        ValueError: the weights are pickles; says how to convert them.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if path.suffix in PICKLES:
        raise ValueError(_refusal(path))
    if path.name.endswith(".json"):
        return _open_index(path, verify)
    shard = _Shard(path)
    return TensorStore(path, dict.fromkeys(shard.names, shard), verify)


def _weights_in(folder: Path) -> Path:
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(entry.name for entry in found[:5])
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE} nor {INDEX}, but {names}: name one of them, not the folder"
        )
    pickles = sorted(entry for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickles:
        raise ValueError(_refusal(pickles[0]))
    raise FileNotFoundError(f"{folder} holds no weights: {SINGLE} or {INDEX} with its shards is expected there")


def _refusal(path: Path) -> str:
    return (
        f"{path} is a pickle, which can execute code when it is read, so it is refused. If you trust its origin, "
        f"convert it once: `safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {SINGLE!r})`"
    )


def _open_index(path: Path, verify: bool) -> TensorStore:
    index = _read_index(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f'{path} has no "weight_map" from tensor names to file names')
    files: dict[str, _Shard] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise CorruptFile(
                f"{path} sends the tensor {name!r} to {file!r}; a .safetensors file beside it is expected"
            )
        if file not in files:
            if not (path.parent / file).is_file():
                raise FileNotFoundError(f"{path} names the shard {file}, which is not in {path.parent}; get it as well")
            files[file] = _Shard(path.parent / file)
    _check_contents(path, weight_map, files)
    store = TensorStore(path, {name: files[file] for name, file in weight_map.items()}, verify)
    if verify:
        _check_total(path, index, store)
    return store


def _read_index(path: Path) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CorruptFile(f"{path} gives {twice!r} twice")
        return table

    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path} is not valid JSON: {error}") from error
    if not isinstance(index, dict):
        raise CorruptFile(f"{path} should hold a JSON object, it holds a {type(index).__name__}")
    return index


def _is_plain(file: str) -> bool:
    """A name of a safetensors file below the index's folder, under any system's rules; never another index."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    leaves = posix.is_absolute() or windows.is_absolute() or windows.drive or ".." in (*posix.parts, *windows.parts)
    return file.endswith(".safetensors") and not leaves and "\0" not in file


def _check_contents(path: Path, weight_map: dict[str, str], files: dict[str, _Shard]) -> None:
    owners: dict[str, str] = {}
    for file, shard in files.items():
        for name in shard.names:
            if name in owners:
                raise CorruptFile(f"{path}: the tensor {name!r} is in two shards, {owners[name]} and {file}")
            owners[name] = file
    for name, file in weight_map.items():
        if owners.get(name) != file:
            where = f"is in {owners[name]}" if name in owners else "is in none of the shards"
            raise CorruptFile(f"{path} sends the tensor {name!r} to {file}, but it {where}")
    extra = sorted(owners.keys() - weight_map.keys())
    if extra:
        raise CorruptFile(
            f"{path} does not list tensors that its shards hold: {', '.join(extra[:5])} ({len(extra)} in all)"
        )


def _check_total(path: Path, index: dict[str, Any], store: TensorStore) -> None:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is None:
        return
    actual = sum(store.nbytes(name) for name in store)
    if total != actual:
        raise CorruptFile(
            f"{path} states total_size {total!r}, but its shards hold {actual:,} bytes; get the shards again, or pass "
            "verify=False if the index is known to be wrong"
        )


@dataclass(frozen=True)
class _Written:
    path: Path
    names: list[str]


def write_shards(
    folder: str | Path, tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int = DEFAULT_SHARD_BYTES
) -> list[Path]:
    """Write tensors into `folder` as model.safetensors, or as shards of at most `max_bytes` with their index.

    At most one shard's tensors are held at a time when `tensors` is a generator. The folder is written in place: give a
    temporary one (`atomic.writing_directory`) for the result to appear whole or not at all. A tensor larger than
    `max_bytes` gets a shard of its own.

    Raises:
        ValueError: no tensors, or one name twice.
    """
    folder = Path(folder)
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    written: list[_Written] = []
    seen: set[str] = set()
    total = held = 0
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"the tensor {name!r} is given twice")
        seen.add(name)
        if shard and held + tensor.nbytes > max_bytes:
            written.append(_write_one(folder, len(written), shard))
            shard, held = {}, 0
        shard[name] = _plain(tensor)
        held += tensor.nbytes
        total += tensor.nbytes
    if not seen:
        raise ValueError("there are no tensors to write")
    written.append(_write_one(folder, len(written), shard))
    return _name_shards(folder, written, total)


def _plain(tensor: Tensor) -> Tensor:
    """Detach onto the CPU, contiguous, alone in its memory: what safetensors can write."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_one(folder: Path, index: int, shard: dict[str, Tensor]) -> _Written:
    path = folder / f"shard-{index + 1:05d}.partial"
    addresses: set[int] = set()
    for name, tensor in shard.items():
        if tensor.data_ptr() in addresses:  # tied tensors are written once for each of their names
            shard[name] = tensor.clone()
        addresses.add(tensor.data_ptr())
    checksums = json.dumps({name: checksum(tensor) for name, tensor in shard.items()})
    save_file(shard, path, metadata={"format": "pt", CHECKSUMS: checksums})
    return _Written(path, list(shard))


def _name_shards(folder: Path, written: list[_Written], total: int) -> list[Path]:
    """Give the files their final names, which hold the number of shards, and write the index of more than one."""
    if len(written) == 1:
        return [written[0].path.replace(folder / SINGLE)]
    paths = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(written, start=1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        paths.append(shard.path.replace(folder / name))
        weight_map.update(dict.fromkeys(shard.names, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def checksum(tensor: Tensor) -> str:
    """8 hexadecimal digits for a tensor's bytes: CRC-32 over the sums of the 64-bit words of every 4 KiB.

    One changed bit changes its word's sum and so always the checksum, at a tenth of the cost of a CRC of all bytes.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    if data.data_ptr() % 8 or data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // _SUMMED_BYTES * _SUMMED_BYTES
    sums = data[:whole].view(torch.int64).view(-1, _SUMMED_BYTES // 8).sum(dim=1)
    return f"{zlib.crc32(data[whole:].numpy().data, zlib.crc32(sums.numpy().data)):08x}"
