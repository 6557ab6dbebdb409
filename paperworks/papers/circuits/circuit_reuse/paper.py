"""Circuit reuse: do two tasks use the same heads of one model, and can one circuit's heads be told what to do?

A synthetic version, trained here: one small transformer on two tasks, against one transformer for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from paperworks import interpret
from paperworks.interpret.circuits.overlap import (
    StagedCircuit,
    attending,
    chance_overlap,
    overlap,
    rows_on,
    staged_circuit,
)
from paperworks.interpret.circuits.path_patching import Head, all_heads
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.papers.circuits.circuit_reuse.two_tasks import TASKS, TIME, Prompts, Task, accuracy, prompts, trained

paper = Paper(
    key="circuit-reuse",
    title="Circuit Component Reuse Across Tasks in Transformer Language Models",
    authors="Merullo, Eickhoff, Pavlick",
    year=2023,
    ref="arXiv:2310.08744; GitHub jmerullo/circuit_reuse",
    family="circuits",
    summary=(
        "Path patching, stage by stage, finds the heads behind two tasks; many of them are the same. Heads that do not "
        "do in one task what they do in the other can be told where to look, and the model is repaired."
    ),
    implements=(
        "paperworks.interpret.circuits.overlap.staged_circuit",
        "paperworks.interpret.circuits.overlap.overlap",
        "paperworks.interpret.circuits.overlap.chance_overlap",
        "paperworks.interpret.circuits.overlap.attending",
        "paperworks.interpret.circuits.overlap.rows_on",
    ),
    equation=r"\text{overlap} = \frac{|C_1 \cap C_2|}{|C_1 \cup C_2|}",
    usage="""
from paperworks.interpret.circuits.overlap import chance_overlap, overlap

