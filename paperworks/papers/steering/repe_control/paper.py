"""Representation engineering, control: add a direction, remove it, take it from an instruction, or train it in."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from paperworks import adapt, api, interpret
from paperworks.interpret import ControlVector
from paperworks.interpret.steering.lorra import Lorra, LorraBatch
from paperworks.interpret.steering.vectors import random_vector
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import DecoderModel
from paperworks.papers.probing import _emotions as emotions
from paperworks.papers.steering.repe_control import concepts
from paperworks.papers.steering.repe_control.contrast import add_at_end, contrast_vectors
from paperworks.papers.steering.repe_control.damage import Damage, SteeringDamage, damage
from paperworks.papers.steering.repe_control.low_rank_push import adapted_towards
from paperworks.testbeds.smollm2 import stand_in

paper = Paper(
    key="repe-control",
    title="Representation Engineering: A Top-Down Approach to AI Transparency (control)",
    authors="Zou, Phan, Chen, Campbell, Guo, Ren et al.",
    year=2023,
    ref="arXiv:2310.01405; GitHub andyzoujm/representation-engineering",
    family="steering",
    summary=(
        "A direction that is read from a model also steers it: added, amplified or projected out of the residual "
        "stream; taken from what an instruction changes in the very text (contrast vectors); or trained into low-rank "
        "adapters so that no hook is needed (LoRRA)."
    ),
    implements=(
        "paperworks.interpret.steering.vectors.ControlVector",
        "paperworks.papers.steering.repe_control.contrast.contrast_vectors",
        "paperworks.papers.steering.repe_control.contrast.add_at_end",
        "paperworks.interpret.steering.lorra.Lorra",
        "paperworks.papers.steering.repe_control.damage.damage",
    ),
)

STRENGTHS = (-8, -4, 0, 4, 8)
QUESTIONS = ("Tell me about your day.", "What did you see in the park?", "How was the dinner?")
MORE_QUESTIONS = (*QUESTIONS, "Describe your new neighbour.", "Tell me a short story.", "What is it like at work?")
BLIND = 8  # random directions in every comparison


def _effect(model: DecoderModel, concept: concepts.Concept, vector: ControlVector, strength: float) -> float:
    with vector.apply(model, strength):
        return concepts.preference(model, concept)


def _answers(lab: Lab, model: DecoderModel, questions: Sequence[str], length: int) -> list[str]:
    prompts = [api.chat_prompt(model, [{"role": "user", "content": question}]) for question in questions]
    return api.generate(model, prompts, max_new_tokens=lab.pick(smoke=2, small=length), temperature=0.0)


@paper.claim(
    "Directions read from emotional scenarios steer what SmolLM2 writes, both ways, for three concepts",
    paper="Section 6.1: adding or subtracting an emotion's reading vector makes a chat model write in that emotion",
    control="random directions of equal norm in the same layers",
)
def steers_three_concepts(lab: Lab) -> Verdict:
    """Measure the preference for a concept's words at five strengths, and show texts before, after and negative."""
    model = emotions.emotion_model(lab)
    seeds = lab.pick(smoke=2, small=BLIND)
    curves: dict[str, list[float]] = {}
    blind: dict[str, list[float]] = {}
    blind_curves: dict[str, list[list[float]]] = {}
    rows: list[list[object]] = []
    questions = lab.pick(smoke=QUESTIONS[:1], small=QUESTIONS)
    before = _answers(lab, model, questions, 32)
    for concept in lab.track(concepts.CONCEPTS, "concepts"):
        vector = concepts.concept_vector(lab, model, concept)
        curves[concept.name] = [_effect(model, concept, vector, strength) for strength in STRENGTHS]
        randoms = [random_vector(vector, lab.seed + seed) for seed in range(seeds)]
        blind_curves[concept.name] = [
            [_effect(model, concept, other, strength) for strength in (STRENGTHS[0], STRENGTHS[-1])]
            for other in randoms
        ]
        blind[concept.name] = [abs(high - low) for low, high in blind_curves[concept.name]]
        with vector.apply(model, STRENGTHS[-1]):
            after = _answers(lab, model, questions, 32)
        with vector.apply(model, STRENGTHS[0]):
            negative = _answers(lab, model, questions, 32)
        for question, *texts in zip(questions, before, after, negative, strict=True):
            rows.append([concept.name, question, *(text.strip() for text in texts)])
    lab.table(
        "What SmolLM2 answers, greedily (32 tokens)",
        ["concept", "question", "before", "after: +8", "negative: -8"],
        rows,
    )
    _draw_effects(lab, curves, blind_curves)
    moved = {name: values[-1] - values[0] for name, values in curves.items()}
    times = {name: moved[name] / (sum(blind[name]) / len(blind[name])) for name in moved}
    return lab.judge(
        checks={
            "the preference rises with every step of strength, for every concept": all(
                low < high for values in curves.values() for low, high in pairwise(values)
            ),
            "from -8 to 8 by more than 3 times what random directions do on average": min(times.values()) > 3,
            "and by more than any random direction does": all(moved[name] > max(blind[name]) for name in moved),
        },
        measured={
            "strengths": list(STRENGTHS),
            **{f"{name}, nats": [round(value, 3) for value in values] for name, values in curves.items()},
            **{f"{name}, times random": value for name, value in times.items()},
            "prompts": len(concepts.NEUTRAL),
            "seed": lab.seed,
        },
        control={
            **{
                f"{name}, |change| of random directions": [round(v, 3) for v in values]
                for name, values in blind.items()
            }
        },
        note="Preference: mean log-probability of the concept's words less that of the opposite words, after eight "
        "neutral beginnings. Strength 1 adds 1/200 of the stream's mean norm after each of blocks 8 to 20.",
    )


