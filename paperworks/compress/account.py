"""The account of what compression cost: bits, bytes, and errors of weights and outputs, for each layer and in all."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from paperworks.compress.error import LayerError
from paperworks.compress.linear import CompressedLinear
from paperworks.core.coverage import Coverage, coverage_of
from paperworks.core.linear import is_linear_like, weight_of


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer: its weights, true storage in bytes and bits per weight (scales included), its errors."""

    path: str
    format: str
    weights: int
    bytes: int
    error: LayerError | None = None

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes / weights."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class Report:
    """The compressed layers, the model's bytes as a whole (parameters and buffers, tied ones once), and its score.

    `before` and `after` are what `score` gave for the original and the compressed model: perplexity, say.
    """

    layers: tuple[LayerReport, ...]
    model_bytes: int
    before: float | None = None
    after: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Over all compressed layers; NaN if there are none."""
        weights = sum(layer.weights for layer in self.layers)
        return 8 * sum(layer.bytes for layer in self.layers) / weights if weights else float("nan")

    @property
    def bytes(self) -> int:
        """Of the compressed layers."""
        return sum(layer.bytes for layer in self.layers)

    def __str__(self) -> str:
        one = {layer.format for layer in self.layers}
        columns = f"{'bits/weight':>11} {'bytes':>14} {'weight error':>13} {'output error':>13}"
        lines = [f"{'layer':48} {columns}" + ("  format" if len(one) > 1 else "")]
        for x in self.layers:
            errors = " ".join(f"{_share(value):>13}" for value in _errors(x.error))
            form = f"  {x.format}" if len(one) > 1 else ""
            lines.append(f"{x.path:48} {x.bits_per_weight:11.4f} {x.bytes:14,} {errors}{form}")
        form = f", all {one.pop()}" if len(one) == 1 else ""
        total = f"{len(self.layers)} layers, {self.bits_per_weight:.4f} bits/weight{form}; "
        total += f"model {self.model_bytes:,} bytes"
        if self.after is not None:
            was = "" if self.before is None else f"{self.before:.4f} before, "
            total += f"; perplexity {was}{self.after:.4f} after"
        return "\n".join([*lines, total])


def _errors(error: LayerError | None) -> tuple[float | None, float | None]:
    return (None, None) if error is None else (error.weight, error.output)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4%}"


def report(
    model: nn.Module, *, original: nn.Module | None = None, score: Callable[[nn.Module], float] | None = None
) -> Report:
    """Say what each compressed layer stores and lost, and the model as a whole.

    Args:
        model: with compressed layers; errors are those noted when they were compressed.
        original: the model before, from which the errors of the weights are measured where none were noted.
        score: such as `lambda m: train.perplexity(m, tokens)`; called with `model`, and with `original` if given.
    """
    layers = tuple(
        LayerReport(
            path=path,
            format=str(module.format),
            weights=module.in_features * module.out_features,
            bytes=sum(buffer.nbytes for buffer in module.stored.values()),
            error=module.error or _against(original, path, module),
        )
        for path, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    )
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return Report(
        layers=layers,
        model_bytes=sum(tensors.values()),
        before=score(original) if score is not None and original is not None else None,
        after=score(model) if score is not None else None,
    )


def coverage(model: nn.Module) -> Coverage:
    """The share of the model's weights that is stored in formats, and what is left out."""
    return coverage_of(model, [path for path, module in model.named_modules() if isinstance(module, CompressedLinear)])


@torch.no_grad()
def _against(original: nn.Module | None, path: str, module: CompressedLinear) -> LayerError | None:
    before = None if original is None else dict(original.named_modules()).get(path)
    if before is None or not is_linear_like(before):
        return None
    return LayerError.between(weight_of(before), module.decoded_weight())
