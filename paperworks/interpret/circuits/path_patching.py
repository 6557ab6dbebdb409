"""Path patching and circuit tests (Wang et al. 2022, "Interpretability in the Wild", arXiv:2211.00593).

Heads are (layer, head). Path patching asks what a head does to chosen receivers directly, all other heads held still;
a circuit is tested by knocking out every head outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.interpret.circuits.circuits import attention_of
from paperworks.interpret.circuits.patching import Metric
from paperworks.interpret.taps import Edit, edit, record

Head = tuple[int, int]
Between = Literal["recompute", "frozen"]
_PARTS = {"q": "query", "k": "key", "v": "value"}


def all_heads(model: nn.Module) -> list[Head]:
    """Every (layer, head) of one of our models."""
    blocks: Any = model.blocks
    return [(layer, head) for layer in range(len(blocks)) for head in range(attention_of(model, layer).spec.heads)]


@torch.no_grad()
def path_patch(
    model: nn.Module,
    clean: Int[Tensor, "batch time"],
    corrupted: Int[Tensor, "batch time"],
    senders: Sequence[Head],
    receivers: Sequence[str],
    metric: Metric,
    *,
    feedforward: Between = "recompute",
) -> float:
    """The mean metric when senders are corrupted on their direct paths to the receivers only.

    (1) Every head's output is noted on both prompts. (2) A clean run with all heads held at their clean outputs, the
    senders at their corrupted ones; the inputs of the receivers are noted. (3) A clean run with these inputs.

    Args:
        model: one of ours.
        clean, corrupted: prompts of equal length, position by position.
        senders: heads.
        receivers: "2.1.q", "2.1.k", "2.1.v" (keys and values by key-value head), or "logits".
        metric: logits -> one number a row.
        feedforward: whether feed-forward layers between them pass the change on ("recompute") or not ("frozen").

    Raises:
        ValueError: for prompts of different shape, or an unknown head, receiver or option.
    """
    if feedforward not in get_args(Between):
        raise ValueError(unknown("treatment of feed-forward layers", feedforward, get_args(Between)))
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"clean {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)} prompts must have the same shape; "
            "`patching.aligned` shows where they part"
        )
    known = all_heads(model)
    for sender in senders:
        if sender not in known:
            raise ValueError(f"head {sender}: the model has heads {known[0]} to {known[-1]}, as (layer, head)")
    places = [_receiver(model, name) for name in receivers]
    outputs = "blocks.*.mixer.heads"
    held = [outputs, "blocks.*.feedforward"] if feedforward == "frozen" and _has_feedforward(model) else [outputs]
    with record(model, held) as here:
        model(clean)
    with record(model, outputs) as there:
        model(corrupted)

    def hold(path: str) -> Edit:
        def value(now: Tensor) -> Tensor:
            kept = here[path].clone()
            for layer, head in senders:
                if path == f"blocks.{layer}.mixer.heads":
                    kept[:, :, head] = there[path][:, :, head]
            return kept

        return value

    with (
        edit(model, {path: hold(path) for path in here}),
        record(model, sorted({path for path, _ in places})) as inputs,
    ):
        model(clean)

    def deliver(path: str) -> Edit:
        def value(now: Tensor) -> Tensor:
            new = now.clone()
            for other, part in places:
                if other == path:
                    new[..., part] = inputs[path][..., part]
            return new

        return value

    with edit(model, {path: deliver(path) for path, _ in places}):
        return metric(model(clean)).double().mean().item()


def _has_feedforward(model: Any) -> bool:
    return any(block.feedforward is not None for block in model.blocks)


def _receiver(model: nn.Module, name: str) -> tuple[str, slice]:
    """The module whose output is a receiver's input, and which channels of it."""
    blocks: Any = model.blocks
    if name == "logits":
        return f"blocks.{len(blocks) - 1}", slice(None)
    pieces = name.split(".")
    if len(pieces) != 3 or pieces[2] not in _PARTS or not (pieces[0].isdigit() and pieces[1].isdigit()):
        raise ValueError(f"receiver {name!r}: write 'layer.head.q', '.k' or '.v', such as '2.1.q', or 'logits'")
    layer, head = int(pieces[0]), int(pieces[1])
    mixer = attention_of(model, layer)
    count = mixer.spec.heads if pieces[2] == "q" else mixer.kv_heads
    if head >= count:
        raise ValueError(f"receiver {name!r}: block {layer} has {count} of these, 0 to {count - 1}")
    return f"blocks.{layer}.mixer.{_PARTS[pieces[2]]}", slice(head * mixer.head_dim, (head + 1) * mixer.head_dim)


@torch.no_grad()
def head_means(
    model: nn.Module, tokens: Int[Tensor, "rows time"], groups: Int[Tensor, " rows"]
) -> dict[str, Float[Tensor, "groups time heads head_dim"]]:
    """Each head's mean output by position, a mean for each group of rows whose positions mean the same.

    Groups are templates: a mean over rows whose positions do not correspond would be a mean of different things.
    """
    if groups.shape != tokens.shape[:1]:
        raise ValueError(f"groups must be one label a row, ({len(tokens)},); got {tuple(groups.shape)}")
    with record(model, "blocks.*.mixer.heads") as seen:
        model(tokens)
    count = int(groups.max()) + 1
    sizes = torch.bincount(groups, minlength=count)
    if bool((sizes == 0).any()):
        raise ValueError(f"group {int((sizes == 0).nonzero()[0])} has no rows to take a mean of")
    found = {}
    for path, value in seen.items():
        sums = torch.zeros(count, *value.shape[1:]).to(value).index_add_(0, groups, value)
        found[path] = sums / sizes.to(value).view(-1, 1, 1, 1)
    return found


@contextmanager
def only_heads(
    model: nn.Module,
    keep: Collection[Head],
    means: dict[str, Float[Tensor, "groups time heads head_dim"]],
    groups: Int[Tensor, " batch"],
) -> Iterator[nn.Module]:
    """Knock out every head that is not in `keep` inside the context: its output is its mean, from `head_means`.

    Args:
        model: one of ours.
        keep: heads that work.
        means: by tap.
        groups: which mean each row of the batch gets.
    """

    def knock(layer: int, path: str) -> Edit:
        def value(heads: Tensor) -> Tensor:
            working = torch.tensor([(layer, head) in keep for head in range(heads.shape[2])], device=heads.device)
            return torch.where(working[:, None], heads, means[path][groups])

        return value

    with edit(model, {path: knock(int(path.split(".")[1]), path) for path in means}):
        yield model


def minimality(score: Callable[[Collection[Head]], float], circuit: Collection[Head]) -> dict[Head, float]:
    """For each head of a circuit how much the score changes without it: F(C) - F(C without the head).

    The paper's minimality with K empty: a lower bound of what some K would show.
    """
    whole = score(circuit)
    return {head: whole - score([other for other in circuit if other != head]) for head in circuit}
