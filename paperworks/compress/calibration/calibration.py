"""Calibration: the one way by which methods that learn from data see it.

Batches run through the model block by block. Of each block's linear layers those that read the same input (query, key
and value, say) form a stage; the stages are visited in the order of execution. At each stage the inputs are gathered
as `Statistics`, the caller compresses the stage's layers, and what follows sees the compressed layers' own outputs,
as in GPTQ's sequential procedure (Frantar et al. 2022, arXiv:2210.17323, Section 4). Between blocks only the hidden
states are kept: memory is one block's statistics and the batches' hidden states, whatever the depth.

Blocks are the entries of the outermost `ModuleList` above a layer, where each feeds the next; in any other module the
whole model is run again for every stage, which is slower and always right.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.compress.calibration.replay import Batch, Enough, Tune, Unit, units
from paperworks.compress.calibration.statistics import SAMPLES, Gatherer, Statistics
from paperworks.core.modes import evaluating


@dataclass(frozen=True)
class Calibration:
    """The data for methods that learn from it, and how it is shown to the model.

    Attributes:
        batches: what the model is called with: a tensor of token ids (batch, time), a mapping of keyword arguments, or
            a sequence of positional ones.
        sequential: later layers see the compressed earlier ones; False gathers everything from the dense model.
        samples: rows of input to keep for methods that ask for samples.
        tune: called after a block is compressed, as `tune(block, inputs, outputs, run)`: the block's hidden inputs and
            the outputs it had before, one of each a batch, and `run(index, input)` which runs the block.
    """

    batches: Sequence[Batch]
    sequential: bool = True
    samples: int = SAMPLES
    tune: Tune | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batches, Tensor | Mapping):
            raise ValueError(
                f"calibration must be a list of batches, got one {type(self.batches).__name__}; wrap it: [batch]"
            )
        object.__setattr__(self, "batches", list(self.batches))
        if not self.batches:
            raise ValueError("calibration has no batches: give at least one, such as [tokens] with (batch, time) ids")
        if self.samples < 1:
            raise ValueError(f"Calibration.samples must be at least 1, got {self.samples}")


@dataclass(frozen=True)
class Stage:
    """Layers that read the same input, what that input looked like, and the place of the stage in the model."""

    paths: tuple[str, ...]
    statistics: Statistics
    unit: str  # the block, or "" for the model as a whole


def stages(
    model: nn.Module,
    paths: Sequence[str],
    calibration: Calibration,
    needs: Sequence[str],
    finished: Callable[[Sequence[str]], bool] = lambda paths: False,
) -> Iterator[Stage]:
    """Visit the linear layers of `paths`; between two stages the caller may replace the layers it was given.

    Args:
        model: any module; it is run in evaluation mode without gradients, and left in the mode it was in.
        paths: linear-like modules of the model.
        calibration: the batches.
        needs: the statistics to gather.
        finished: called before each block with its layers; True passes over it: they are compressed already.

    Raises:
        ValueError: when an input is NaN or infinite or a layer is never reached; names the layer.
        MemoryError: when the batches do not fit; says how to lower the need.
    """
    with _without_cache(model), torch.no_grad():
        try:
            for unit in units(model, list(paths), calibration.batches):
                if not finished(unit.paths):
                    yield from _visit(unit, calibration, needs)
                unit.advance()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MemoryError(
                f"calibration ran out of memory ({error}). Give fewer or shorter batches (their hidden states are kept "
                "between blocks), smaller ones (one batch runs at a time), or fewer targets"
            ) from error


def _visit(unit: Unit, calibration: Calibration, needs: Sequence[str]) -> Iterator[Stage]:
    groups = unit.groups()
    targets = unit.outputs() if calibration.tune is not None else None
    if calibration.sequential:
        for group in groups:
            found = _gather(unit, [group], calibration, needs)
            yield Stage(group, found[group], unit.path)
    else:
        found = _gather(unit, groups, calibration, needs)
        for group in groups:
            yield Stage(group, found.pop(group), unit.path)
    if calibration.tune is not None and targets is not None:
        unit.tune(calibration.tune, targets)


def _gather(
    unit: Unit, groups: Sequence[tuple[str, ...]], calibration: Calibration, needs: Sequence[str]
) -> dict[tuple[str, ...], Statistics]:
    """Run all batches and gather the input of each group's first layer; stop each run when the last one was seen."""
    gatherers: dict[tuple[str, ...], Gatherer] = {}

    def watch(group: tuple[str, ...], last: bool) -> Callable[[nn.Module, Any], None]:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            gatherer = gatherers.setdefault(group, Gatherer(inputs[0].shape[-1], needs, calibration.samples))
            try:
                gatherer.add(inputs[0])
            except ValueError as error:
                raise ValueError(
                    f"{group[0]}: {error}; look for NaN in the calibration data, in the weights or in a layer "
                    "compressed before"
                ) from error
            if last:
                raise Enough

        return see

    modules = dict(unit.model.named_modules())
    hooks = [
        modules[group[0]].register_forward_pre_hook(watch(group, unit.may_stop and group is groups[-1]))
        for group in groups
    ]
    try:
        for index in range(len(calibration.batches)):
            unit.run(index)
    finally:
        for hook in hooks:
            hook.remove()
    for group in groups:
        if group not in gatherers or not gatherers[group].count:
            raise ValueError(f"{group[0]}: no calibration token reached it; give more text, or leave it out of targets")
    return {group: gatherers[group].statistics() for group in groups}


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no key-value cache in models of transformers: a block must be callable twice."""
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if cached is not None:
        config.use_cache = False
    try:
        with evaluating(model):
            yield
    finally:
        if cached is not None:
            config.use_cache = cached
