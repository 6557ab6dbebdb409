"""How weights are drawn: a rule for plain layers, and what parts prescribe for themselves.

`initialize(module, rule)` draws every plain layer by the rule, then lets each part with a method
`initialize(context)` draw what its paper prescribes. A part that is built by itself is drawn the same way, as the first
of one layer; inside a container (a block, a stack of them) it waits for the container, which knows width and depth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paperworks.core.linear import is_linear_like
from paperworks.core.spec import Spec

_WAITING: ContextVar[bool] = ContextVar("waiting", default=False)


@dataclass(frozen=True)
class Context:
    """Where a module stands while it is drawn: its layer, from 0, the number of layers, the rule's deviation."""

    layer: int = 0
    depth: int = 1
    std: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Initialization(Spec):
    """The rule for the plain layers of a model: N(0, std^2), biases zero.

    Linear layers that write to the residual stream get std / sqrt(2 depth) (GPT-2, Radford et al. 2019). Another rule
    is a subclass.
    """

    def draw(self, module: nn.Module, context: Context) -> None:
        """Draw one module in place; what is no plain layer is left alone."""
        weight = getattr(module, "weight", None)
        plain = isinstance(module, nn.Embedding) or (is_linear_like(module) and isinstance(weight, nn.Parameter))
        if not plain or not isinstance(weight, nn.Parameter):
            return
        scale = 1 / math.sqrt(2 * context.depth) if getattr(module, "writes_residual", False) else 1.0
        weight.normal_(0.0, context.std * scale)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()

    def finish(self, module: nn.Module, context: Context) -> None:
        """Change what was drawn in `module` and below it; called for every module once all are drawn."""


@torch.no_grad()
def initialize(
    root: nn.Module, rule: Initialization, layers: Iterable[nn.Module] | None = None, *, std: float = 0.02
) -> None:
    """Draw all weights under `root` again, in place.

    Args:
        root: a model, or a part of one.
        rule: for its plain layers.
        std: the rule's standard deviation.
        layers: the blocks in order, whose parts are told where they stand; None: the root is the only one.
    """
    if any(parameter.is_meta for parameter in root.parameters()):
        return
    blocks = [root] if layers is None else list(layers)
    whole = Context(depth=len(blocks), std=std)
    for module in _with_stand_ins(root):
        rule.draw(module, whole)
    for module in root.modules():
        rule.finish(module, whole)
    for index, block in enumerate(blocks):
        context = Context(index, len(blocks), std)
        for module in block.modules():
            own: Any = getattr(module, "initialize", None)
            if callable(own):
                own(context)


def _with_stand_ins(root: nn.Module) -> Iterator[nn.Module]:
    """All modules in order; for one whose weights another process keeps, an equal one that is drawn and dropped.

    So all processes draw the same numbers, whichever weights each of them keeps.
    """
    for module in root.modules():
        stand_in: Any = getattr(module, "stand_in", None)
        yield from stand_in().modules() if callable(stand_in) else (module,)


@contextmanager
def by_the_container() -> Iterator[None]:
    """Parts built inside are not drawn: the container does it, once all of it stands."""
    token = _WAITING.set(True)
    try:
        yield
    finally:
        _WAITING.reset(token)


@dataclass(frozen=True, kw_only=True)
class Part(Spec):
    """A spec whose `build` gives a module with its weights drawn, wherever it stands."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "build" in cls.__dict__:
            setattr(cls, "build", _drawn_when_alone(cls.__dict__["build"]))  # noqa: B010  (a method, not a field)


def _drawn_when_alone(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(build)
    def wrapped(self: Spec, *args: Any, **kwargs: Any) -> nn.Module:
        if _WAITING.get():
            return build(self, *args, **kwargs)
        with by_the_container():
            module = build(self, *args, **kwargs)
        initialize(module, Initialization())
        return module

    return wrapped
