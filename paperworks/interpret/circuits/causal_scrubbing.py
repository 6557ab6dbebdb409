"""Causal scrubbing: test what the parts of a model are said to compute, by resampling everything that the claim says
does not matter (Chan et al. 2022, alignmentforum.org/posts/JvZhhzycHu2Yd57RN).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.interpret.residual import head_outputs, residual_stream
from paperworks.interpret.taps import edit, record
from paperworks.nn.placement import Placement

Feature = Callable[[Tensor], Tensor]  # data (rows, ...) -> labels (rows,) or (rows, parts), int64


@dataclass(frozen=True)
class Node:
    """A part of a model's computation: a function of its parents' values, or, without parents, of the data itself.

    Attributes:
        name: unlike that of the other parents of whoever reads it.
        compute: batched over rows; takes the parents' values in order, or the data's rows.
        parents: what it reads.
    """

    name: str
    compute: Callable[..., Tensor]
    parents: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Meaning:
    """What a node is said to stand for, and which of its parents matter.

    Attributes:
        feature: the quantity, as labels of the data; inputs with the same labels are said to be interchangeable here.
        parents: by name, the meaning of each parent that matters; all others are said not to.
    """

    feature: Feature
    parents: Mapping[str, Meaning] = field(default_factory=dict)


def scrub(node: Node, meaning: Meaning, data: Tensor, rows: Int[Tensor, " rows"], generator: torch.Generator) -> Tensor:
    """The value of `node` for the reference rows, everything that is said not to matter drawn anew.

    For each parent with a meaning another row that agrees on its feature takes the reference's place, drawn for every
    occurrence by itself: a node that is read twice is scrubbed twice. All parents without a meaning are computed from
    one random row.

    Args:
        node: the output of a computation.
        meaning: what it is said to stand for; its own feature is not used for the reference itself.
        data: all inputs (rows, ...), the distribution that is drawn from.
        rows: the reference, as indices into `data`.
        generator: of the draws.

    Raises:
        ValueError: when a meaning names a parent that the node does not have.
    """
    if not node.parents:
        return node.compute(data[rows])
    names = [parent.name for parent in node.parents]
    for name in meaning.parents:
        if name not in names:
            raise ValueError(unknown(f"parent of {node.name}", name, names))
    aside = torch.randint(len(data), (len(rows),), generator=generator)
    known: dict[int, Tensor] = {}
    values = []
    for parent in node.parents:
        if parent.name in meaning.parents:
            meant = meaning.parents[parent.name]
            values.append(scrub(parent, meant, data, agreeing(meant.feature(data), rows, generator), generator))
        else:
            values.append(evaluate(parent, data[aside], known))
    return node.compute(*values)


def evaluate(node: Node, data: Tensor, known: dict[int, Tensor] | None = None) -> Tensor:
    """The value of a node on data as it is; `known` keeps values of nodes that are read more than once."""
    known = {} if known is None else known
    if id(node) not in known:
        if node.parents:
            known[id(node)] = node.compute(*(evaluate(parent, data, known) for parent in node.parents))
        else:
            known[id(node)] = node.compute(data)
    return known[id(node)]


def agreeing(
    labels: Int[Tensor, " all *parts"], rows: Int[Tensor, " rows"], generator: torch.Generator
) -> Int[Tensor, " rows"]:
    """Draw for each row another (or the same) that has the same labels, uniformly among all that do."""
    if labels.dim() == 0 or labels.dtype.is_floating_point:
        raise ValueError(f"a feature gives one or several integers a row, got {labels.dtype} {tuple(labels.shape)}")
    _, group = labels.reshape(len(labels), -1).unique(dim=0, return_inverse=True)
    order = group.argsort(stable=True)
    counts = torch.bincount(group)
    starts = counts.cumsum(0) - counts
    own = group[rows]
    draw = (torch.rand(len(rows), generator=generator, dtype=torch.float64) * counts[own]).long()
    out: Tensor = order[starts[own] + draw]
    return out


@dataclass(frozen=True)
class Scrubbed:
    """What scrubbing came to: losses (means over rows) of the model, of the scrubbed model, and of shuffled labels.

    `recovered` is (random - scrubbed) / (random - model): 1 when the claim explains the behaviour, 0 when nothing.
    """

    model: float
    scrubbed: float
    random: float

    @property
    def recovered(self) -> float:
        """The share of the model's performance that the claim keeps."""
        return (self.random - self.scrubbed) / (self.random - self.model)