def _draw_effects(lab: Lab, curves: dict[str, list[float]], blind: dict[str, list[list[float]]]) -> None:
    with lab.figure("effects", figsize=(9.4, 3.6)) as figure:
        panels = figure.subplots(1, len(curves))
        for axes, color, (name, values) in zip(panels, COLORS, curves.items(), strict=False):
            start = values[len(values) // 2]
            for index, (low, high) in enumerate(blind[name]):
                axes.plot(
                    [STRENGTHS[0], 0, STRENGTHS[-1]],
                    [low, start, high],
                    color=CONTROL,
                    linewidth=0.9,
                    label=None if index else "random directions",
                )
            axes.plot(STRENGTHS, values, color=color, marker="o", label="the concept's direction")
            axes.set_xticks(STRENGTHS)
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("strength")
        panels[0].set_ylabel("preference for its words (nats)")
        panels[0].legend(loc="upper left", fontsize=8)


@paper.claim(
    "Steering has a usable range: beyond it the text is destroyed, and its perplexity says so",
    paper="Section 3.2: a coefficient sets the strength; repeng reports incoherent text where it is too large",
    control="random directions of the same length",
)
def too_much_destroys(lab: Lab) -> Verdict:
    """Measure, under the unsteered model, the perplexity of what is written at rising strengths."""
    model = emotions.emotion_model(lab)
    tokenizer: Any = model.tokenizer
    concept = concepts.CONCEPTS[0]
    vector = concepts.concept_vector(lab, model, concept)
    strengths = lab.pick(smoke=(8,), small=(4, 8, 16, 32, 64))
    questions = lab.pick(smoke=QUESTIONS[:1], small=MORE_QUESTIONS)
    prompts = [
        tokenizer.encode(api.chat_prompt(model, [{"role": "user", "content": question}])) for question in questions
    ]

    def written(context: AbstractContextManager[Any] | None) -> list[str]:
        if context is None:
            return _answers(lab, model, questions, 24)
        with context:
            return _answers(lab, model, questions, 24)

    plain = written(None)
    costs: dict[int, Damage] = {}
    warned: dict[int, str] = {}
    texts = [["0", plain[0].strip()]]
    for strength in lab.track(strengths, "the concept's direction"):
        steered = written(vector.apply(model, strength))
        texts.append([f"{strength}", steered[0].strip()])
        costs[strength], message = _cost(model, prompts, steered, plain)
        if message:
            warned[strength] = message
    random = random_vector(vector, lab.seed)
    blind = {
        strength: _cost(model, prompts, written(random.apply(model, strength)), plain)[0].ratio
        for strength in lab.track(strengths[-3:], "a random direction")
    }
    for strength, message in warned.items():
        lab.text(f"Warning at strength {strength}", message)
    lab.table(
        f"'{questions[0]}' under {concept.name}",
        ["strength", "text", "perplexity under the unsteered model, all questions"],
        [
            [*row, costs[int(row[0])].steered if int(row[0]) in costs else next(iter(costs.values())).unsteered]
            for row in texts
        ],
    )
    _draw_costs(lab, costs, blind)
    usable, most = strengths[min(1, len(strengths) - 1)], strengths[-1]
    return lab.judge(
        checks={
            "at the largest strength it is warned that the text is destroyed": most in warned,
            "at strength 8 it is not": usable not in warned,
            "perplexity rises from strength 8 on": all(
                costs[low].steered < costs[high].steered for low, high in pairwise(strengths[1:])
            ),
        },
        measured={
            "strengths": list(strengths),
            "perplexity": [cost.steered for cost in costs.values()],
            "perplexity, unsteered": next(iter(costs.values())).unsteered,
            "warned of": list(warned),
            "texts of 24 tokens at each": len(questions),
            "seed": lab.seed,
        },
        control={"strengths": list(blind), "times as surprising, random direction": list(blind.values())},
        note="The warning comes at 10 times the perplexity of unsteered text. A model that loops is not surprised, so "
        "a perplexity that stays low is no proof of sense.",
    )


def _cost(
    model: DecoderModel, prompts: list[list[int]], steered: list[str], plain: list[str]
) -> tuple[Damage, str | None]:
    """Return what the unsteered model thinks of both texts, and the warning if there is one."""
    tokenizer: Any = model.tokenizer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = damage(
            model, prompts, [tokenizer.encode(text) for text in steered], [tokenizer.encode(text) for text in plain]
        )
    said = [str(warning.message) for warning in caught if issubclass(warning.category, SteeringDamage)]
    return found, said[0] if said else None


def _draw_costs(lab: Lab, costs: dict[int, Damage], blind: dict[int, float]) -> None:
    base = next(iter(costs.values())).unsteered
    with lab.figure("perplexity", figsize=(7.4, 3.5)) as figure:
        axes = figure.subplots()
        axes.plot(
            list(blind), [ratio * base for ratio in blind.values()], color=CONTROL, marker="s", label="random direction"
        )
        axes.plot(
            list(costs), [cost.steered for cost in costs.values()], color=COLORS[0], marker="o", label="happiness"
        )
        axes.axhline(base, color=CONTROL, linewidth=1.0, linestyle=":", label="unsteered text")
        axes.axhline(10 * base, color=COLORS[1], linewidth=1.0, linestyle="--", label="warned of above this")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(costs), [str(strength) for strength in costs])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("strength")
        axes.set_ylabel("perplexity, unsteered model")
        axes.set_title("What steering costs")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


