"""A decoder as a graph of heads and feed-forward layers: every output reaches every later input by an edge of its own.

The residual rewrite of Wang et al. 2022 (arXiv:2211.00593) and Conmy et al. 2023 (arXiv:2304.14997).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.core.linear import bias_of
from paperworks.interpret.residual import head_outputs, residual_stream
from paperworks.interpret.taps import Edit, edit


class EdgeGraph:
    """The nodes and edges of one of our pre-norm decoders with attention.

    Senders: "embed", heads "0.0", "0.1", ..., feed-forward layers "0.mlp". Receivers: each head's "0.0.q", "0.0.k",
    "0.0.v" (keys and values by key-value head), "0.mlp", and "logits". The input of a receiver is the sum over senders
    of the sender's live output where the edge is on, and of its corrupted output where it is off.

    Attributes:
        senders, receivers: names, in topological order.
        possible: bool (receivers, senders); edges that exist.
    """

    def __init__(self, model: nn.Module) -> None:
        residual_stream(model)  # refuses what is no sum
        self.model = model
        blocks: Any = model.blocks
        self.blocks = blocks
        self.senders: list[str] = ["embed"]
        self.receivers: list[str] = []
        rows: list[int] = []  # how many senders come before each receiver
        for index, block in enumerate(self.blocks):
            attends = all(hasattr(block.mixer, name) for name in ("query", "key", "value", "heads", "output"))
            if not block.arrangement.plain_branches or not attends:
                raise ValueError(
                    f"block {index} is arranged as {block.arrangement} with a {type(block.mixer).__name__}; edges are "
                    "known for PreNorm() blocks with attention"
                )
            for part, count in zip("qkv", _inputs(block), strict=True):
                self.receivers += [f"{index}.{head}.{part}" for head in range(count)]
                rows += [len(self.senders)] * count
            self.senders += [f"{index}.{head}" for head in range(_heads(block))]
            if block.feedforward is not None:
                self.receivers.append(f"{index}.mlp")
                rows.append(len(self.senders))
                self.senders.append(f"{index}.mlp")
        self.receivers.append("logits")
        rows.append(len(self.senders))
        self.possible = torch.arange(len(self.senders)) < torch.tensor(rows)[:, None]

    def __len__(self) -> int:
        """The number of edges."""
        return int(self.possible.sum())

    def edges(self, *names: str) -> Bool[Tensor, "receivers senders"]:
        """The set of the edges named "sender->receiver", such as "0.0->1.0.k".

        Raises:
            ValueError: for a name that is no edge of this graph.
        """
        chosen = torch.zeros_like(self.possible)
        for name in names:
            sender, arrow, receiver = name.partition("->")
            if not arrow or sender not in self.senders or receiver not in self.receivers:
                raise ValueError(unknown("edge", name, self.named(self.possible)))
            place = self.receivers.index(receiver), self.senders.index(sender)
            if not self.possible[place]:
                raise ValueError(f"{name} is no edge: {sender} is computed after {receiver}")
            chosen[place] = True
        return chosen

    def named(self, edges: Bool[Tensor, "receivers senders"]) -> list[str]:
        """The names of the edges of a set."""
        return [f"{self.senders[column]}->{self.receivers[row]}" for row, column in edges.nonzero().tolist()]

    def node(self, receiver: str) -> list[str]:
        """The senders that a receiver feeds: several heads where they share keys, none for the logits."""
        if receiver == "logits":
            return []
        if receiver.endswith(".mlp"):
            return [receiver]
        layer, head, part = receiver.split(".")
        block = self.blocks[int(layer)]
        group = 1 if part == "q" else _heads(block) // block.mixer.kv_heads
        return [f"{layer}.{each}" for each in range(int(head) * group, (int(head) + 1) * group)]

    @torch.no_grad()
    def outputs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "senders batch time dim"]:
        """Run the model as it is and return what every sender writes: the corrupted outputs of `run`."""
        live: list[Tensor] = []
        with edit(self.model, self._senders(live)):
            self.model(tokens)
        return torch.stack(live)

    def run(
        self,
        tokens: Int[Tensor, "batch time"],
        edges: Bool[Tensor, "receivers senders"],
        corrupted: Float[Tensor, "senders batch time dim"],
        inputs: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """The logits with the edges of a set on, and corrupted outputs along all others.

        Args:
            tokens: the clean prompt.
            edges: which edges are on.
            corrupted: from `outputs` of the corrupted prompt, or zeros for zero ablation.
            inputs: a list that receives the inputs of the receivers, each (receivers, batch, time, dim) of one kind in
                order, in the autograd graph; their gradients are what attribution needs.
        """
        if edges.shape != self.possible.shape or edges.dtype != torch.bool:
            raise ValueError(
                f"edges must be bool {tuple(self.possible.shape)} (receivers, senders), got {edges.dtype} "
                f"{tuple(edges.shape)}; make them with graph.edges(...)"
            )
        if corrupted.shape[0] != len(self.senders) or corrupted.shape[1:3] != tokens.shape:
            raise ValueError(
                f"corrupted must be ({len(self.senders)}, {tokens.shape[0]}, {tokens.shape[1]}, dim) from "
                f"graph.outputs(tokens), got {tuple(corrupted.shape)}"
            )
        live: list[Tensor] = []
        mask = (edges & self.possible).to(corrupted)

        def incoming(first: int, count: int) -> Tensor:
            """The inputs of `count` receivers from row `first` on."""
            known = len(live)
            change = torch.stack(live) - corrupted[:known]
            base = corrupted[:known].sum(0) + self._biases(known)
            mixed = base + torch.einsum("rs,sbtd->rbtd", mask[first : first + count, :known], change)
            if inputs is not None:
                inputs.append(mixed)
            return mixed

        edits = self._senders(live)
        row = 0
        for index, block in enumerate(self.blocks):
            for name, count in zip(("query", "key", "value"), _inputs(block), strict=True):
                edits[f"blocks.{index}.mixer.{name}"] = _project(block, name, count, incoming, row)
                row += count
            if block.feedforward is not None:
                edits[f"blocks.{index}.feedforward_norm"] = _normalize(block.feedforward_norm, incoming, row)
                row += 1
        edits[f"blocks.{len(self.blocks) - 1}"] = lambda x, row=row: incoming(row, 1)[0]  # type: ignore[misc]
        with edit(self.model, edits):
            out: Tensor = self.model(tokens)
            return out

    def _senders(self, live: list[Tensor]) -> dict[str, Edit]:
        """Edits that change nothing and append every sender's output to `live`, in order."""

        def keep(x: Tensor) -> Tensor:
            live.append(x)
            return x

        def keep_heads(output: nn.Module) -> Edit:
            def split(heads: Tensor) -> Tensor:
                live.extend(head_outputs(heads, output).unbind(2))
                return heads

            return split

        edits: dict[str, Edit] = {"dropout": keep}
        for index, block in enumerate(self.blocks):
            edits[f"blocks.{index}.mixer.heads"] = keep_heads(block.mixer.output)
            if block.feedforward is not None:
                edits[f"blocks.{index}.feedforward"] = keep
        return edits

    def _biases(self, known: int) -> Tensor | float:
        """The sum of the output biases of attention, which belong to no head, before sender number `known`."""
        total: Tensor | float = 0.0
        for index, block in enumerate(self.blocks):
            bias = bias_of(block.mixer.output)
            if bias is not None and self.senders.index(f"{index}.0") < known:
                total = total + bias
        return total


def _heads(block: Any) -> int:
    out: int = block.mixer.spec.heads
    return out


def _inputs(block: Any) -> tuple[int, int, int]:
    """How many inputs of queries, keys and values a block has."""
    return _heads(block), block.mixer.kv_heads, block.mixer.kv_heads


def _project(block: Any, name: str, count: int, incoming: Callable[[int, int], Tensor], row: int) -> Edit:
    """The edit that gives each head of a projection its own input."""
    linear: nn.Module = getattr(block.mixer, name)

    def replaced(output: Tensor) -> Tensor:
        own = block.mixer_norm.forward(incoming(row, count))
        # forward, not a call: hooks must not see this; every head's input goes through all heads, and keeps its own
        each = linear.forward(own.flatten(0, 1)).unflatten(0, own.shape[:2]).unflatten(-1, (count, -1))
        out: Tensor = each.diagonal(dim1=0, dim2=3).permute(0, 1, 3, 2).flatten(2).contiguous()
        return out

    return replaced


def _normalize(norm: Any, incoming: Callable[[int, int], Tensor], row: int) -> Edit:
    return lambda output: norm.forward(incoming(row, 1)[0])
