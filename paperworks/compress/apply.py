"""Compressing the chosen layers of a model, and the account of what it cost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from paperworks.compress.format import WeightFormat
from paperworks.compress.linear import CompressedLinear
from paperworks.nn.linear import bias_of, weight_of
from paperworks.nn.selection import Targets, replace_module, select_linears


@torch.no_grad()
def apply(
    model: nn.Module,
    format: WeightFormat,
    targets: Targets = "all-linear",
    *,
    calibration: object | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """Replace the chosen linear layers by ones whose weight is stored in `format`; in place, one layer at a time.

    Args:
        model: any module, ours or another library's.
        format: such as `NF4(block=64, double_quantization=True)`.
        targets: see `nn.select`.
        calibration: for formats that learn from data; these need none and refuse it.
        progress: called with (path, done, total) after each layer.

    Raises:
        ValueError: when a target matches nothing, is compressed already, or carries an adapter.
    """
    if calibration is not None:
        raise ValueError(f"{type(format).__name__} learns nothing from data: leave calibration out")
    chosen = select_linears(model, targets)
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
    for done, (path, module) in enumerate(chosen.items(), 1):
        weight = weight_of(module)
        try:
            compressed = CompressedLinear(format, weight, bias_of(module))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        compressed.train(module.training)
        replace_module(model, path, compressed)
        if progress is not None:
            progress(path, done, len(chosen))
    return model


@torch.no_grad()
def decompress(model: nn.Module) -> nn.Module:
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


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer: its weights, true storage in bytes and bits per weight (scales included)."""

    path: str
    format: str
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes / weights."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class Report:
    """The compressed layers, and the model's bytes as a whole (parameters and buffers, tied ones once)."""

    layers: tuple[LayerReport, ...]
    model_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Over all compressed layers; NaN if there are none."""
        weights = sum(layer.weights for layer in self.layers)
        return 8 * sum(layer.bytes for layer in self.layers) / weights if weights else float("nan")

    def __str__(self) -> str:
        lines = [f"{'layer':48} {'bits/weight':>11} {'bytes':>14}  format"]
        lines += [f"{x.path:48} {x.bits_per_weight:11.4f} {x.bytes:14,}  {x.format}" for x in self.layers]
        return "\n".join(
            [
                *lines,
                f"{len(self.layers)} layers, {self.bits_per_weight:.4f} bits/weight; model {self.model_bytes:,} bytes",
            ]
        )


def report(model: nn.Module) -> Report:
    """Say what each compressed layer stores, and the model as a whole."""
    layers = tuple(
        LayerReport(
            path=path,
            format=str(module.format),
            weights=module.in_features * module.out_features,
            bytes=sum(buffer.nbytes for buffer in module.stored.values()),
        )
        for path, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    )
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return Report(layers=layers, model_bytes=sum(tensors.values()))