names = [(0, 1), (0, 3), (1, 2), (2, 0), (2, 4)]            # (layer, head) of one task's circuit
colours = [(0, 1), (0, 3), (1, 2), (2, 4), (2, 5)]
heads = [(layer, head) for layer in range(3) for head in range(6)]
print("overlap:", overlap(names, colours).jaccard)
by_chance = chance_overlap(names, colours, heads, by_layer=True)   # sets with as many heads in each layer
print(f"by chance {by_chance.mean:.2f}, {by_chance.deviations:.1f} standard deviations above it")
""",
    notes="Two synthetic tasks and a model of 18 heads trained on both stand in for GPT-2 medium.",
)

STAGES = {"movers": "logits", "inhibition": "qkv", "first": "qkv"}
OVER = 0.05  # the share of a stage's effect that a head must have
ENOUGH = 3  # standard deviations above chance
FOUR = 4  # the paper overrides four heads


def _sentences(lab: Lab, seed: int, task: Task, *, adversarial: bool = False, draw: int = 10) -> Prompts:
    count = lab.pick(smoke=16, small=1000 if adversarial else 400)
    return prompts(task, count, lab.generator(seed + draw), adversarial=adversarial)


@cache
def _circuit(lab: Lab, seed: int, task: Task) -> StagedCircuit:
    """Heads of a task in the model that was trained on both."""
    model, asked = trained(lab, seed).model, _sentences(lab, seed, task)
    over = lab.pick(smoke=0.0, small=OVER)  # an untrained model has no strong heads
    return staged_circuit(model, asked.tokens, asked.corrupted, asked.metric, STAGES, over=over)


def _named(heads: Sequence[Head]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


@paper.claim(
    "Two tasks of one model share more of their heads than chance would have it",
    paper="Abstract: about 78% of the in-circuit heads of GPT-2 medium are shared by the two tasks",
    control="random sets with as many heads in each layer",
)
def heads_are_reused(lab: Lab) -> Verdict:
    """Find both circuits in a model of both tasks, and compare their overlap with that of all sets of their sizes."""

    def shared(seed: int) -> dict[str, float]:
        names, colours = (_circuit(lab, seed, task).heads for task in TASKS)
        every = all_heads(trained(lab, seed).model)
        chance = chance_overlap(names, colours, every, by_layer=True)
        if seed == lab.seed:
            lab.text("Heads of the two circuits", f"names: {_named(names)}\ncolours: {_named(colours)}")
        return {
            "overlap": overlap(names, colours).jaccard,
            "standard deviations above chance": chance.deviations,
            "standard deviations above chance, from all layers": chance_overlap(names, colours, every).deviations,
            "accuracy": min(accuracy(trained(lab, seed).model, _sentences(lab, seed, task, draw=20)) for task in TASKS),
        }

    def by_chance(seed: int) -> dict[str, float]:
        names, colours = (_circuit(lab, seed, task).heads for task in TASKS)
        chance = chance_overlap(names, colours, all_heads(trained(lab, seed).model), by_layer=True)
        return shared(seed) | {
            "overlap": chance.mean,
            "standard deviations above chance": 0.0,
            "standard deviations above chance, from all layers": 0.0,
        }

    circuits, random = "the two circuits", "random sets, layer by layer"
    verdict = lab.compare(
        arms={circuits: shared, random: by_chance},
        main=Beats(circuits, random, on="overlap", by=0.15),
        also=[
            AtLeast(circuits, ENOUGH, on="standard deviations above chance, from all layers"),
            AtLeast(circuits, ENOUGH, on="standard deviations above chance"),
            AtLeast(circuits, 0.99, on="accuracy"),
        ],
        seeds=3,
        note="Three stages of path patching; a head counts when its direct path changes the metric by more than 5% of "
        "what all heads' paths change it by. Random sets are all sets of as many heads, counted exactly. Late heads "
        "act on the logits and early ones on late ones in any task, so chance layer by layer is the fairer bar, and in "
        "so small a model a high one.",
    )
    lab.points("overlap", title="Overlap of the two tasks' heads")
    return verdict


def _readers(lab: Lab, seed: int, task: Task) -> list[Head]:
    """The heads of a task's circuit that look most, from the asking word, at where the answer's mark stands."""
    asked = _sentences(lab, seed, task)
    looks = _looks(trained(lab, seed).model, asked, asked.source)
    return sorted(_circuit(lab, seed, task).heads, key=lambda head: -looks[head])[:FOUR]


@torch.no_grad()
def _looks(model: DecoderModel, asked: Prompts, places: Tensor) -> dict[Head, float]:
    """Mean attention of each head from the asking word to a place in each prompt."""
    with interpret.record(model, "blocks.*.mixer.pattern") as seen:
        model(asked.tokens)
    rows = torch.arange(len(asked))
    return {
        (layer, head): float(seen[f"blocks.{layer}.mixer.pattern"][rows, head, -1, places].mean())
        for layer, head in all_heads(model)
    }


@paper.claim(
    "Heads of one task's circuit, told where to look, repair the other task where it fails",
    paper="Section 5: the patterns of four heads overridden as IOI has them raise Colored Objects from 49.6% to 93.7%",
    control="as many random heads told the same",
)
def overriding_attention_repairs(lab: Lab) -> Verdict:
    """On prompts with two repeated words, tell the other task's reading heads where the one that counts stood first."""

    def arm(told: Literal["nothing", "readers", "readers, other pair", "random"]) -> Callable[[int], dict[str, float]]:
        def repaired(seed: int) -> dict[str, float]:
            model, draws = trained(lab, seed).model, lab.generator(seed)
            accuracies: dict[Task, float] = {}
            for task, other in (TASKS, TASKS[::-1]):
                asked, readers = _sentences(lab, seed, task, adversarial=True), _readers(lab, seed, other)
                rest = [head for head in all_heads(model) if head not in readers]
                sets = [readers]
                if told == "random":
                    orders = [
                        torch.randperm(len(rest), generator=draws)[:FOUR] for _ in range(lab.pick(smoke=2, small=20))
                    ]
                    sets = [[rest[index] for index in order.tolist()] for order in orders]
                places = asked.other if told == "readers, other pair" else asked.source
                found = []
                for heads in [[]] if told == "nothing" else sets:
                    with attending(model, heads, rows_on(places[:, None], TIME)) if heads else nullcontext():
                        found.append(accuracy(model, asked))
                accuracies[task] = sum(found) / len(found)
            return {
                "accuracy, adversarial prompts": sum(accuracies.values()) / 2,
                **{f"accuracy, adversarial {task}": value for task, value in accuracies.items()},
            }

        return repaired

    on, right, random = "accuracy, adversarial prompts", "other task's heads told", "random heads told"
    verdict = lab.compare(
        arms={
            right: arm("readers"),
            random: arm("random"),
            "told of the other pair": arm("readers, other pair"),
            "as it is": arm("nothing"),
        },
        main=Beats(right, random, on=on, by=0.1),
        also=[
            *(Beats(right, "as it is", on=f"accuracy, adversarial {task}", by=0.2) for task in TASKS),
            Beats("told of the other pair", "as it is", on=on, lower=True),
        ],
        seeds=3,
        note="Adversarial: both pairs' second words come again, the later one counts; in training only one does. The "
        f"{FOUR} heads are those of the OTHER task's circuit that look most, when asked, at the place where the "
        "repeated word stood first, beside the answer.",
    )
    lab.points(on, name="repair", title="Accuracy on adversarial prompts")
    return verdict


