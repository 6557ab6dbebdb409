"""Putting adapters on a model, choosing which of them act, and taking them off."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise

import torch
from torch import nn

from paperworks.adapt.contract import Adapter, Delta
from paperworks.adapt.delta import AdaptedLinear, check_name
from paperworks.adapt.layer_info import LayerInfo
from paperworks.adapt.stacked import AdaptedStack, StackedParameter, stack_info, stacked_parameters
from paperworks.adapt.whole import TrainedWhole
from paperworks.core.coverage import Coverage, coverage_of, warn_of_gaps
from paperworks.core.errors import unknown
from paperworks.core.linear import is_linear_like, linear_kind
from paperworks.core.selection import NAMED_SETS, Targets, matching, patterns_of, replace_module, require_model, select


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of a model by path; a stack of experts by the path of its parameter."""
    return {
        path.replace(f".{AdaptedStack.PLACE}.", "."): module
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }


def trained_whole(model: nn.Module) -> dict[str, TrainedWhole]:
    """The modules that are trained whole beside adapters (`modules_to_save`), by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainedWhole)}


def wrappers(model: nn.Module) -> list[AdaptedLinear | TrainedWhole]:
    """Everything in the model that follows `use` and `disabled`."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear | TrainedWhole)]


def names(model: nn.Module) -> list[str]:
    """The names of the model's adapters."""
    return list(dict.fromkeys(name for wrapper in wrappers(model) for name in wrapper.adapter_names))


def in_use(model: nn.Module) -> dict[str, float]:
    """The names of the adapters that act, and the weight of each."""
    return {name: weight for wrapper in wrappers(model) for name, weight in wrapper.in_use.items()}


def apply(
    model: nn.Module,
    adapter: Adapter,
    targets: Targets = "attention",
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    modules_to_save: Targets = (),
) -> nn.Module:
    """Put an adapter on each chosen linear layer and freeze everything else; in place.

    A model may carry several adapters under different names. The one put on last is in use, alone (see `use`).

    Args:
        model: any module, ours or another library's; its layers may be compressed.
        adapter: such as `LoRA(rank=8, alpha=16)`.
        targets: see `nn.select`. A pattern that matches no linear layer may name embeddings ("*embed_tokens"),
            convolutions that multiply whole patches ("*patch_embedding"), and stacked experts by their parameter
            ("*.experts.{gate_up_proj,down_proj}"); the methods that cannot adapt those say so.
        name: what to call it; the same name may be put on other layers later.
        dtype: of the adapter's numbers, such as `torch.bfloat16`; None leaves what the adapter chooses (float32,
            over a float64 base float64).
        modules_to_save: modules of any kind (a new head, norms) of which a copy is trained whole, used and saved with
            the adapter; patterns over module paths.

    Raises:
        ValueError: when a target matches nothing, has an adapter of this name already, or does not fit the adapter.

    Warns:
        CoverageWarning: when "all-linear" leaves out stacked experts or other matrices (see `coverage`).
    """
    require_model(model)
    if isinstance(adapter, type) and issubclass(adapter, Adapter):
        raise ValueError(f"pass an adapter, not the class: adapt.{adapter.__name__}() or with settings of your own")
    if not isinstance(adapter, Adapter):
        raise ValueError(
            f"the second argument is the adapter, such as adapt.LoRA(rank=8), then the targets; got {adapter!r:.80}"
        )
    chosen = adaptable(model, targets)
    whole = select(model, modules_to_save, what="module") if patterns_of(modules_to_save) else {}
    deltas = adapter.build_all(chosen)
    attach(model, deltas, dict.fromkeys(deltas, adapter.own()), name, dtype, whole)
    if "all-linear" in patterns_of(targets):
        warn_of_gaps(coverage(model), "all-linear", "name them in targets to adapt them, or see adapt.coverage(model)")
    return model


def adaptable(model: nn.Module, targets: Targets) -> dict[str, LayerInfo]:
    """The layers that `targets` names, by path: wrapped or not, but nothing inside wrappers."""
    found: dict[str, LayerInfo] = {}
    if not patterns_of(targets):
        raise ValueError(f"no targets were given; name a pattern or one of {', '.join(NAMED_SETS)}")
    for pattern in patterns_of(targets):
        try:
            chosen = select(model, pattern, is_linear_like, "linear layer")
            found |= {path: LayerInfo.of(module, path) for path, module in chosen.items()}
        except ValueError:
            by_name = _found_by_name(model, pattern)
            if not by_name:
                raise
            found |= by_name
    inside = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, AdaptedLinear | TrainedWhole))
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    outside = [path for path in found if not (inside and path.startswith(inside))]
    return {path: found[path] for path in sorted(outside, key=lambda path: order.get(path, len(order)))}


