"""Selection: which modules or parameters are meant, by glob patterns with braces or by a named set."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from paperworks.core.errors import nearest
from paperworks.core.linear import is_linear_like

Targets = str | Sequence[str]

# What the linears of attention and of feed-forward parts are called, here and in other libraries.
_ATTENTION = {
    *("query", "key", "value", "output"),  # ours
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"),  # Llama and its relatives, OPT, CLIP
    *("c_attn", "query_key_value", "Wqkv"),  # GPT-2, GPT-NeoX, MPT
}
_FEEDFORWARD = {
    *("gate", "up", "down"),  # ours
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),  # Llama and its relatives
    *("c_fc", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2"),  # GPT-2, GPT-NeoX, OPT
}
_AMBIGUOUS = {"c_proj", "dense"}  # both rooms use these: their parent decides
_ATTENTION_PARENTS = {"mixer", "attn", "attention", "self_attn", "self_attention"}
_READOUTS = {"unembedding", "lm_head", "embed_out", "score", "classifier"}

NAMED_SETS = ("attention", "feedforward", "all-linear")


def braces(pattern: str) -> list[str]:
    """Expand "a.{b,c}" to ["a.b", "a.c"]; braces may nest one in another."""
    opening = pattern.find("{")
    if opening < 0:
        return [pattern]
    depth, start, options = 0, opening + 1, []
    for index in range(opening, len(pattern)):
        character = pattern[index]
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if (character == "," and depth == 1) or depth == 0:
            options.append(pattern[start:index])
            start = index + 1
        if depth == 0:
            return [
                expanded for option in options for expanded in braces(pattern[:opening] + option + pattern[index + 1 :])
            ]
    raise ValueError(f"target pattern {pattern!r} has a brace that is never closed")


def _matcher(pattern: str) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(option) for option in braces(pattern)))


def select(
    model: nn.Module,
    targets: Targets,
    accept: Callable[[nn.Module], bool] = lambda module: True,
    what: str = "module",
) -> dict[str, nn.Module]:
    """The modules of `model` that `targets` names, by path, in the model's order.

    Args:
        model: any module, ours or another library's.
        targets: a glob pattern over module paths ("blocks.*.mixer.{query,value}", "*.q_proj"), one of the named sets
            "attention", "feedforward", "all-linear", or a list of those. `*` crosses dots.
        accept: which modules may be chosen; others that match are passed over.
        what: what `accept` looks for, in the words of the error message.

    Raises:
        ValueError: when a pattern matches nothing acceptable, with the nearest paths; when `targets` is no pattern.
    """
    require_model(model)
    targets = patterns_of(targets)
    candidates = {path: module for path, module in model.named_modules() if path and accept(module)}
    chosen: set[str] = set()
    for target in targets:
        if target in NAMED_SETS:
            found = [path for path, module in candidates.items() if _in_named_set(path, module, target)]
        else:
            found = matching(target, candidates)
        if not found:
            raise ValueError(_nothing(target, candidates, model, what))
        chosen.update(found)
    if not chosen:
        raise ValueError(f"no targets were given; name a pattern or one of {', '.join(NAMED_SETS)}")
    return {path: module for path, module in candidates.items() if path in chosen}


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Those of the paths that match a glob pattern with braces, in their order."""
    matches = _matcher(pattern).match
    return [path for path in paths if matches(path)]


def patterns_of(targets: Targets) -> list[str]:
    """`targets` as a list. Raises `ValueError` for what is neither a pattern nor a list of them."""
    if isinstance(targets, str):
        return [targets]
    if isinstance(targets, Sequence) and all(isinstance(target, str) for target in targets):
        return list(targets)
    raise ValueError(
        f"targets must be a pattern, one of {', '.join(NAMED_SETS)}, or a list of those; got {_short(targets)}"
    )


def require_model(model: object) -> None:
    """Raise `ValueError` unless `model` is a torch module: the arguments may stand in another order."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model comes first: expected a torch.nn.Module, got {_short(model)}")


def _short(value: object) -> str:
    text = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else text[:77] + "..."


def select_linears(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The linear-like modules that `targets` names, by path. See `select`."""
    return select(model, targets, is_linear_like, "linear layer")


def select_parameters(model: nn.Module, targets: Targets) -> dict[str, nn.Parameter]:
    """Parameters of `model` that `targets` names, by name, in the model's order; a tied one under its first name.

    Args:
        model: any module, ours or another library's.
        targets: a glob pattern over parameter names ("*.bias", "blocks.0.*"), one of the named sets, which stands for
            the parameters of its linear layers, or a list of those.

    Raises:
        ValueError: when a pattern matches no parameter, with the nearest names.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[int] = set()
    for target in [targets] if isinstance(targets, str) else list(targets):
        if target in NAMED_SETS:
            found = [p for module in select(model, target).values() for p in module.parameters()]
        else:
            matches = _matcher(target).match
            found = [parameter for name, parameter in every.items() if matches(name)]
        if not found:
            misses = ", ".join(_near_misses(target, every)) or "none"
            raise ValueError(
                f"pattern {target!r} matches no parameter of {type(model).__name__}. Near misses: {misses}"
            )
        chosen.update(map(id, found))
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}


def _in_named_set(path: str, module: nn.Module, name: str) -> bool:
    if not is_linear_like(module):
        return False
    *parents, leaf = path.split(".")
    if name == "all-linear":
        return leaf not in _READOUTS
    attention = any(parent in _ATTENTION_PARENTS for parent in parents)
    if leaf in _AMBIGUOUS:
        return attention == (name == "attention")
    if name == "attention":
        return leaf in _ATTENTION and (attention or leaf not in {"query", "key", "value", "output"})
    return leaf in _FEEDFORWARD


def _nothing(target: str, candidates: Iterable[str], model: nn.Module, what: str) -> str:
    close = _near_misses(target, candidates)
    matching = [path for path, _ in model.named_modules() if path and _matcher(target).match(path)]
    aside = f" It matches {matching[0]!r} and {len(matching) - 1} more, but none is a {what}." if matching else ""
    misses = ", ".join(close) or "none"
    return (
        f"target {target!r} matches no {what} of {type(model).__name__}.{aside} Near misses: {misses}. "
        f"Named sets: {', '.join(NAMED_SETS)}"
    )


def grouped(paths: Iterable[str]) -> list[tuple[str, int]]:
    """The paths with their numbers replaced by `*`, each once, and how many it stands for."""
    counts: dict[str, int] = {}
    for path in paths:
        generic = re.sub(r"(?:(?<=\.)|^)\d+(?=\.|$)", "*", path)
        counts[generic] = counts.get(generic, 0) + 1
    return list(counts.items())


def _near_misses(target: str, paths: Iterable[str]) -> list[str]:
    generic = [path for path, _ in grouped(paths)]
    return nearest(target, generic) or generic[:5]


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` stands in `model`."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, module)