@paper.claim(
    "Equal circuits overlap by 1 and disjoint ones by 0, the order of prompts does not matter, and rows sum to 1",
    paper="Section 4: overlap of circuits; Section 5: interventions on attention patterns",
    kind="exact",
)
def measures_are_exact(lab: Lab) -> Verdict:
    """Evaluate overlaps where they are known, search with shuffled prompts, override a pattern by itself."""
    model, asked = trained(lab, lab.seed).model, _sentences(lab, lab.seed, "names")
    heads = all_heads(model)
    same, apart = overlap(heads[:6], heads[:6]), overlap(heads[:6], heads[6:12])
    draws = torch.Generator().manual_seed(lab.seed)
    count = lab.pick(smoke=200, small=20_000)
    drawn = torch.tensor(
        [
            overlap(
                heads[:6], [heads[index] for index in torch.randperm(len(heads), generator=draws)[:8].tolist()]
            ).jaccard
            for _ in range(count)
        ],
        dtype=torch.float64,
    )
    exact = chance_overlap(heads[:6], heads[:8], heads)
    slack = 4 * exact.std / count**0.5
    shuffled = asked[torch.randperm(len(asked), generator=draws)]
    circuits = [
        staged_circuit(model, each.tokens, each.corrupted, each.metric, {"movers": "logits", "next": "qkv"}, top=0.2)
        for each in (asked, shuffled)
    ]
    with torch.no_grad(), interpret.record(model, "blocks.1.mixer.pattern") as seen:
        before = model(asked.tokens)
    rows = rows_on(asked.source[:, None], TIME)
    with (
        torch.no_grad(),
        attending(model, heads, rows),
        interpret.record(model, "blocks.1.mixer.pattern") as overridden,
    ):
        model(asked.tokens)
    sums = float((overridden["blocks.1.mixer.pattern"].sum(-1) - 1).abs().max())
    own = seen["blocks.1.mixer.pattern"][:, 0, -1]
    with torch.no_grad(), attending(model, [(1, 0)], own):
        unchanged = float((model(asked.tokens) - before).abs().max())
    try:
        with attending(model, [(1, 0)], 0.9 * rows):
            refused = False
    except ValueError:
        refused = True
    return lab.judge(
        checks={
            "equal sets 1, disjoint sets 0": (same.jaccard, apart.jaccard) == (1.0, 0.0),
            "chance is the mean of random sets, within four standard errors": abs(float(drawn.mean()) - exact.mean)
            < slack,
            "shuffled prompts give the same stages": circuits[0].stages == circuits[1].stages,
            # Float32 sums of ten weights.
            "overridden rows sum to 1, to 1e-5": sums < 1e-5,
            "a head given its own pattern changes no logit, to 1e-3": unchanged < 1e-3,
            "rows that sum to 0.9 are refused": refused,
        },
        measured={
            "chance, exact": exact.mean,
            "chance, drawn": float(drawn.mean()),
            "largest error of a row's sum": sums,
            "largest change of a logit": unchanged,
        },
    )