@torch.no_grad()
def examine(
    node: Node,
    meaning: Meaning,
    data: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    draws: int = 1,
    seed: int = 0,
) -> Scrubbed:
    """Scrub every row of the data and compare losses.

    Args:
        node: the model's output.
        meaning: the hypothesis.
        data: all inputs.
        loss: (output, the data's rows it should answer) -> one number a row.
        draws: how often every row is scrubbed.
        seed: of the draws.

    Raises:
        ValueError: when the model does no better than chance on this data, so that there is nothing to recover.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = evaluate(node, data)
    model = loss(whole, data).mean().item()
    shuffled = [loss(whole[torch.randperm(len(data), generator=generator)], data).mean().item() for _ in range(draws)]
    rows = torch.arange(len(data))
    scrubbed = [loss(scrub(node, meaning, data, rows, generator), data).mean().item() for _ in range(draws)]
    random = sum(shuffled) / draws
    if abs(random - model) < 1e-9:
        raise ValueError(f"the model's loss is {model:.4g}, shuffled or not: there is no performance to recover")
    return Scrubbed(model, sum(scrubbed) / draws, random)


def attention_tree(model: nn.Module, at: int = -1) -> Node:
    """The logits at one position of an attention-only model as a tree of heads.

    "logits" reads "embed" and all heads "0.0" ...; head "1.0" reads "1.0.q", "1.0.k" and "1.0.v", each of which is the
    sum of "embed" and all earlier heads. The data are tokens (rows, time).

    Raises:
        ValueError: for a model with feed-forward layers or of unknown structure.
    """
    residual_stream(model)
    whole: Any = model
    if any(block.feedforward is not None or not hasattr(block.mixer, "heads") for block in whole.blocks):
        raise ValueError("a tree of heads needs blocks of attention alone; write Node(...) yourself for other models")

    def embed(tokens: Tensor) -> Tensor:
        with record(model, "dropout") as seen:
            model(tokens)
        return seen["dropout"]

    def total(*values: Tensor) -> Tensor:
        return torch.stack(values).sum(0)

    senders = [Node("embed", embed)]
    for layer, block in enumerate(whole.blocks):
        new = []
        for head in range(block.mixer.spec.heads):
            name = f"{layer}.{head}"
            reads = tuple(Node(f"{name}.{part}", total, tuple(senders)) for part in "qkv")
            new.append(Node(name, _head(block, head), reads))
        senders += new

    def logits(*values: Tensor) -> Tensor:
        final = total(*values)[:, at]
        out: Tensor = whole.logits(final if whole.norm is None else whole.norm(final))
        return out

    return Node("logits", logits, tuple(senders))


def _head(block: Any, head: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What a head writes, as a function of the three streams it reads."""

    def compute(*streams: Float[Tensor, "rows time dim"]) -> Float[Tensor, "rows time dim"]:
        # every projection is given its own stream; forward, so that the edits do not see their own calls
        projected = [
            getattr(block.mixer, name).forward(block.mixer_norm(stream))
            for name, stream in zip(("query", "key", "value"), streams, strict=True)
        ]
        edits = {
            name: (lambda output, value=value: value)
            for name, value in zip(("query", "key", "value"), projected, strict=True)
        }
        x = streams[0]
        with edit(block.mixer, edits), record(block.mixer, "heads") as seen:
            block.mixer(x, Placement().resolve(len(x), x.shape[1], x.device))
        return head_outputs(seen["heads"], block.mixer.output)[:, :, head]

    return compute