HAPPY = ("I won the first prize, so I feel", "My best friend came to visit and I am", "We laughed all evening; I was")
SAD = ("I lost my job, so I feel", "My best friend moved far away and I am", "We cried all evening; I was")


@paper.claim(
    "Projecting the direction out ends the reading and blunts what the text calls for, at a small cost",
    paper="Sections 3.1 and 3.2: termination by the projection operator",
    control="random directions projected out; and the cost of adding the direction at strength 8",
)
def projection_removes(lab: Lab) -> Verdict:
    """Remove the direction and measure what is read, the words after happy and sad texts, and the cost."""
    model = emotions.emotion_model(lab)
    concept = concepts.CONCEPTS[0]
    vector = concepts.concept_vector(lab, model, concept)
    last = list(vector.directions)[-1]
    base = concepts.next_words(model)

    def divergence() -> float:
        changed = concepts.next_words(model)
        return float((base.exp() * (base - changed)).sum(-1).mean())

    def gap() -> float:
        return concepts.preference(model, concept, HAPPY) - concepts.preference(model, concept, SAD)

    before = gap()
    with interpret.record(model, last) as seen:
        concepts.next_words(model, HAPPY)
    unit = vector.directions[last] / vector.directions[last].norm()
    lengths = seen[last].norm(dim=-1)
    longest = 2 * float(lengths.median())  # of words at most 1.3 times; the sink has 700 after block 8, then 24,000
    spared = lengths > longest
    reading = float((seen[last] @ unit)[~spared].abs().max())
    with vector.remove(model, longest=longest), interpret.record(model, last) as seen:
        concepts.next_words(model, HAPPY)
    left = float((seen[last] @ unit)[~spared].abs().max())
    with vector.remove(model, longest=longest):
        removed_cost, after = divergence(), gap()
    with vector.remove(model):
        everywhere_cost, everywhere = divergence(), gap()
    with vector.apply(model, 8):
        added_cost = divergence()
    blind_gaps, blind_costs = [], []
    for seed in lab.track(lab.pick(smoke=2, small=BLIND), "random directions"):
        with random_vector(vector, lab.seed + seed).remove(model, longest=longest):
            blind_gaps.append(gap())
            blind_costs.append(divergence())
    return lab.judge(
        checks={
            # Float32 rounding of states a few hundred long.
            "the reading is gone, to 1e-3": left < 1e-3,
            "the cost is less than half of strength 8's": removed_cost < added_cost / 2,
            "happy and sad texts differ less in the words that follow": after < before,
            "less than with any random direction removed": after < min(blind_gaps),
        },
        measured={
            "largest reading before": reading,
            "largest reading after": left,
            "KL to the model as it is, nats": removed_cost,
            "happy less sad texts, before": before,
            "happy less sad texts, removed": after,
            "removed from attention sinks too: KL": everywhere_cost,
            "removed from attention sinks too: happy less sad texts": everywhere,
            "seed": lab.seed,
        },
        control={
            "KL at strength 8": added_cost,
            "KL, random directions removed": [round(value, 5) for value in blind_costs],
            "happy less sad texts, random directions removed": [round(value, 3) for value in blind_gaps],
        },
        note="Three texts a side; the preference for happy words, in nats, as in the first claim. States longer than "
        "twice the median are left alone: the first token is an attention sink, and taking a share of it away "
        "changes everything that attends to it.",
    )