def _found_by_name(model: nn.Module, pattern: str) -> dict[str, LayerInfo]:
    """Embeddings, patch convolutions and stacked expert parameters that a pattern matches."""
    modules = {path: m for path, m in model.named_modules() if path and linear_kind(m) in ("lookup", "patches")}
    found = {path: LayerInfo.of(modules[path], path) for path in matching(pattern, modules)}
    stacks = stacked_parameters(model)
    return found | {path: stack_info(*stacks[path], path) for path in matching(pattern, stacks)}


def find(model: nn.Module, path: str) -> LayerInfo | None:
    """The description of what stands at a path, if it can be adapted."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        stack = stacked_parameters(model).get(path)
        return None if stack is None else stack_info(*stack, path)
    return LayerInfo.of(module, path) if linear_kind(module) is not None else None


def attach(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    adapters: Mapping[str, Adapter],
    name: str,
    dtype: torch.dtype | None = None,
    whole: Mapping[str, nn.Module] | None = None,
) -> None:
    """Put ready deltas on the layers at their paths under one name, and use that; all errors before any change."""
    check_name(name)
    present, whole = adapted(model), whole or {}
    taken = [path for path in deltas if path in present and name in present[path].deltas]
    if taken:
        raise ValueError(
            f"{taken[0]} has an adapter already named {name!r} ({present[taken[0]].adapters[name]}); "
            "merge or remove it first, or give the new one another name="
        )
    _require_apart(model, deltas, adapters, whole, name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    done: list[AdaptedLinear] = []
    try:
        for path, delta in deltas.items():
            stacked = delta.layer.kind == "stacked"
            done.append((_attach_stacked if stacked else _attach)(model, path, delta, adapters[path], name, dtype))
            done[-1].take_out(name)
    except BaseException:  # a format that cannot store the residual: the model is left as it was
        for layer in done:
            layer.give_back(name)
            layer.drop(name)
        drop(model, [])
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    for path, module in whole.items():
        held = module if isinstance(module, TrainedWhole) else TrainedWhole(module).train(module.training)
        held.add(name)
        if held is not module:
            replace_module(model, path, held)
    use(model, name)


def _attach(
    model: nn.Module, path: str, delta: Delta, adapter: Adapter, name: str, dtype: torch.dtype | None
) -> AdaptedLinear:
    module = model.get_submodule(path)
    base = module.base if isinstance(module, AdaptedLinear) else module
    delta.to(next(chain(base.parameters(), base.buffers())).device, dtype).train(module.training)
    if isinstance(module, AdaptedLinear):
        module.add(name, delta, adapter)
        return module
    layer = AdaptedLinear(base, delta, adapter, name).train(module.training)
    replace_module(model, path, layer)
    return layer


def _attach_stacked(
    model: nn.Module, path: str, delta: Delta, adapter: Adapter, name: str, dtype: torch.dtype | None
) -> AdaptedLinear:
    owner, _, parameter = path.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, AdaptedStack):
        module = AdaptedStack(module).train(module.training)
        replace_module(model, owner, module)
    return module.add(parameter, name, delta, adapter, dtype)


def _require_apart(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    adapters: Mapping[str, Adapter],
    whole: Mapping[str, nn.Module],
    name: str,
) -> None:
    """Raise `ValueError` where a layer's owner would go around its adapter, or a module is trained in two ways."""
    for path in deltas:
        owner = path.rpartition(".")[0]
        parent = model.get_submodule(owner) if owner else model
        drops = bool(getattr(adapters[path], "dropout", False))
        if drops and isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{path}: torch's MultiheadAttention reads this layer's weight and never calls it, so that dropout of "
                "the adapter's inputs would not act; use dropout=0 on it, or other targets"
            )
    for path, module in whole.items():
        if isinstance(module, AdaptedLinear) or any(p == path or p.startswith(f"{path}.") for p in deltas):
            raise ValueError(f"{path} is to be trained whole and adapted at once; leave it out of one of the two")
        if isinstance(module, TrainedWhole) and name in module.adapter_names:
            raise ValueError(f"{path} is trained whole already with the adapter {name!r}")


