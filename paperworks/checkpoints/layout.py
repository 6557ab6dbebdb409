"""How another layout's tensors correspond to ours: rules that read both ways, and the import that follows them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paperworks.adapt.apply import names
from paperworks.compress.linear import CompressedLinear
from paperworks.core.errors import CorruptFile
from paperworks.core.processes import paths_kept_apart
from paperworks.models import ModelSpec
from paperworks.models.model import tie
from paperworks.nn.feedforward.experts.parallel import Elsewhere


class TensorSource(Protocol):
    """Named tensors that can be looked at before they are read."""

    def keys(self) -> Iterable[str]:
        """The names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""

    def load(self, name: str) -> Tensor:
        """Read one tensor."""


class Codec(ABC):
    """One tensor of theirs against one or more of ours."""

    @abstractmethod
    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Our tensors, which should have `shapes`."""

    @abstractmethod
    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Their tensor."""


@dataclass(frozen=True)
class Stacked(Codec):
    """Ours are blocks of rows of theirs; one of them is the plain case. `transposed`: theirs is stored (in, out)."""

    transposed: bool = False

    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Cut into rows."""
        theirs = theirs.t() if self.transposed else theirs
        return list(theirs.split([shape[0] for shape in shapes])) if len(shapes) > 1 else [theirs]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Stack the rows."""
        stacked = torch.cat(list(ours)) if len(ours) > 1 else ours[0]
        return stacked.t() if self.transposed else stacked


@dataclass(frozen=True)
class HeadInterleaved(Codec):
    """Rows ordered (head, [query, key, value], channel), as in GPT-NeoX's query_key_value."""

    heads: int

    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Gather each part's rows."""
        parts = theirs.unflatten(0, (self.heads, len(shapes), -1))
        return [parts[:, index].flatten(0, 1) for index in range(len(shapes))]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Interleave the parts head by head."""
        return torch.stack([part.unflatten(0, (self.heads, -1)) for part in ours], 1).flatten(0, 2)


@dataclass(frozen=True)
class RotaryPermuted(Codec):
    """Rows of a head ordered for adjacent-pair rotation (GGUF's llama), ours for half-split rotation."""

    heads: int

    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Bring the first and the second channel of each pair to the two halves of the head."""
        return [theirs.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Put the channels of each pair side by side."""
        out: Tensor = ours[0].unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return out


@dataclass(frozen=True)
class Shifted(Codec):
    """Theirs is ours plus a constant (GGUF stores Gemma's gains with the 1 added)."""

    by: float

    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Subtract the constant."""
        return [theirs - self.by]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Add the constant."""
        return ours[0] + self.by


@dataclass(frozen=True)
class Reshaped(Codec):
    """Theirs is ours in another shape."""

    shape: tuple[int, ...]

    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Give it our shape."""
        return [theirs.reshape(shapes[0])]

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Give it theirs."""
        return ours[0].reshape(self.shape)


@dataclass(frozen=True)
class Rule:
    """Their tensor `theirs` holds our tensors `ours`; `optional` if a file may leave it out."""

    theirs: str
    ours: tuple[str, ...]
    codec: Codec = Stacked()
    optional: bool = False


def pair(theirs: str, *ours: str, codec: Codec = Stacked(), optional: bool = False) -> Iterator[Rule]:
    """The rules of a layer's weight and bias; a transposed weight has a bias as any other."""
    yield Rule(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), codec, optional)
    of_bias = Stacked() if isinstance(codec, Stacked) else codec
    yield Rule(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), of_bias, optional)


def require_depth(spec: ModelSpec, source: TensorSource, origin: str) -> None:
    """Refuse a description with more blocks than there are tensors, before anything is made for each block."""
    count = sum(1 for _ in source.keys())  # noqa: SIM118  (not a mapping)
    depth = spec.layers()
    if depth > count:
        raise CorruptFile(f"{origin} describes {depth} blocks but holds only {count} tensors")


