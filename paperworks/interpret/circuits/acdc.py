"""ACDC: find the circuit of a behaviour by trying to do without each edge (Conmy et al. 2023, arXiv:2304.14997)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.interpret.probing.separation import auroc


@dataclass(frozen=True)
class Circuit:
    """A set of edges of a graph, and how far the model's output is from its own when only they are on.

    Attributes:
        graph: whose edges they are.
        edges: bool (receivers, senders).
        divergence: KL(model || circuit) in nats, mean over rows and chosen positions.
    """

    graph: EdgeGraph
    edges: Bool[Tensor, "receivers senders"]
    divergence: float

    def __len__(self) -> int:
        """The number of edges."""
        return int(self.edges.sum())

    def __str__(self) -> str:
        """Draw the circuit as a tree, from the logits down to the embedding."""
        head = f"{len(self)} of {len(self.graph)} edges, KL {self.divergence:.3g} nats\nlogits"
        return "\n".join([head, *self._below("logits", "", {"logits"})])

    def _below(self, receiver: str, indent: str, shown: set[str]) -> list[str]:
        lines: list[str] = []
        senders = [
            self.graph.senders[column] for column in self.edges[self._row(receiver)].nonzero().flatten().tolist()
        ]
        for index, sender in enumerate(senders):
            last = index == len(senders) - 1
            parts = [name for name in self.graph.receivers if sender in self.graph.node(name)]
            parts = [name for name in parts if self.edges[self._row(name)].any()]
            again = sender in shown and bool(parts)
            lines.append(f"{indent}{'└─' if last else '├─'} {sender}{' (above)' if again else ''}")
            if again:
                continue
            shown.add(sender)
            deeper = indent + ("   " if last else "│  ")
            for number, part in enumerate(parts):
                end = number == len(parts) - 1
                lines.append(f"{deeper}{'└─' if end else '├─'} {part.rpartition('.')[2]} reads")
                lines += self._below(part, deeper + ("   " if end else "│  "), shown)
        return lines

    def _row(self, receiver: str) -> int:
        return self.graph.receivers.index(receiver)

    def against(self, truth: Bool[Tensor, "receivers senders"]) -> tuple[float, float]:
        """(precision, recall): the share of found edges that are true, and of true edges that are found."""
        hits = (self.edges & truth).sum().item()
        return hits / max(1, len(self)), hits / max(1, int(truth.sum()))

    def draw(self, axes: Any, truth: Bool[Tensor, "receivers senders"] | None = None, **colors: str) -> None:
        """Draw nodes by layer on matplotlib axes, edges as lines; edges that are not in `truth` in another color.

        colors: edge, wrong, node, text (matplotlib colors).
        """
        color = {"edge": "#2f6fde", "wrong": "#e0663a", "node": "#8b93a1", "text": "#1d2129", **colors}
        nodes = [*self.graph.senders, "logits"]
        rows: dict[int, list[str]] = {}
        for name in nodes:
            layer, _, part = name.partition(".")
            height = {"embed": 0, "logits": 10**6}.get(name, 2 + 2 * int(layer) + (part == "mlp") if part else 0)
            rows.setdefault(height, []).append(name)
        place: dict[str, tuple[float, float]] = {}
        for level, height in enumerate(sorted(rows)):
            for index, name in enumerate(rows[height]):
                place[name] = (index - (len(rows[height]) - 1) / 2, float(level))
        offset = {"q": -0.16, "k": 0.0, "v": 0.16}
        for row, column in self.edges.nonzero().tolist():
            receiver, sender = self.graph.receivers[row], self.graph.senders[column]
            part = receiver.rpartition(".")[2]
            true = truth is None or bool(truth[row, column])
            for target in self.graph.node(receiver) or ["logits"]:
                (x, y), (u, v) = place[sender], place[target]
                u += offset.get(part, 0.0)
                axes.annotate(
                    "",
                    (u, v - (0.28 if part in offset else 0.14)),
                    (x, y + 0.12),
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": color["edge" if true else "wrong"],
                        "lw": 1.6 if true else 1.0,
                    },
                )
                if part in offset:
                    axes.text(u, v - 0.21, part, fontsize=8, color=color["text"], ha="center", va="center")
        for name, (x, y) in place.items():
            axes.text(
                x,
                y,
                name,
                ha="center",
                va="center",
                color=color["text"],
                bbox={"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": color["node"]},
            )
        wide = max(len(names) for names in rows.values()) / 2
        axes.set_xlim(-wide, wide)
        axes.set_ylim(-0.4, len(rows) - 0.6)
        axes.set_axis_off()


def divergence(
    reference: Float[Tensor, "batch time vocab"],
    logits: Float[Tensor, "batch time vocab"],
    positions: Bool[Tensor, "batch time"] | None = None,
) -> float:
    """KL(reference || logits) in nats, mean over the chosen positions."""
    target = reference.double().log_softmax(-1)
    each = (target.exp() * (target - logits.double().log_softmax(-1))).sum(-1)
    return (each if positions is None else each[positions]).mean().item()


@torch.no_grad()
def evaluate(
    graph: EdgeGraph,
    edges: Bool[Tensor, "receivers senders"],
    clean: Int[Tensor, "batch time"],
    corrupted: Int[Tensor, "batch time"],
    positions: Bool[Tensor, "batch time"] | None = None,
) -> Circuit:
    """A set of edges as a circuit, with its divergence from the whole model."""
    logits = graph.run(clean, edges, graph.outputs(corrupted))
    return Circuit(graph, edges & graph.possible, divergence(graph.model(clean), logits, positions))


@torch.no_grad()
def acdc(
    graph: EdgeGraph,
    clean: Int[Tensor, "batch time"],
    corrupted: Int[Tensor, "batch time"],
    threshold: float,
    *,
    positions: Bool[Tensor, "batch time"] | None = None,
    zero: bool = False,
    on_each: Callable[[], None] | None = None,
) -> Circuit:
    """The edges that the behaviour needs: from the logits backwards, drop each whose loss costs little.

    For each receiver in reverse topological order, for each of its senders in reverse order: H' is H without the edge;
    keep H' if KL(G || H') - KL(G || H) < threshold. Nodes that nothing reads any more lose their inputs untried. The
    result depends on the order, as the paper's does: of two edges that can replace each other the later one stays.

    Args:
        graph: of the model.
        clean: the behaviour's prompts.
        corrupted: prompts of the same shape without it; what edges carry when they are off.
        threshold: tau, in nats.
        positions: where the behaviour is looked at; None is everywhere.
        zero: whether edges that are off carry zeros instead.
        on_each: called after each edge that is tried.

    Raises:
        ValueError: when prompts differ in shape or no position is chosen.
    """
    if clean.shape != corrupted.shape:
        raise ValueError(f"clean {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)} must have the same shape")
    if positions is not None and (positions.shape != clean.shape or not bool(positions.any())):
        raise ValueError(f"positions must mark some of {tuple(clean.shape)} tokens, got {tuple(positions.shape)}")
    outputs = graph.outputs(corrupted)
    if zero:
        outputs = torch.zeros_like(outputs)
    reference = graph.model(clean)
    edges = graph.possible.clone()
    current = divergence(reference, graph.run(clean, edges, outputs), positions)
    for row in reversed(range(len(graph.receivers))):
        node = graph.node(graph.receivers[row])
        columns = [graph.senders.index(name) for name in node]
        unread = bool(node) and not bool(edges[:, columns].any())
        for column in reversed(graph.possible[row].nonzero().flatten().tolist()):
            edges[row, column] = False
            if unread:
                continue
            tried = divergence(reference, graph.run(clean, edges, outputs), positions)
            if tried - current < threshold:
                current = tried
            else:
                edges[row, column] = True
            if on_each is not None:
                on_each()
    return Circuit(graph, edges, current)


def recovery_auc(
    scores: Float[Tensor, "receivers senders"], truth: Bool[Tensor, "receivers senders"], graph: EdgeGraph
) -> float:
    """The area under the ROC curve of ranking edges by score: the chance that a true edge outranks another."""
    right = int((truth & graph.possible).sum())
    if not 0 < right < len(graph):
        raise ValueError(f"an AUC needs true and false edges; there are {right} and {len(graph) - right}")
    return auroc(scores[graph.possible], truth[graph.possible])