def coverage(model: nn.Module) -> Coverage:
    """The share of the model's weights that adapters and modules trained whole reach, and what is left out."""
    places = [path for path, m in model.named_modules() if isinstance(m, AdaptedLinear | TrainedWhole | AdaptedStack)]

    def plain(name: str) -> str | None:
        for place in places:
            rest = name.removeprefix(f"{place}.")
            if rest != name and rest.partition(".")[0] in ("deltas", "copies", AdaptedStack.PLACE):
                return None
            if rest != name and rest.startswith("base."):
                return f"{place}.{rest.removeprefix('base.')}"
        return name

    return coverage_of(model, {*adapted(model), *trained_whole(model)}, plain)


def use(model: nn.Module, which: str | Mapping[str, float] | None) -> nn.Module:
    """Choose the adapters that act and are trained: one, a weighted sum, or none; in place, nothing is copied.

    With weights each adds weight * (its output - the base's output) on each layer, the base's output being that without
    any adapter: for LoRA and its like the weighted sum of the changes, for DoRA and IA3 a step of that length towards
    the rescaled output (not a product of rescalings). `merge` adds the same to the weights.

    Args:
        model: a model with adapters.
        which: a name; `{"a": 0.7, "b": 0.3}` for base + 0.7 a + 0.3 b; None for the base alone.

    Raises:
        ValueError: for a name the model does not have, or a weight that is not finite.
    """
    require_adapted(model)
    known = names(model)
    wanted = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
    for name, weight in wanted.items():
        if name not in known:
            raise ValueError(unknown("adapter", name, known))
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {name!r} must be a finite number, got {weight!r}")
    for wrapper in wrappers(model):
        wrapper.use({name: float(weight) for name, weight in wanted.items()})
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model without its adapters: exactly the base, bit for bit (up to rounding where PiSSA split it)."""
    states = {module: module.enabled for module in wrappers(model)}
    for module in states:
        module.enabled = False
    try:
        yield model
    finally:
        for module, enabled in states.items():
            module.enabled = enabled


@contextmanager
def per_row(model: nn.Module, rows: Sequence[str | None]) -> Iterator[nn.Module]:
    """Run each row of the batch with its own adapter, or None for the base: as if the rows were run apart.

    Args:
        model: a model with adapters, called with one row each in the first dimension of its inputs.
        rows: the adapter of each row.

    Raises:
        ValueError: for a name the model does not have, and where layers do not see rows: experts, which are given
            single tokens, and weights that their owner reads. A batch of another size raises when it comes.
    """
    require_adapted(model)
    known = names(model)
    for name in rows:
        if name is not None and name not in known:
            raise ValueError(unknown("adapter", name, known))
    for path, layer in adapted(model).items():
        if isinstance(layer, StackedParameter) or _among_experts(path):
            raise ValueError(f"{path} belongs to an expert, which is given tokens and not rows; run the rows apart")
    states = {module: module.rows for module in wrappers(model)}
    for module in states:
        module.rows = tuple(rows)
    try:
        yield model
    finally:
        for module, before in states.items():
            module.rows = before


def _among_experts(path: str) -> bool:
    parts = path.split(".")
    return any(part in ("experts", "shared") and after.isdigit() for part, after in pairwise(parts))


def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Drop one adapter, or all; in place. The base stays frozen; `model.requires_grad_(True)` thaws it."""
    require_adapted(model)
    if name is not None and name not in names(model):
        raise ValueError(unknown("adapter", name, names(model)))
    drop(model, names(model) if name is None else [name])
    return model


def drop(model: nn.Module, dropped: Sequence[str], merged: bool = False) -> None:
    """Take adapters off; a layer that has none left is its base again, restored unless they were merged into it."""
    for path, layer in adapted(model).items():
        for name in dropped:
            if name in layer.deltas:
                layer.give_back(name, restore=not merged)
                layer.drop(name)
        if not layer.deltas and not isinstance(layer, StackedParameter):
            replace_module(model, path, layer.base)
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedStack) and module.drop_empty():
            replace_module(model, path, module.base)
        if isinstance(module, TrainedWhole):
            for name in dropped:
                module.drop(name, merged=merged)
            if not module.adapter_names:
                replace_module(model, path, module.base)


def trainable_parameters(model: nn.Module) -> int:
    """The number of parameters that training would change; one shared by layers counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def require_adapted(model: nn.Module) -> None:
    """Raise `ValueError` when the model has no adapters."""
    require_model(model)
    if not wrappers(model):
        raise ValueError("the model has no adapters; put some on with adapt.apply or adapt.load")
