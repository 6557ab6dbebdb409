"""Keeping finished blocks in a folder, so that a long compression goes on where it was interrupted."""

import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.compress.calibration.calibration import Calibration
from paperworks.compress.error import LayerError
from paperworks.compress.format import WeightFormat
from paperworks.compress.linear import CompressedLinear
from paperworks.core import atomic
from paperworks.core.errors import CorruptFile
from paperworks.core.linear import bias_of, features, weight_of

VERSION = 1
PLAN = "plan.json"


class Progress:
    """The finished layers of one compression, each unit (a block, or a layer by itself) in a file of its own.

    Raises:
        ValueError: when the folder belongs to another compression; says what differs.
        CorruptFile: when the folder's plan cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        format: WeightFormat,
        chosen: Mapping[str, nn.Module],
        calibration: Calibration | None,
    ) -> None:
        self.folder = Path(folder)
        self._waiting: dict[str, CompressedLinear] = {}
        self._found: dict[str, Path] = {}
        plan = {
            "version": VERSION,
            "format": format.to_dict(),
            "layers": {path: list(features(module)) for path, module in chosen.items()},
            "weights": _fingerprint([weight_of(module) for module in chosen.values()]),
            "calibration": None if calibration is None else _fingerprint(calibration.batches),
            "sequential": None if calibration is None else calibration.sequential,
        }
        if calibration is not None and calibration.tune is not None:
            raise ValueError("resume keeps compressed layers only: it cannot be combined with Calibration.tune")
        if (self.folder / PLAN).exists():
            self._check(plan)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} holds other files; give resume= a new or empty folder, or one that an interrupted "
                "compression left"
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic.writing_file(self.folder / PLAN) as out:
                Path(out).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        for file in sorted(self.folder.glob("*.safetensors")):
            self._found |= dict.fromkeys(_read_header(file), file)

    def _check(self, plan: dict[str, Any]) -> None:
        try:
            found = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CorruptFile(
                f"{self.folder / PLAN} cannot be read: {error}; delete the folder to start anew"
            ) from error
        different = [name for name in plan if not isinstance(found, dict) or found.get(name) != plan[name]]
        if different:
            raise ValueError(
                f"{self.folder} was left by another compression (different: {', '.join(different)}); give resume= "
                "another folder, or delete this one to start anew"
            )

    def __contains__(self, path: str) -> bool:
        return path in self._found

    def layer(self, path: str, module: nn.Module, format: WeightFormat) -> CompressedLinear | None:
        """A layer that was finished before the interruption, or None."""
        from safetensors import safe_open

        if path not in self._found:
            return None
        with safe_open(self._found[path], framework="pt") as file:
            note = json.loads(file.metadata()["layers"])[path]
            stored = {name: file.get_tensor(f"{path}:{name}").to(weight_of(module).device) for name in note["stored"]}
        columns, rows = features(module)
        layer = CompressedLinear.from_stored(format, stored, (rows, columns), weight_of(module).dtype, bias_of(module))
        layer.error = None if note["error"] is None else LayerError(*note["error"])
        return layer

    def note(self, path: str, layer: CompressedLinear) -> None:
        """Remember a finished layer; it is written by the next `flush`."""
        if path not in self._found:
            self._waiting[path] = layer

    def flush(self) -> None:
        """Write the layers noted since the last time; the file appears whole or not at all."""
        from safetensors.torch import save_file

        if not self._waiting:
            return
        notes = {
            path: {
                "stored": list(layer.stored),
                "error": None if layer.error is None else [layer.error.weight, layer.error.output],
            }
            for path, layer in self._waiting.items()
        }
        tensors = {
            f"{path}:{name}": tensor.detach().cpu().contiguous()
            for path, layer in self._waiting.items()
            for name, tensor in layer.stored.items()
        }
        taken = [int(file.stem) for file in self.folder.glob("*.safetensors") if file.stem.isdecimal()]
        file = self.folder / f"{max(taken, default=-1) + 1:05d}.safetensors"
        with atomic.writing_file(file) as out:
            save_file(tensors, out, metadata={"layers": json.dumps(notes)})
        self._waiting.clear()

    def stop(self) -> None:
        """Write what is finished; where nothing is, the folder goes as well, so that it is in nobody's way."""
        self.flush()
        if not any(self.folder.glob("*.safetensors")):
            self.clear()

    def clear(self) -> None:
        """Remove the folder: the work is done."""
        shutil.rmtree(self.folder)


def _read_header(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(json.loads(opened.metadata()["layers"]))
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorruptFile(f"{file} cannot be read: {error}; delete it, and its block is compressed again") from error


def _fingerprint(value: Any, start: int = 0) -> str:
    """8 hexadecimal digits for tensors nested in lists, tuples and mappings."""
    for tensor in _tensors(value):
        flat = tensor.detach().cpu().contiguous().view(-1)
        start = zlib.crc32(flat.view(torch.uint8).numpy().data, start)
    return f"{start:08x}"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items: Sequence[Any] = []
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = value
    return [tensor for item in items for tensor in _tensors(item)]
