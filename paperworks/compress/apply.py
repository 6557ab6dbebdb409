"""Compressing the chosen layers of a model, and undoing it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from paperworks.compress.account import coverage
from paperworks.compress.calibration.calibration import Calibration, stages
from paperworks.compress.calibration.replay import Batch
from paperworks.compress.calibration.resume import Progress
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.error import LayerError
from paperworks.compress.format import WeightFormat
from paperworks.compress.linear import CompressedLinear
from paperworks.core.coverage import warn_of_gaps
from paperworks.core.linear import bias_of, weight_of
from paperworks.core.selection import Targets, patterns_of, replace_module, require_model, select_linears

Watcher = Callable[[str, int, int], None]
Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def apply(
    model: Model,
    format: WeightFormat | str,
    targets: Targets = "all-linear",
    *,
    calibration: Calibration | Sequence[Batch] | None = None,
    resume: str | Path | None = None,
    progress: Watcher | None = None,
) -> Model:
    """Replace the chosen linear layers by ones whose weight is stored in `format`; in place.

    When anything fails the model is left as it was.

    Args:
        model: any module, ours or another library's.
        format: such as `NF4(block=64, double_quantization=True)` or `GPTQ(bits=4, group=128)`, or a name of
            `compress.names()`.
        targets: see `nn.select`.
        calibration: batches (tensors of token ids, or whatever the model is called with) for formats that learn from
            data; with formats that do not, they serve to measure each layer's output error. See `Calibration`.
        resume: a folder where each finished block is kept until all are done; called again after an interruption with
            the same arguments, the work goes on at the block where it stopped.
        progress: called with (path, done, total) after each layer.

    Raises:
        ValueError: when a target matches nothing, is compressed already, or carries an adapter; when the format cannot
            hold a layer, or learns from data and there is none. Names the layer.
        MemoryError: when calibration does not fit; says how to lower the need.
    """
    require_model(model)
    format = _a_format(format)
    chosen = _untouched(select_linears(model, targets))
    if calibration is None and format.needs:
        format.learned(None)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    kept = None if resume is None else Progress(resume, format, chosen, calibration)
    originals: dict[str, nn.Module] = {}

    def compress_layer(path: str, statistics: Statistics | None) -> None:
        module = chosen[path]
        compressed = kept.layer(path, module, format) if kept is not None else None
        if compressed is None:
            compressed = _compressed(path, module, format, statistics)
        originals[path] = module
        replace_module(model, path, compressed.train(module.training))
        if kept is not None:
            kept.note(path, compressed)
        if progress is not None:
            progress(path, len(originals), len(chosen))

    def done_before(paths: Sequence[str]) -> bool:
        if kept is None:
            return False
        kept.flush()
        if not all(path in kept for path in paths):
            return False
        for path in paths:
            compress_layer(path, None)
        return True

    try:
        if calibration is None:
            for path in chosen:
                compress_layer(path, None)
                if kept is not None:
                    kept.flush()
        else:
            needs = sorted({*format.needs, "second_moment"})  # the second moment also measures the output error
            for stage in stages(model, list(chosen), calibration, needs, done_before):
                for path in stage.paths:
                    compress_layer(path, stage.statistics)
    except BaseException:
        if kept is not None:
            kept.stop()
        for path, module in originals.items():
            replace_module(model, path, module)
        raise
    if kept is not None:
        kept.clear()
    if "all-linear" in patterns_of(targets):
        warn_of_gaps(coverage(model), "all-linear", "these stay as they are", stacklevel=4)
    return model


def _a_format(format: object) -> WeightFormat:
    if isinstance(format, str):
        from paperworks.compress.named import named

        return named(format)
    if isinstance(format, type) and issubclass(format, WeightFormat):
        raise ValueError(f"pass a weight format, not the class: compress.{format.__name__}() or with settings of yours")
    if not isinstance(format, WeightFormat):
        raise ValueError(
            f"the second argument is the format, such as compress.NF4(), then the targets; got {format!r:.80}"
        )
    return format


def _untouched(chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers if none of them is compressed or adapted."""
    for path, module in chosen.items():
        if isinstance(module, CompressedLinear):
            raise ValueError(
                f"{path} is compressed already, as {module.format}; compressing twice would add the errors. "
                "Load the model again, or decode it with compress.decompress(model) first"
            )
        if hasattr(module, "base"):
            raise ValueError(
                f"{path} carries an adapter: compress the base first (targets {path + '.base'!r}) or merge it"
            )
    return chosen


def _compressed(path: str, module: nn.Module, format: WeightFormat, statistics: Statistics | None) -> CompressedLinear:
    weight = weight_of(module)
    needed, has = getattr(module, "input_norm", None), getattr(format, "norm", None)
    if needed is not None and needed != has:
        raise ValueError(
            f"{path} normalizes its inputs by itself, which {type(format).__name__} would leave out: use "
            f"compress.Ternary(norm={needed})"
        )
    try:
        compressed = CompressedLinear(format, weight, bias_of(module), statistics)
    except (ValueError, ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined, unused-ignore]
        raise ValueError(f"{path}: {error}") from error
    moment = None if statistics is None else statistics.second_moment
    compressed.error = LayerError.between(weight, compressed.decoded_weight(), moment)
    return compressed


@torch.no_grad()
def decompress(model: Model) -> Model:
    """Turn compressed layers back into plain ones that hold the decoded weights; in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            weight = module.decoded_weight()
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.detach())
            replace_module(model, path, plain.train(module.training))
    return model