@paper.claim(
    "A contrast vector steers by what an instruction changes in the very text",
    paper="Section 3.2: contrast vectors, three forward passes, are the strongest operator",
    control="vectors of equal length in random directions at the same tokens",
)
def contrast_steers(lab: Lab) -> Verdict:
    """Take the difference of a happy and a sad instruction at the tokens of neutral beginnings, and add it there."""
    model = emotions.emotion_model(lab)
    tokenizer: Any = model.tokenizer
    concept = concepts.CONCEPTS[0]
    paths = [f"blocks.{layer}" for layer in lab.pick(smoke=(1,), small=(9, 11, 13))]
    happy, sad = (tokenizer.encode(f"You are a very {mood} person.\n") for mood in ("happy", "sad"))
    strengths = (-1.0, 0.0, 1.0)
    ours: dict[float, list[float]] = {strength: [] for strength in strengths}
    blind: dict[float, list[float]] = {strength: [] for strength in strengths}
    draws = torch.Generator().manual_seed(lab.seed)
    instructed = []
    for prompt in lab.track(lab.pick(smoke=concepts.NEUTRAL[:2], small=concepts.NEUTRAL), "beginnings"):
        ids = tokenizer.encode(prompt)
        vectors = contrast_vectors(model, [*happy, *ids], [*sad, *ids], len(ids), paths)
        for strength in strengths:
            with add_at_end(model, vectors, strength):
                ours[strength].append(concepts.preference(model, concept, [prompt]))
            noise = {path: torch.randn(value.shape, generator=draws).to(value) for path, value in vectors.items()}
            drawn = {
                path: value * (vectors[path].norm(dim=-1, keepdim=True) / value.norm(dim=-1, keepdim=True))
                for path, value in noise.items()
            }
            with add_at_end(model, drawn, strength):
                blind[strength].append(concepts.preference(model, concept, [prompt]))
        beginnings = [f"You are a very {mood} person.\n{prompt}" for mood in ("happy", "sad")]
        instructed.append(
            concepts.preference(model, concept, beginnings[:1]) - concepts.preference(model, concept, beginnings[1:])
        )
    means = {strength: sum(values) / len(values) for strength, values in ours.items()}
    moved = [high - low for low, high in zip(ours[-1.0], ours[1.0], strict=True)]
    blind_moved = [abs(high - low) for low, high in zip(blind[-1.0], blind[1.0], strict=True)]
    mean_moved, mean_blind = sum(moved) / len(moved), sum(blind_moved) / len(blind_moved)
    return lab.judge(
        checks={
            "adding it raises the preference, subtracting lowers it": means[-1.0] < means[0.0] < means[1.0],
            "by more than 3 times what random vectors do": mean_moved > 3 * mean_blind,
        },
        measured={
            "preference at -1, 0, 1": [means[strength] for strength in strengths],
            "change from -1 to 1": mean_moved,
            "beginnings where it rises": sum(value > 0 for value in moved),
            "beginnings": len(moved),
            "seed": lab.seed,
        },
        control={
            "change of random vectors": mean_blind,
            "change by the instruction itself": sum(instructed) / len(instructed),
        },
        note="Added after blocks 10, 12 and 14 at every token of the beginning; the instruction is not in the text.",
    )


LORRA_BETA = 40.0  # 20% of the stream's mean norm, in three layers instead of 4% in thirteen


