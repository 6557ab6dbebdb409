"""ACDC: find a circuit by trying to do without each edge; checked on a circuit that was planted."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from paperworks.interpret.circuits.acdc import acdc, evaluate, recovery_auc
from paperworks.interpret.circuits.attribution_patching import attribute_edges
from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.interpret.circuits.patching import Metric
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.lab.figures import COLORS, INK
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
    equation=r"\text{drop } e \text{ from } H \text{ if } "
    r"D_{KL}(p_G \,\Vert\, p_{H \setminus e}) - D_{KL}(p_G \,\Vert\, p_H) < \tau",
    usage="""
import torch
from paperworks.interpret.circuits.acdc import acdc
from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.testbeds import induction_model

graph = EdgeGraph(induction_model.hand_set(noise=0.08))   # two heads of four are an induction circuit
clean, corrupted = induction_model.hand_sequences(8), induction_model.hand_unrelated(8)
second_copy = torch.zeros_like(clean, dtype=torch.bool)
second_copy[:, 12:-1] = True
circuit = acdc(graph, clean, corrupted, 0.1, positions=second_copy)
print(len(circuit), "of", len(graph), "edges:", graph.named(circuit.edges))
""",
    notes="Norms are not frozen, and the order in which edges are tried is the reverse of the model's; the paper's "
    "circuits of GPT-2 are not repeated.",
    budget_exception="Three models are trained, and each is pruned edge by edge: a little over 3 minutes.",
)

PLANTED = ("embed->0.0.v", "0.0->1.0.k", "embed->1.0.q", "embed->1.0.v", "1.0->logits")
NOISE = 0.08  # size of the random heads beside the circuit: the model still solves its task
THRESHOLDS = (0.0001, 0.001, 0.01, 0.1, 1.0, 3.0)  # nats


def _planted(lab: Lab, seed: int) -> tuple[EdgeGraph, Tensor, Tensor, Bool[Tensor, "batch time"]]:
    """The graph of the hand-set model, clean and corrupted sequences, and where the second copy is predicted."""
    count = lab.pick(smoke=2, small=32)
    clean, corrupted = small.hand_sequences(count, seed), small.hand_unrelated(count, seed + 1000)
    return EdgeGraph(small.hand_set(NOISE, seed)), clean, corrupted, _second_copy(clean, 12)


def _second_copy(tokens: Tensor, start: int) -> Bool[Tensor, "batch time"]:
    marked = torch.zeros_like(tokens, dtype=torch.bool)
    marked[:, start:-1] = True
    return marked


def _randomly(graph: EdgeGraph, count: int, draws: torch.Generator) -> Bool[Tensor, "receivers senders"]:
    """`count` edges at random."""
    order = torch.rand(graph.possible.shape, generator=draws)
    chosen = order.masked_fill(~graph.possible, -1).flatten().topk(count).indices
    return torch.zeros(order.numel(), dtype=torch.bool).index_fill(0, chosen, True).view_as(graph.possible)


@paper.claim(
    "A planted circuit is found edge by edge, over a wide range of thresholds",
    paper="Section 4: ACDC recovers the edges that were found by hand (all 68 of Greater-Than); here the truth is "
    "known: five edges of 29 carry the tokens",
    control="five random edges",
)
def recovers_a_planted_circuit(lab: Lab) -> Verdict:
    """Run ACDC at several thresholds on the hand-set induction model with random heads beside the circuit."""
    thresholds = lab.pick(smoke=(0.1,), small=THRESHOLDS)

    def discovered(seed: int) -> dict[str, float | list[float]]:
        graph, clean, corrupted, positions = _planted(lab, seed)
        truth = graph.edges(*PLANTED)
        found = {threshold: acdc(graph, clean, corrupted, threshold, positions=positions) for threshold in thresholds}
        largest = torch.zeros(graph.possible.shape)  # the largest threshold that keeps each edge
        for threshold, circuit in found.items():
            largest = largest.maximum(threshold * circuit.edges)
        scores = {threshold: circuit.against(truth) for threshold, circuit in found.items()}
        if seed == lab.seed:
            lab.text("The circuit at a threshold of 0.1 nats", str(found[0.1]))
        return {
            "lower of precision and recall": min(scores[0.1]),
            "the lowest of them from 0.01 to 3 nats": min(
                min(pair) for threshold, pair in scores.items() if threshold >= 0.01
            ),
            "area under the curve": recovery_auc(largest, truth, graph),
            "KL, nats": found[0.1].divergence,
        }

    def random(seed: int) -> dict[str, float | list[float]]:
        graph, clean, corrupted, positions = _planted(lab, seed)
        truth, draws = graph.edges(*PLANTED), lab.generator(seed)
        edges = _randomly(graph, len(PLANTED), draws)
        lowest = min(evaluate(graph, edges, clean, corrupted, positions).against(truth))
        return {
            "lower of precision and recall": lowest,
            "the lowest of them from 0.01 to 3 nats": lowest,
            "area under the curve": recovery_auc(torch.rand(truth.shape, generator=draws), truth, graph),
            "KL, nats": evaluate(graph, edges, clean, corrupted, positions).divergence,
        }

    verdict = lab.compare(
        arms={"ACDC": discovered, "random edges": random},
        main=Beats("ACDC", "random edges", on="lower of precision and recall", by=0.4),
        also=[
            AtLeast("ACDC", 0.9, on="the lowest of them from 0.01 to 3 nats"),
            AtLeast("ACDC", 0.95, on="area under the curve"),
            Beats("ACDC", "random edges", on="KL, nats", by_ratio=0.9, lower=True),
        ],
        note="The seed draws the random heads and the sequences. Corrupted sequences have other tokens at the same "
        "positions and no repetition, so edges that carry positions only (embed to the queries and keys of head 0.0) "
        "are not part of the truth. A corrupted sequence that repeats at the same distance would not do: corrupted "
        "queries and keys together then look at the right place.",
    )
    lab.points("lower of precision and recall", name="recovery", title="Lower of precision and recall of the edges")
    return verdict


@paper.claim(
    "The limits are the whole model and the corrupted run",
    paper="Algorithm 1: a threshold below all effects keeps the graph, one above all removes it",
    kind="exact",
)
def limits(lab: Lab) -> Verdict:
    """Compare the graph with all edges on, and with all off, with the plain model."""
    graph, clean, corrupted, positions = _planted(lab, lab.seed)
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


SATURATED = 25.0  # score of a match; its softmax has hardly a gradient


@paper.claim(
    "Edge attribution ranks the planted edges first, if its gradient is taken where attention is not saturated",
    paper="Syed et al. 2023: attribution of all edges from one backward pass matches ACDC",
    control="random scores; and the clean run of a model whose attention is so sharp that its softmax is saturated",
)
def attribution_ranks_edges(lab: Lab) -> Verdict:
    """Measure how well edge attributions separate the planted edges, by metric, run and sharpness."""

    def attributed(metric: str, run: str, sharpness: float = small.SHARPNESS) -> Callable[[int], dict[str, float]]:
        def area(seed: int) -> dict[str, float]:
            _, clean, corrupted, _ = _planted(lab, seed)
            graph = EdgeGraph(small.hand_set(NOISE, seed, sharpness))
            with torch.no_grad():
                reference = graph.model(clean)
            judged = _divergence(reference, 12) if metric == "KL" else _answer_logit(clean, 12)
            scores = attribute_edges(graph, clean, corrupted, judged, at=run)  # type: ignore[arg-type]
            return {"area under the curve": recovery_auc(scores.abs(), graph.edges(*PLANTED), graph)}

        return area

    def random(seed: int) -> dict[str, float]:
        graph = EdgeGraph(small.hand_set(NOISE, seed))
        truth, draws = graph.edges(*PLANTED), lab.generator(seed)
        return {"area under the curve": recovery_auc(torch.rand(truth.shape, generator=draws), truth, graph)}

    method, area = "logit, clean run", "area under the curve"
    verdict = lab.compare(
        arms={
            method: attributed("logit", "clean"),
            "KL, corrupted run": attributed("KL", "corrupted"),
            "KL, clean run": attributed("KL", "clean"),
            "logit, clean run, saturated": attributed("logit", "clean", SATURATED),
            "random scores": random,
        },
        main=Beats(method, "logit, clean run, saturated", on=area, by=0.1),
        also=[
            Beats(method, "random scores", on=area, by=0.2),
            AtLeast(method, 0.9, on=area),
            AtLeast("KL, corrupted run", 0.9, on=area),
        ],
        note="KL at the clean run is at its minimum, so that its gradient is rounding error; do not use it. At the "
        "corrupted run nothing matches and attention is spread, so that its gradient lives even where matches are "
        "sharp.",
    )
    lab.points(area, name="attribution", title="Recovery of the planted edges, area under the curve")
    return verdict


@paper.claim(
    "A trained induction model does its task with a fraction of its edges",
    paper="Section 4: small subgraphs keep the behaviour",
    control="as many random edges",
)
def prunes_a_trained_model(lab: Lab) -> Verdict:
    """Prune the trained two-layer model on repeated tokens, and compare loss and accuracy on the second copy."""
    count, threshold = lab.pick(smoke=(2, 10.0), small=(16, 0.01))

    @cache
    def pruned(seed: int) -> tuple[EdgeGraph, Tensor]:
        model = small.induction_model(Lab(lab.scale, seed))
        graph = EdgeGraph(model)
        clean, corrupted = _repeated_and_not(count, lab.generator(seed + 1))
        positions = _second_copy(clean, small.BLOCK)
        with lab.progress("edges", len(graph)) as advance:
            found = acdc(graph, clean, corrupted, threshold, positions=positions, on_each=lambda: advance(1))
        if seed == lab.seed:
            lab.text("The circuit of the trained model", str(found))
            with lab.figure("trained", figsize=(7.6, 4.2)) as figure:
                axes = figure.subplots()
                found.draw(axes, edge=COLORS[0], text=INK)
                axes.set_title(f"Trained model: {len(found)} of {len(graph)} edges")
        return graph, found.edges

    def arm(choose: Callable[[int, EdgeGraph, Tensor], Tensor]) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            graph, found = pruned(seed)
            edges = choose(seed, graph, found)
            fresh, other = _repeated_and_not(4 * count, lab.generator(seed + 1000))
            return {
                "KL, nats": evaluate(graph, edges, fresh, other, _second_copy(fresh, small.BLOCK)).divergence,
                "accuracy": _accuracy(graph, edges, fresh, other),
                "share of the edges": int(edges.sum()) / len(graph),
            }

        return measured

    def random(seed: int, graph: EdgeGraph, found: Tensor) -> Tensor:
        return _randomly(graph, max(1, int(found.sum())), lab.generator(seed + 7))

    verdict = lab.compare(
        arms={
            "circuit": arm(lambda seed, graph, found: found),
            "random edges": arm(random),
            "model": arm(lambda seed, graph, found: graph.possible),
        },
        main=Beats("circuit", "random edges", on="KL, nats", by=1.0, lower=True),
        also=[
            AtMost("circuit", 0.1, on="KL, nats"),
            Within("circuit", "model", on="accuracy", by=0.02),
            AtMost("circuit", 0.25, on="share of the edges"),
        ],
        seeds=3,
        note="Threshold 0.01 nats. Judged on other sequences than those that chose the edges. All four heads of the "
        "second layer learn induction and share the work, and each needs an edge to queries, keys, values and logits: "
        "16 edges before any of the first layer's.",
    )
    lab.points("KL, nats", name="trained-divergence", title="Divergence from the model, nats")
    return verdict


def _repeated_and_not(count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blocks of tokens twice, and as many tokens that repeat nothing."""
    return small.repeated(count, small.BLOCK, 2, draws), small.repeated(count, 2 * small.BLOCK, 1, draws)


@torch.no_grad()
def _accuracy(graph: EdgeGraph, edges: Tensor, clean: Tensor, corrupted: Tensor) -> float:
    logits = functional.log_softmax(graph.run(clean, edges, graph.outputs(corrupted)), -1)
    right = logits[:, small.BLOCK : -1].argmax(-1) == clean[:, small.BLOCK + 1 :]
    return right.float().mean().item()