def build_empty(spec: ModelSpec) -> Any:
    """Build a model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return spec.build()


def import_weights(
    spec: ModelSpec,
    source: TensorSource,
    rules: Sequence[Rule],
    *,
    dtype: torch.dtype | None = None,
    ignorable: Callable[[str], bool] = lambda name: False,
    origin: str = "the checkpoint",
) -> Any:
    """Build the model and fill it from `source`, tensor by tensor, so that memory holds the model once.

    Raises:
        CorruptFile: listing at once everything that is missing, unexpected or of another shape (both shapes given).
    """
    model = build_empty(spec)
    elsewhere = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Elsewhere))
    names = {name for name in source.keys() if not name.startswith(elsewhere)}  # noqa: SIM118 (not a mapping)
    wanted = model.state_dict()
    rules = [rule for rule in rules if all(name in wanted for name in rule.ours)]
    problems = _mismatches(rules, source, names, wanted, ignorable)
    if problems:
        listing = "\n  ".join(problems[:30]) + (f"\n  ... and {len(problems) - 30} more" if len(problems) > 30 else "")
        raise CorruptFile(f"{origin} does not fit its own description:\n  {listing}")
    for rule in rules:
        if rule.theirs not in names:
            continue
        shapes = [wanted[name].shape for name in rule.ours]
        for name, tensor in zip(rule.ours, rule.codec.split(source.load(rule.theirs), shapes), strict=True):
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            set_parameter(model, name, tensor.to(kind).contiguous())
    tie(model)
    return model.eval()


def require_whole(model: nn.Module) -> None:
    """Raise `ValueError` where other processes keep some of the model's experts."""
    if paths_kept_apart(model):
        raise ValueError(
            "this process keeps only its share of the experts (ParallelExperts): load train.full_state(model), which "
            "all processes ask for together, into the model with Experts in their place, and save that in one of them"
        )


def set_parameter(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer at `path`."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if name in owner._buffers:
        owner.register_buffer(name, tensor)
    else:
        owner.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def _mismatches(
    rules: Sequence[Rule],
    source: TensorSource,
    names: set[str],
    wanted: Mapping[str, Tensor],
    ignorable: Callable[[str], bool],
) -> list[str]:
    problems = []
    for rule in rules:
        ours = [torch.empty(wanted[name].shape, device="meta") for name in rule.ours]
        expected = tuple(rule.codec.join(ours).shape)
        if rule.theirs not in names:
            if not rule.optional:
                problems.append(f"missing {rule.theirs} {expected}")
        elif tuple(source.shape(rule.theirs)) != expected:
            problems.append(f"{rule.theirs} has shape {tuple(source.shape(rule.theirs))}, expected {expected}")
    used = {rule.theirs for rule in rules}
    problems += [f"unexpected {name}" for name in sorted(names - used) if not ignorable(name)]
    return problems


def repeated_names(model: nn.Module) -> set[str]:
    """Names under which a parameter appears again: tied tables, positions that layers share."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    return {name for name, parameter in named if first.setdefault(id(parameter), name) != name}


def export_weights(model: nn.Module, rules: Sequence[Rule]) -> Iterator[tuple[str, Tensor]]:
    """Yield their tensors one by one from our model; every tensor of it is written, or nothing is.

    Raises:
        ValueError: before the first tensor, when the model holds tensors that the rules do not reach: adapters,
            compressed layers, parts that the layout has no name for.
    """
    state = model.state_dict()
    written = [rule for rule in rules if all(name in state for name in rule.ours)]
    _require_all_written(model, state, {name for rule in written for name in rule.ours})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for rule in written:
            yield rule.theirs, rule.codec.join([state[name].detach() for name in rule.ours]).contiguous()

    return tensors()


def _require_all_written(model: nn.Module, state: Mapping[str, Tensor], written: set[str]) -> None:
    adapters = names(model)
    if adapters:
        raise ValueError(
            f"the model carries adapters ({', '.join(map(repr, adapters))}), which this layout cannot hold: merge them "
            "first (adapt.merge(model)), or write them by themselves (adapt.save, adapt.save_peft)"
        )
    compressed = [path for path, module in model.named_modules() if isinstance(module, CompressedLinear)]
    if compressed:
        raise ValueError(
            f"the model has compressed layers ({compressed[0]} and {len(compressed) - 1} more), which this layout "
            "cannot hold: decode them first (compress.decompress(model)), or keep them as they are with paperworks.save"
        )
    left_out = sorted(set(state) - written - repeated_names(model))
    if left_out:
        raise ValueError(
            f"the layout has no place for {', '.join(left_out[:4])}{' ...' if len(left_out) > 4 else ''} "
            f"({len(left_out)} tensors of the model): nothing was written; use paperworks.save"
        )
