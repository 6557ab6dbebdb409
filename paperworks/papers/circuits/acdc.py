"""ACDC: find a circuit by trying to do without each edge; checked on a circuit that was planted."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from paperworks.interpret.circuits.acdc import Circuit, acdc, evaluate, recovery_auc
from paperworks.interpret.circuits.attribution_patching import attribute_edges
from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.interpret.circuits.patching import Metric
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import DecoderModel
from paperworks.testbeds import induction_model as small

paper = Paper(
    key="acdc",
    title="Towards Automated Circuit Discovery for Mechanistic Interpretability",
    authors="Conmy, Mavor-Parker, Lynch, Heimersheim, Garriga-Alonso",
    year=2023,
    ref="arXiv:2304.14997; edge attribution: arXiv:2310.10348",
    family="circuits",
    summary=(
        "A model is a graph whose edges join every output to every later input. Going backwards from the logits, each "
        "edge whose clean value can be replaced by a corrupted one at little cost is dropped; what is left is a "
        "circuit."
    ),
    implements=(
        "paperworks.interpret.circuits.edges.EdgeGraph",
        "paperworks.interpret.circuits.acdc.acdc",
        "paperworks.interpret.circuits.acdc.Circuit",
        "paperworks.interpret.circuits.attribution_patching.attribute_edges",
    ),
)

PLANTED = ("embed->0.0.v", "0.0->1.0.k", "embed->1.0.q", "embed->1.0.v", "1.0->logits")
NOISE = 0.08  # size of the random heads beside the circuit: the model still solves its task
THRESHOLDS = (0.0001, 0.001, 0.01, 0.1, 1.0, 3.0)


def _planted(lab: Lab) -> tuple[EdgeGraph, Tensor, Tensor, Bool[Tensor, "batch time"]]:
    """Return the graph of the hand-set model, clean and corrupted sequences, and where the second copy is predicted."""
    count = lab.pick(smoke=2, small=32)
    clean, corrupted = small.hand_sequences(count, lab.seed), small.hand_unrelated(count, lab.seed + 1000)
    return EdgeGraph(small.hand_set(NOISE, lab.seed)), clean, corrupted, _second_copy(clean, 12)


def _second_copy(tokens: Tensor, start: int) -> Bool[Tensor, "batch time"]:
    marked = torch.zeros_like(tokens, dtype=torch.bool)
    marked[:, start:-1] = True
    return marked


@torch.no_grad()
def _randomly(lab: Lab, graph: EdgeGraph, count: int, draw: int) -> Bool[Tensor, "receivers senders"]:
    """Choose `count` edges at random."""
    order = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(lab.seed + draw))
    chosen = order.masked_fill(~graph.possible, -1).flatten().topk(count).indices
    return torch.zeros(order.numel(), dtype=torch.bool).index_fill(0, chosen, True).view_as(graph.possible)


@paper.claim(
    "A planted circuit is found edge by edge, over a wide range of thresholds",
    paper="Section 4: ACDC recovers the edges that were found by hand (all 68 of Greater-Than); here the truth is "
    "known: "
    "five edges of 29 carry the tokens",
    control="five random edges",
)
def recovers_a_planted_circuit(lab: Lab) -> Verdict:
    """Run ACDC at several thresholds on the hand-set induction model with random heads beside the circuit."""
    graph, clean, corrupted, positions = _planted(lab)
    truth = graph.edges(*PLANTED)
    thresholds = lab.pick(smoke=(0.1,), small=THRESHOLDS)
    found: dict[float, Circuit] = {
        threshold: acdc(graph, clean, corrupted, threshold, positions=positions)
        for threshold in lab.track(thresholds, "thresholds")
    }
    scores = {threshold: circuit.against(truth) for threshold, circuit in found.items()}
    largest = torch.zeros(graph.possible.shape)  # the largest threshold that keeps each edge, for a curve over all
    for threshold, circuit in found.items():
        largest = largest.maximum(threshold * circuit.edges)
    random = [evaluate(graph, _randomly(lab, graph, 5, draw), clean, corrupted, positions) for draw in range(20)]
    random_scores = torch.tensor([circuit.against(truth) for circuit in random]).mean(0)
    shown = found[0.1]
    lab.text("The circuit at a threshold of 0.1 nats", str(shown))
    lab.text("Its edges", "\n".join(graph.named(shown.edges)))
    _draw_circuit(lab, shown, random[0], truth)
    wide = [threshold for threshold in thresholds if threshold >= 0.01]
    return lab.judge(
        checks={
            "precision and recall of at least 0.9 from 0.01 to 3 nats": min(
                min(scores[threshold]) for threshold in wide
            )
            >= 0.9,
            "area under the curve over all thresholds of at least 0.95": recovery_auc(largest, truth, graph) >= 0.95,
            "random edges stay below 0.5 in both": random_scores.max() < 0.5,
            "and leave more than ten times the divergence": min(circuit.divergence for circuit in random)
            > 10 * shown.divergence,
        },
        measured={
            "thresholds in nats": list(thresholds),
            "edges": [len(circuit) for circuit in found.values()],
            "precision": [scores[threshold][0] for threshold in thresholds],
            "recall": [scores[threshold][1] for threshold in thresholds],
            "KL at 0.1": shown.divergence,
            "area under the curve": recovery_auc(largest, truth, graph),
        },
        control={
            "precision and recall of random edges, mean of 20": random_scores,
            "least KL of them": min(circuit.divergence for circuit in random),
        },
        note="Corrupted sequences have other tokens at the same positions and no repetition, so edges that carry "
        "positions only (embed to the queries and keys of head 0.0) are not part of the truth. A corrupted sequence "
        "that "
        "repeats at "
        "the same distance would not do: corrupted queries and keys together then look at the right place.",
    )


def _draw_circuit(lab: Lab, found: Circuit, random: Circuit, truth: Tensor) -> None:
    with lab.figure("graph", figsize=(8.4, 4.4)) as figure:
        left, right = figure.subplots(1, 2)
        found.draw(left, truth, edge=COLORS[0], wrong=COLORS[1], text=INK)
        left.set_title(f"Found by ACDC: {len(found)} of {len(found.graph)} edges")
        random.draw(right, truth, edge=COLORS[0], wrong=CONTROL, text=INK)
        right.set_title("Five random edges (control)")


@paper.claim(
    "The limits are the whole model and the corrupted run",
    paper="Algorithm 1: a threshold below all effects keeps the graph, one above all removes it",
    kind="exact",
)
def limits(lab: Lab) -> Verdict:
    """Compare the graph with all edges on, and with all off, with the plain model."""
    graph, clean, corrupted, positions = _planted(lab)
    outputs = graph.outputs(corrupted)
    with torch.no_grad():
        on = (graph.run(clean, graph.possible, outputs) - graph.model(clean)).abs().max().item()
        off = (graph.run(clean, ~graph.possible, outputs) - graph.model(corrupted)).abs().max().item()
    everything = acdc(graph, clean, corrupted, -torch.inf, positions=positions)
    nothing = acdc(graph, clean, corrupted, torch.inf, positions=positions)
    return lab.judge(
        checks={
            "all edges on: the model's logits, to 1e-4": on < 1e-4,
            "all edges off: those of the corrupted run": off < 1e-4,
            "a threshold of minus infinity keeps all edges at KL 0": len(everything) == len(graph)
            and abs(everything.divergence) < 1e-9,
            "one of infinity keeps none": len(nothing) == 0,
        },
        measured={"error with all on": on, "error with all off": off, "edges": len(graph)},
        note="Logits reach 10; float32.",
    )


def _answer_logit(clean: Tensor, start: int) -> Metric:
    def metric(logits: Tensor) -> Tensor:
        return logits[:, start:-1].gather(-1, clean[:, start + 1 :, None])[..., 0].mean(1)

    return metric


def _divergence(reference: Float[Tensor, "batch time vocab"], start: int) -> Metric:
    target = reference[:, start:-1].log_softmax(-1)

    def metric(logits: Tensor) -> Tensor:
        return (target.exp() * (target - logits[:, start:-1].log_softmax(-1))).sum(-1).mean(1)

    return metric


@paper.claim(
    "Edge attribution ranks the planted edges first, if its gradient is taken where attention is not saturated",
    paper="Syed et al. 2023: attribution of all edges from one backward pass matches ACDC; Conmy et al., section 4: "
    "gradients can vanish",
    control="random scores; and the clean run of a model whose attention is so sharp that its softmax is saturated",
)
def attribution_ranks_edges(lab: Lab) -> Verdict:
    """Measure how well edge attributions separate the planted edges, by metric, run and sharpness."""
    _, clean, corrupted, _ = _planted(lab)
    areas: dict[str, dict[str, float]] = {}
    for name, sharpness in (("sharp", small.SHARPNESS), ("saturated", 25.0)):
        graph = EdgeGraph(small.hand_set(NOISE, lab.seed, sharpness))
        truth = graph.edges(*PLANTED)
        with torch.no_grad():
            reference = graph.model(clean)
        metrics = {"KL": _divergence(reference, 12), "logit": _answer_logit(clean, 12)}
        areas[name] = {
            f"{metric}, {run} run": recovery_auc(
                attribute_edges(graph, clean, corrupted, metrics[metric], at=run).abs(),  # type: ignore[arg-type]
                truth,
                graph,
            )
            for metric, run in (("KL", "corrupted"), ("logit", "clean"), ("KL", "clean"), ("logit", "corrupted"))
        }
    draws = torch.Generator().manual_seed(lab.seed)
    random = sum(recovery_auc(torch.rand(truth.shape, generator=draws), truth, graph) for _ in range(200)) / 200
    good = [areas["sharp"]["KL, corrupted run"], areas["sharp"]["logit, clean run"]]
    lab.table(
        "Area under the curve of edge recovery",
        ["metric and run of the gradient", "a match scores 8", "a match scores 25 (saturated)"],
        [[name, areas["sharp"][name], areas["saturated"][name]] for name in areas["sharp"]],
    )
    return lab.judge(
        checks={
            "above 0.9 by KL at the corrupted run and by logit at the clean run": min(good) > 0.9,
            "random scores stay near 0.5": abs(random - 0.5) < 0.1,
            "saturated attention loses at least 0.1 at the clean run": areas["saturated"]["logit, clean run"]
            < min(good) - 0.1,
        },
        measured={"area by " + name: value for name, value in areas["sharp"].items()},
        control={"random scores": random}
        | {"saturated, by " + name: value for name, value in areas["saturated"].items()},
        note="KL at the clean run is at its minimum, so that its gradient is rounding error; do not use it. At the "
        "corrupted run nothing matches and attention is spread, so that its gradient lives even where matches are "
        "sharp.",
    )


@paper.claim(
    "A trained induction model does its task with a fraction of its edges",
    paper="Section 4: small subgraphs keep the behaviour",
    control="as many random edges",
)
def prunes_a_trained_model(lab: Lab) -> Verdict:
    """Prune the trained two-layer model on repeated tokens, and compare loss and accuracy on the second copy."""
    model = small.induction_model(lab)
    graph = EdgeGraph(model)
    draws = torch.Generator().manual_seed(lab.seed + 1)
    count = lab.pick(smoke=2, small=16)
    clean, corrupted = _repeated_and_not(count, draws)
    positions = _second_copy(clean, small.BLOCK)
    with lab.progress("edges", len(graph)) as advance:
        found = acdc(
            graph, clean, corrupted, lab.pick(smoke=10.0, small=0.01), positions=positions, on_each=lambda: advance(1)
        )
    fresh, other = _repeated_and_not(4 * count, draws)
    marked = _second_copy(fresh, small.BLOCK)
    circuit = evaluate(graph, found.edges, fresh, other, marked)
    random = evaluate(graph, _randomly(lab, graph, max(1, len(found)), 7), fresh, other, marked)
    accuracy = {
        name: _accuracy(graph, model, edges, fresh, other)
        for name, edges in (("model", graph.possible), ("circuit", found.edges), ("random", random.edges))
    }
    lab.text("The circuit of the trained model", str(found))
    with lab.figure("trained", figsize=(7.6, 4.2)) as figure:
        axes = figure.subplots()
        found.draw(axes, edge=COLORS[0], text=INK)
        axes.set_title(f"Trained model: {len(found)} of {len(graph)} edges")
    return lab.judge(
        checks={
            "fewer than 25% of the edges": len(found) < 0.25 * len(graph),
            "KL below 0.1 nats on fresh sequences": circuit.divergence < 0.1,
            "accuracy within 2 points of the model's": accuracy["circuit"] > accuracy["model"] - 0.02,
            "random edges: KL above 1 nat": random.divergence > 1,
        },
        measured={
            "edges": [len(found), len(graph)],
            "KL on fresh sequences": circuit.divergence,
            "accuracy of the circuit and of the model": [accuracy["circuit"], accuracy["model"]],
        },
        control={"KL": random.divergence, "accuracy": accuracy["random"]},
        note="Threshold 0.01 nats, as fixed before the run. All four heads of the second layer learned induction and "
        "share the work, and each needs an edge to queries, keys, values and logits: 16 edges before any of the first "
        "layer's.",
    )


def _repeated_and_not(count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return blocks of tokens twice, and as many tokens that repeat nothing."""
    return small.repeated(count, small.BLOCK, 2, draws), small.repeated(count, 2 * small.BLOCK, 1, draws)


@torch.no_grad()
def _accuracy(graph: EdgeGraph, model: DecoderModel, edges: Tensor, clean: Tensor, corrupted: Tensor) -> float:
    logits = functional.log_softmax(graph.run(clean, edges, graph.outputs(corrupted)), -1)
    right = logits[:, small.BLOCK : -1].argmax(-1) == clean[:, small.BLOCK + 1 :]
    return right.float().mean().item()