@paper.claim(
    "LoRRA trains the shift into low-rank adapters: steering without hooks",
    paper="Section 3.2 and Algorithm 1: LoRRA, rank 8 on queries and values, reaches what vectors reach",
    control="the same adapters trained towards random directions of equal norm",
)
def lorra_keeps_the_shift(lab: Lab) -> Verdict:
    """Train adapters towards R + beta r at three layers, and compare with adding beta r by hooks."""
    model = emotions.emotion_model(lab)
    concept = concepts.CONCEPTS[0]
    whole = concepts.concept_vector(lab, model, concept)
    layers = lab.pick(smoke=(3,), small=(9, 11, 13))
    reading = ControlVector({path: whole.directions[path] for path in (f"blocks.{layer}" for layer in layers)})
    before = concepts.preference(model, concept)
    # The target of each layer is its own state plus beta r, so what is reproduced is the push at the last layer.
    last = ControlVector({path: reading.directions[path] for path in list(reading.directions)[-1:]})
    with last.apply(model, LORRA_BETA):
        hooked = concepts.preference(model, concept) - before
    losses = adapted_towards(lab, model, reading, LORRA_BETA, "LoRRA")
    shift = concepts.preference(model, concept) - before
    merged = copy.deepcopy(model)
    adapt.merge(merged)
    merged_shift = concepts.preference(merged, concept) - before
    adapt.remove(model)
    restored = concepts.preference(model, concept)
    blind_losses = adapted_towards(lab, model, random_vector(reading, lab.seed), LORRA_BETA, "LoRRA, random directions")
    blind = concepts.preference(model, concept) - before
    adapt.remove(model)
    return lab.judge(
        checks={
            "more than half of the shift by hooks": shift > hooked / 2,
            "more than 3 times what random targets do": shift > 3 * abs(blind),
            # Two float32 routes through thirty blocks.
            "merged into the weights it is the same": abs(merged_shift - shift) < 1e-2,
            "without the adapters the model is as before": abs(restored - before) < 1e-4,
        },
        measured={
            "shift, nats": shift,
            "shift of the merged model": merged_shift,
            "loss, first and last": [losses[0], losses[-1]],
            "steps": len(losses),
            "seed": lab.seed,
        },
        control={
            "shift by hooks": hooked,
            "shift with random targets": blind,
            "loss with random targets, first and last": [blind_losses[0], blind_losses[-1]],
        },
        note="Rank 8 on queries and values of blocks 1 to 14, four statements of one length a step; targets after "
        "blocks 10, 12 and 14; the shift is in the preference for happy words after neutral beginnings.",
    )


@paper.claim(
    "The operators are what their equations say; LoRRA without a push has no loss, and merges",
    paper="Section 3.2: linear combination, piecewise and projection operators",
    kind="exact",
)
def operators_are_exact(lab: Lab) -> Verdict:
    """Evaluate projection, piecewise amplification and their identities in float64, and LoRRA at its start."""
    draws = torch.Generator().manual_seed(lab.seed)
    x = 50 * torch.randn(4, 9, 64, generator=draws, dtype=torch.float64)
    v = torch.randn(64, generator=draws, dtype=torch.float64)
    model = nn.Sequential(nn.Identity())
    raw, unit = ControlVector({"0": v}), ControlVector({"0": v / v.norm()})
    with raw.remove(model):
        removed = model(x)
        twice = model(removed)
    with unit.amplify(model, 3.0):
        amplified = model(x)
    with unit.apply(model, 0.0):
        same = model(x)
    reads, louder = x @ unit.directions["0"], amplified @ unit.directions["0"]
    small = stand_in(3, lab.seed)
    tokens = torch.randint(100, 1000, (2, 6), generator=draws)
    adapt.apply(small, adapt.LoRA(rank=8, alpha=16), targets="blocks.*.mixer.{query,value}")
    batch = LorraBatch(tokens, tokens, tokens, torch.ones(2, 5, dtype=torch.bool))
    start = float(Lorra(["blocks.1"], 0.0, disabled=adapt.disabled)(small, batch).detach())
    return lab.judge(
        checks={
            # Sums of 64 float64 numbers of some hundred.
            "after projection x . v = 0, to 1e-11": float((removed @ v).abs().max()) < 1e-11,
            "projecting twice is projecting once": float((twice - removed).abs().max()) < 1e-11,
            "the piecewise operator keeps every sign": torch.equal(louder.sign(), reads.sign()),
            "and adds its strength to |x . v|": float((louder.abs() - reads.abs() - 3).abs().max()) < 1e-11,
            "strength 0 changes no bit": torch.equal(same, x),
            "a fresh adapter with alpha = beta = 0 has loss 0": start == 0,
        },
        measured={
            "largest x . v after projection": (removed @ v).abs().max(),
            "change by a second projection": (twice - removed).abs().max(),
            "loss of LoRRA at its start": start,
        },
    )
