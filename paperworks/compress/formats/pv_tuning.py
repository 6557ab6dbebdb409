"""PV-Tuning (Malinovskii et al. 2024, arXiv:2405.14852): training compressed weights, codes included.

A compressed matrix What has values (codebooks, scales) and a partition (the codes). Two steps alternate on a loss phi:

    P: with the codes as they are, move the values along their gradient                      (Adam)
    V: with the values as they are, move the codes of a few groups of weights to those nearest to

           T = What - step,    step along Adam's direction for d phi / d What,  ||step|| = code_lr ||What||

V is confined to the groups where T is farthest from What, at most a share of them: a step of the same length over all
groups moves each of them too little to come nearer to another code, and nothing changes. In the authors' recipe the
steps are also summed up in a latent weight (T starts where the last T ended, not at What), as in straight-through
estimation; what is new to that are the few codes at a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.compress.format import Stored
from paperworks.compress.linear import CompressedLinear
from paperworks.core.selection import replace_module


@runtime_checkable
class GroupFormat(Protocol):
    """What PV-Tuning asks of a format: groups of columns with codes of their own, as AQLM and KMeansVQ have."""

    @property
    def group(self) -> int:
        """Columns that one set of codes stands for."""

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Tensor:
        """See `WeightFormat`."""

    def reencode(self, weight: Tensor, stored: Stored) -> Stored:
        """See `WeightFormat`."""

    def pack(self, codes: Tensor) -> Tensor:
        """The codes (rows, groups, any) as they are stored."""

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Undo `pack`."""


def largest_groups(step: Float[Tensor, "rows columns"], group: int, share: float) -> Bool[Tensor, "rows groups"]:
    """Which groups move farthest: ceil(share x groups) of them."""
    lengths = step.reshape(len(step), -1, group).square().sum(-1)
    count = math.ceil(share * lengths.numel())
    chosen = torch.zeros(lengths.numel(), dtype=torch.bool, device=step.device)
    chosen[lengths.flatten().topk(count).indices] = True
    return chosen.view(lengths.shape)


@torch.no_grad()
def v_step(
    format: GroupFormat,
    stored: Stored,
    shape: tuple[int, int],
    target: Float[Tensor, "rows columns"],
    chosen: Bool[Tensor, "rows groups"],
) -> Stored:
    """Give the chosen groups the codes nearest to `target`; all others and the values stay.

    For phi quadratic with largest curvature L and target What - gradient / L this is the exact minimum of the
    linearised loss, and phi cannot rise.
    """
    wanted = torch.where(chosen.repeat_interleave(format.group, 1), target, format.decode(stored, shape))
    before = format.unpack(stored["codes"], shape)
    after = format.unpack(format.reencode(wanted, stored)["codes"], shape)
    return stored | {"codes": format.pack(torch.where(chosen[..., None], after, before))}


class TunableLinear(nn.Module):
    """A compressed layer in training: y = x (decode(codes, values) + probe)^T + bias.

    `probe` is zero in every forward pass: its gradient is that of the decoded weight.
    """

    def __init__(self, layer: CompressedLinear) -> None:
        super().__init__()
        if not isinstance(layer.format, GroupFormat) or not layer.format.continuous:
            raise ValueError(
                f"PV-Tuning needs a format with codes for groups of columns and values to train, such as AQLM or "
                f"KMeansVQ; {type(layer.format).__name__} is none"
            )
        self.layer = [layer]  # in a list: its buffers are not this module's
        self.format: Any = layer.format
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.shape = layer.shape
        self.values = nn.ParameterDict(
            {name: nn.Parameter(layer.stored[name].detach().float().clone()) for name in layer.format.continuous}
        )
        rest = {name: tensor for name, tensor in layer.stored.items() if name not in self.values}
        for name, tensor in rest.items():
            self.register_buffer(name, tensor.clone())
        self.probe = nn.Parameter(torch.zeros(self.shape, device=layer.stored["codes"].device))
        self.bias = layer.bias

    @property
    def stored(self) -> Stored:
        """The tensors of the format, the values in float32."""
        return {**{n: t for n, t in self._buffers.items() if t is not None}, **dict(self.values.items())}

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Multiply by the decoded weight."""
        weight = self.format.decode(self.stored, self.shape) + self.probe
        return F.linear(x, weight.to(x.dtype), self.bias)

    def compressed(self) -> CompressedLinear:
        """The layer this was made of, with what was learned in the types it stores."""
        layer = self.layer[0]
        with torch.no_grad():
            for name, tensor in self.stored.items():
                layer._buffers[name] = tensor.detach().to(layer.stored[name].dtype)
        return layer


@contextmanager
def tunable(model: nn.Module) -> Iterator[list[TunableLinear]]:
    """Make the compressed layers of a model trainable inside the block; afterwards they store what was learned.

    Raises `ValueError` where there are none, or one whose format has no groups.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, CompressedLinear)}
    if not found:
        raise ValueError("no compressed layers to tune: call compress.apply(model, format) first")
    layers = {path: TunableLinear(module) for path, module in found.items()}
    for path, layer in layers.items():
        replace_module(model, path, layer)
    try:
        yield list(layers.values())
    finally:
        for path, layer in layers.items():
            replace_module(model, path, layer.compressed())


