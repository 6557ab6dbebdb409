"""The backbone that models share: blocks along one residual stream of vectors, then a norm. It knows no tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.core import initialization
from paperworks.core.initialization import Initialization
from paperworks.models.arrangement import BlockModule
from paperworks.models.block import Block
from paperworks.models.model import ModelSpec
from paperworks.nn import Cache, LinearKind, Norm, Placement, auxiliary
from paperworks.nn.linear_kind import convert_linears


@dataclass(frozen=True, kw_only=True)
class Stack(ModelSpec):
    """Blocks and a norm: vectors (batch, time, dim) -> vectors of the same shape.

    A model of any modality is an input part, a stack and a head: subclass it (as `TokenStack` does, whose modules have
    the blocks at `blocks.i`), or hold one as a field.

    Attributes:
        dim: width of the residual stream; depth: blocks.
        block: one spec for every layer, or a tuple of `depth` specs.
        norm: the norm after the last block; None for post-norm models.
        linear: what the linear layers of the blocks are (BitNet: `BitLinear()`); None for plain ones.
        init_std: standard deviation of fresh weights; layers that write to the residual stream get
            init_std / sqrt(2 depth).
        init: another rule for plain layers (`T5Initialization`). Parts whose papers prescribe their own draw it
            themselves.
    """

    dim: int
    depth: int
    block: Block | tuple[Block, ...]
    norm: Norm | None
    linear: LinearKind | None = None
    init_std: float = 0.02
    init: Initialization = Initialization()

    def validate(self) -> None:
        """Check sizes, and every block against the width."""
        kind = type(self).__name__
        for name in ("dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{kind}.{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.init_std) and self.init_std >= 0):
            raise ValueError(f"{kind}.init_std must be a finite number of at least 0, got {self.init_std}")
        if isinstance(self.block, tuple) and len(self.block) != self.depth:
            raise ValueError(
                f"{kind}.block has {len(self.block)} specs but depth is {self.depth}; "
                "give one spec for every layer, or exactly one a layer"
            )
        for block in self.distinct_blocks:
            block.check(self.dim)

    @property
    def distinct_blocks(self) -> tuple[Block, ...]:
        """The specs of the layers, equal ones once: few, whatever depth a hostile file claims."""
        return tuple(dict.fromkeys(self.block if isinstance(self.block, tuple) else (self.block,)))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One spec a layer."""
        return self.block if isinstance(self.block, tuple) else (self.block,) * self.depth

    def build(self) -> StackModel:
        """The module with freshly drawn weights."""
        return StackModel(self).initialized()


class StackModel(nn.Module):
    """The module of `Stack`, and the base of models that are one with more parts.

    Taps: `blocks.i` (the residual stream after block i), `norm`, and those of the parts.
    """

    def __init__(self, spec: Stack) -> None:
        super().__init__()
        self.spec = spec
        self._build_input()
        with initialization.by_the_container():
            self.blocks = nn.ModuleList([block.build(spec.dim) for block in spec.blocks])
        if spec.linear is not None:
            convert_linears(self.blocks, spec.linear)
        self.norm = spec.norm.build(spec.dim) if spec.norm else None

    def _build_input(self) -> None:
        """Make the parts that stand before the blocks; a plain stack has none."""

    def initialized(self) -> StackModel:
        """This model, its shared parameters tied and its weights drawn; called once all parts stand."""
        self.tie()
        self.initialize()
        return self

    def tie(self) -> None:
        """Let parameters that are one by the spec be one tensor: after building, and after loading weights."""
        share_across_layers(self.blocks)

    def initialize(self) -> None:
        """Draw all weights again, in place (nothing on the meta device)."""
        initialization.initialize(self, self.spec.init, self.blocks, std=self.spec.init_std)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the first parameter, and so of the residual stream."""
        return next(self.parameters()).dtype

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of at most `capacity` positions, prompt included."""
        blocks: Iterable[BlockModule] = self.blocks  # type: ignore[assignment]
        layers = [block.new_cache(batch, capacity, self.dtype, self.device) for block in blocks]
        return Cache(layers, capacity)

    def forward(
        self, x: Float[Tensor, "batch time dim"], placement: Placement | None = None
    ) -> Float[Tensor, "batch time dim"]:
        """The residual stream after all blocks and the final norm."""
        return self.run_blocks(x, (placement or Placement()).resolve(x.shape[0], x.shape[1], x.device))

    def run_blocks(self, x: Float[Tensor, "batch time dim"], placement: Placement) -> Float[Tensor, "batch time dim"]:
        """The residual stream after all blocks and the final norm, for a placement that is resolved."""
        if placement.attention_only:
            require_visibility(self.blocks, placement)
        cache: Cache | None = placement.cache
        with auxiliary.counting(placement.segments) if placement.segments is not None else nullcontext():
            for index, block in enumerate(self.blocks):
                x = block(x, placement if cache is None else placement.at(cache.layers[index]))
        return x if self.norm is None else self.norm(x)


def require_visibility(blocks: Iterable[nn.Module], placement: Placement) -> None:
    """Raise `ValueError` where a mixer cannot obey a placement that says which tokens see each other."""
    for index, block in enumerate(blocks):
        mixer = getattr(block, "mixer", None)
        if not getattr(mixer, "obeys_visibility", False):
            raise ValueError(
                f"{type(placement).__name__} says which tokens see each other, which only attention can obey; "
                f"blocks.{index} mixes by {type(mixer).__name__}"
            )


def share_across_layers(blocks: nn.Module) -> None:
    """Let modules of one kind that belong together across layers know each other.

    A kind of module has a static method `share_layers(modules)`, called with all of its kind, in order.
    """
    kinds: dict[type[nn.Module], list[nn.Module]] = {}
    for module in blocks.modules():
        if callable(getattr(type(module), "share_layers", None)):
            kinds.setdefault(type(module), []).append(module)
    for kind, members in kinds.items():
        share: Any = getattr(kind, "share_layers")  # noqa: B009  (not every module has one)
        share(members)
