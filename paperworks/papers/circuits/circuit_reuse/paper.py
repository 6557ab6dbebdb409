"""Circuit reuse: do two tasks use the same heads of one model, and can one circuit's heads be told what to do?

A synthetic version, trained here: one small transformer on two tasks, against one transformer for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paperworks import interpret
from paperworks.interpret.circuits.overlap import (
    Chance,
    StagedCircuit,
    attending,
    chance_overlap,
    overlap,
    rows_on,
    staged_circuit,
)
from paperworks.interpret.circuits.path_patching import Head, all_heads
from paperworks.lab import Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.papers.circuits.circuit_reuse.reuse_figures import draw_heads, draw_repair
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
)

STAGES = {"movers": "logits", "inhibition": "qkv", "first": "qkv"}
OVER = 0.05  # the share of a stage's effect that a head must have
ENOUGH = 3  # standard deviations above chance
FOUR = 4  # the paper overrides four heads


def _sentences(lab: Lab, task: Task, *, adversarial: bool = False, seed: int = 10) -> Prompts:
    draws = torch.Generator().manual_seed(lab.seed + seed)
    count = lab.pick(smoke=16, small=1000 if adversarial else 400)
    return prompts(task, count, draws, adversarial=adversarial)


_FOUND: dict[tuple[object, ...], StagedCircuit] = {}


def _circuit(lab: Lab, tasks: tuple[Task, ...], task: Task) -> StagedCircuit:
    """Find the heads of a task in the model that was trained on some tasks."""
    key = (lab.scale, lab.seed, tasks, task)
    if key not in _FOUND:
        model, asked = trained(lab, tasks).model, _sentences(lab, task)
        over = lab.pick(smoke=0.0, small=OVER)  # an untrained model has no strong heads
        with lab.progress(f"path patching, {task}") as advance:
            _FOUND[key] = staged_circuit(
                model,
                asked.tokens,
                asked.corrupted,
                asked.metric,
                STAGES,
                over=over,
                on_each=lambda: advance(1),
            )
    return _FOUND[key]


def _named(heads: Sequence[Head]) -> list[str]:
    return [f"{layer}.{head}" for layer, head in heads]


def _compared(
    first: StagedCircuit, second: StagedCircuit, heads: Sequence[Head]
) -> tuple[dict[str, float], Chance, Chance]:
    shared = overlap(first.heads, second.heads)
    plain = chance_overlap(first.heads, second.heads, heads)
    strict = chance_overlap(first.heads, second.heads, heads, by_layer=True)
    numbers = {
        "heads shared": shared.shared,
        "overlap |A and B| / |A or B|": shared.jaccard,
        "share of the colours' heads that names use too": shared.reused,
        "by chance": plain.mean,
        "standard deviations above chance": plain.deviations,
        "p": plain.p_value,
        "by chance, as many in each layer": strict.mean,
        "standard deviations above that": strict.deviations,
        "p of that": strict.p_value,
    }
    return numbers, plain, strict


@paper.claim(
    "Two tasks of one model share more of their heads than chance would have it",
    paper="Abstract: about 78% of the in-circuit heads of GPT-2 medium are shared by the two tasks",
    control="two models, one for each task; and random sets of as many heads, from all layers or layer by layer",
)
def heads_are_reused(lab: Lab) -> Verdict:
    """Find both circuits in the joint model, and one in each of two separate models; compare with random sets."""
    model = trained(lab).model
    heads = all_heads(model)
    joint = {task: _circuit(lab, TASKS, task) for task in TASKS}
    apart = {task: _circuit(lab, (task,), task) for task in TASKS}
    ours, plain, strict = _compared(joint["names"], joint["colours"], heads)
    theirs, separate, separate_strict = _compared(apart["names"], apart["colours"], heads)
    right = [accuracy(model, _sentences(lab, task, seed=20)) for task in TASKS]
    right_apart = [accuracy(trained(lab, (task,)).model, _sentences(lab, task, seed=20)) for task in TASKS]
    draw_heads(lab, joint, STAGES, OVER)
    return lab.judge(
        checks={
            "the overlap is 3 standard deviations above that of random sets": plain.deviations > ENOUGH,
            "and above that of sets with as many heads in each layer": strict.deviations > ENOUGH,
            "in separate models it is neither": max(separate.deviations, separate_strict.deviations) < ENOUGH,
            "the joint model is right in more than 99% of both": min(right) > 0.99,
        },
        measured={
            **ours,
            **{f"heads of {task}": _named(circuit.heads) for task, circuit in joint.items()},
            "heads": len(heads),
            "accuracy": right,
            "steps": trained(lab).steps,
            "seed": lab.seed,
        },
        control={
            **{f"separate models: {name}": value for name, value in theirs.items()},
            **{f"heads of {task}, its own model": _named(circuit.heads) for task, circuit in apart.items()},
            "accuracy of separate models": right_apart,
            "steps of separate models": [trained(lab, (task,)).steps for task in TASKS],
        },
        note="Three stages of path patching; a head counts when its direct path changes the metric by more than 5% of "
        "what all heads' paths change it by. Random sets are all sets of as many heads, counted exactly. Which number "
        "a head has in a model of its own is arbitrary, so separate models can share heads by layer only. Tasks and "
        "sizes were settled on models of another seed. Late heads act on the logits and early ones on late ones in any "
        "task, so chance layer by layer is the fairer bar, and in so small a model a high one.",
    )


def _readers(lab: Lab, task: Task, how_many: int = FOUR) -> list[Head]:
    """Return the heads of a task's circuit that look most, from the asking word, at where the answer's mark stands."""
    model, asked = trained(lab).model, _sentences(lab, task)
    looks = _looks(model, asked, asked.source)
    return sorted(_circuit(lab, TASKS, task).heads, key=lambda head: -looks[head])[:how_many]


@torch.no_grad()
def _looks(model: DecoderModel, asked: Prompts, places: Tensor) -> dict[Head, float]:
    """Return each head's mean attention from the asking word to a place in each prompt."""
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
    control="as many random heads told the same, and the same heads told to look at the other pair",
)
def overriding_attention_repairs(lab: Lab) -> Verdict:
    """On prompts with two repeated words, tell the other task's reading heads where the one that counts stood first."""
    model = trained(lab).model
    heads = all_heads(model)
    repaired: dict[Task, float] = {}
    before: dict[Task, float] = {}
    misled: dict[Task, float] = {}
    blind: dict[Task, list[float]] = {}
    single: dict[Task, float] = {}
    used: dict[Task, list[Head]] = {}
    draws = torch.Generator().manual_seed(lab.seed)
    for task in lab.track(TASKS, "overriding patterns"):
        (other,) = (each for each in TASKS if each != task)
        asked = _sentences(lab, task, adversarial=True)
        used[task] = _readers(lab, other)

        def told(some: Sequence[Head], places: Tensor, asked: Prompts = asked) -> float:
            with attending(model, some, rows_on(places[:, None], TIME)):
                return accuracy(model, asked)

        before[task] = accuracy(model, asked)
        repaired[task] = told(used[task], asked.source)
        misled[task] = told(used[task], asked.other)
        single[task] = max(told([head], asked.source) for head in heads)
        others = [head for head in heads if head not in used[task]]
        blind[task] = [
            told(
                [others[index] for index in torch.randperm(len(others), generator=draws)[:FOUR].tolist()], asked.source
            )
            for _ in range(lab.pick(smoke=2, small=20))
        ]
    gains = {task: repaired[task] - before[task] for task in TASKS}
    blind_gains = {task: sum(blind[task]) / len(blind[task]) - before[task] for task in TASKS}
    plain = [accuracy(model, _sentences(lab, task, seed=20)) for task in TASKS]
    draw_repair(lab, before, repaired, misled, blind)
    return lab.judge(
        checks={
            "accuracy on adversarial prompts rises by more than 20 points in both tasks": min(gains.values()) > 0.2,
            "random other heads raise it by less than half of that": all(
                blind_gains[task] < gains[task] / 2 for task in TASKS
            ),
            "told to look at the other pair they lower it": all(misled[task] < before[task] for task in TASKS),
            "plain prompts are right in more than 99%": min(plain) > 0.99,
        },
        measured={
            **{f"{task}: accuracy before and after": [before[task], repaired[task]] for task in TASKS},
            **{f"{task}: heads told where to look": _named(used[task]) for task in TASKS},
            **{f"{task}: best single head": single[task] for task in TASKS},
            "plain accuracy": plain,
            "seed": lab.seed,
        },
        control={
            **{f"{task}: random heads, mean and best": [_mean(blind[task]), max(blind[task])] for task in TASKS},
            **{f"{task}: told to look at the other pair": misled[task] for task in TASKS},
        },
        note="Adversarial: both pairs' second words come again, the later one counts; in training only one does. The "
        f"{FOUR} heads are those of the OTHER task's circuit that look most, when asked, at the place where the "
        "repeated word stood first, beside the answer.",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@paper.claim(
    "Equal circuits overlap by 1 and disjoint ones by 0, the order of prompts does not matter, and rows sum to 1",
    paper="Section 4: overlap of circuits; Section 5: interventions on attention patterns",
    kind="exact",
)
def measures_are_exact(lab: Lab) -> Verdict:
    """Evaluate overlaps where they are known, search with shuffled prompts, override a pattern by itself."""
    model, asked = trained(lab).model, _sentences(lab, "names")
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