class PVTuning(torch.optim.Adam):
    """P and V steps from one backward pass; train with `Settings(optimizer=lambda groups: PVTuning(model))`.

    Straight-through estimation is the same with `share=1`: every group takes the code nearest to its latent weight.
    `share=0` leaves the codes as they are.

    Args:
        model: with `tunable` layers; whatever else in it requires a gradient is trained like the values.
        lr: of the values (Adam, betas 0.9 and 0.95; the authors' repository: 3e-4).
        code_lr: length of a V step relative to the weight (the repository: 1e-2); with `decay=1` of the groups chosen.
        share: of each matrix's groups that may change their codes in a step (the repository: 0.01).
        decay: what part of the way not gone is forgotten after each step; 0 (the repository's) forgets nothing, 1
            starts each time from What.

    Raises:
        ValueError: for numbers out of range, and a model without tunable layers.
    """

    def __init__(
        self, model: nn.Module, lr: float = 3e-4, code_lr: float = 1e-2, share: float = 0.01, decay: float = 0.0
    ) -> None:
        for name, value in (("share", share), ("decay", decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"PVTuning.{name} must be between 0 and 1, got {value}")
        self.layers = [module for module in model.modules() if isinstance(module, TunableLinear)]
        if not self.layers:
            raise ValueError("PVTuning found no tunable layers: make it inside `with tunable(model):`")
        probes = [layer.probe for layer in self.layers]
        known = {id(probe) for probe in probes}
        values = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups = [
            {"params": values, "lr": lr, "betas": (0.9, 0.95)},
            {"params": probes, "lr": code_lr, "betas": (0.0, 0.95)},
        ]
        super().__init__(groups, foreach=False)
        self.defaults["code_lr"] = code_lr
        self.share, self.decay = share, decay
        self.changed = 0  # groups whose codes the last step changed

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the values, then the codes."""
        before = {} if self.decay == 1 else {layer: self._latent(layer) for layer in self.layers}
        loss = super().step(closure)  # leaves in each probe Adam's step for the decoded weight
        self.changed = 0
        for layer in self.layers:
            if self.share and layer.probe.grad is not None:
                self._move_codes(layer, before.get(layer))
            layer.probe.zero_()
        return loss

    def _latent(self, layer: TunableLinear) -> Tensor:
        """The weight that gathers the steps; at first the decoded one."""
        state = self.state[layer.probe]
        out: Tensor = state["latent"] if "latent" in state else layer.format.decode(layer.stored, layer.shape)
        return out

    def _move_codes(self, layer: TunableLinear, latent: Tensor | None) -> None:
        stored = layer.stored
        weight = layer.format.decode(stored, layer.shape)
        step = layer.probe
        start = weight if latent is None else latent
        rate = float(self.param_groups[1]["lr"])
        chosen = largest_groups(start + _sized(step, weight, rate) - weight, layer.format.group, self.share)
        inside = step if latent is not None else step * chosen.repeat_interleave(layer.format.group, 1)
        target = start + _sized(inside, weight, rate)
        codes = v_step(layer.format, stored, layer.shape, target, chosen)["codes"]
        old, new = (layer.format.unpack(c, layer.shape) for c in (stored["codes"], codes))
        self.changed += int((old != new).any(-1).sum())
        layer._buffers["codes"] = codes
        if latent is not None:
            now = layer.format.decode(layer.stored, layer.shape)
            self.state[layer.probe]["latent"] = now + (1 - self.decay) * (target - now)


def _sized(step: Tensor, weight: Tensor, rate: float) -> Tensor:
    """The step with length rate x ||weight||."""
    out: Tensor = step * (rate * weight.norm() / step.norm().clamp(min=1e-30))
    return out
