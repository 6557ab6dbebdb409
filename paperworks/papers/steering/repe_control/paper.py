"""Representation engineering, control: add a direction, remove it, take it from an instruction, or train it in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from paperworks import adapt, interpret
from paperworks.interpret import ControlVector
from paperworks.interpret.steering.lorra import Lorra, LorraBatch
from paperworks.interpret.steering.vectors import random_vector
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.papers.probing import _emotions as emotions
from paperworks.papers.steering.repe_control import concepts
from paperworks.papers.steering.repe_control.contrast import add_at_end, contrast_vectors
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
    equation=r"R' = R \pm \alpha v, \qquad R' = R + \alpha \operatorname{sign}(R \cdot v)\, v, \qquad "
    r"R' = R - \frac{R \cdot v}{\lVert v \rVert^2} v",
    usage="""
import torch
from torch import nn
from paperworks.interpret import ControlVector

model = nn.Sequential(nn.Identity())               # any module; here the stream itself
x, v = torch.randn(2, 5, 64), torch.randn(64)
unit = ControlVector({"0": v / v.norm()})
with unit.apply(model, 3.0):
    print("added:", float(((model(x) - x) @ unit.directions["0"]).mean()))
with unit.amplify(model, 3.0):
    print("amplified:", float(((model(x) @ unit.directions["0"]).abs() - (x @ unit.directions["0"]).abs()).mean()))
with unit.remove(model):
    print("projected out:", float((model(x) @ unit.directions["0"]).abs().max()))
""",
    notes="Steered text is not judged as text: what is measured is which words come next. `damage` says when steering "
    "destroys the text. TruthfulQA and MACHIAVELLI are not repeated.",
)

STRENGTHS = (-8, -4, 0, 4, 8)
BLIND = 4  # random directions in every comparison


def _own(lab: Lab, seed: int) -> Lab:
    """The lab of a seed: it draws the scenarios and statements."""
    return Lab(lab.scale, seed, lab.device)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@paper.claim(
    "Directions read from emotional scenarios steer which words SmolLM2 writes, both ways, for three concepts",
    paper="Section 6.1: adding or subtracting an emotion's reading vector makes a chat model write in that emotion",
    control="random directions of equal norm in the same layers",
    reach="real",
)
def steers_three_concepts(lab: Lab) -> Verdict:
    """Measure the preference for a concept's words at five strengths."""
    model = emotions.emotion_model(lab)

    def curve(concept: concepts.Concept, vector: ControlVector) -> list[float]:
        found = []
        for strength in STRENGTHS:
            with vector.apply(model, strength):
                found.append(concepts.preference(model, concept))
        return found

    def arm(random: bool) -> Callable[[int], dict[str, Any]]:
        def measured(seed: int) -> dict[str, Any]:
            curves: list[list[float]] = []
            for index, concept in enumerate(concepts.CONCEPTS):
                vector = concepts.concept_vector(_own(lab, seed), model, concept)
                curves.append(curve(concept, random_vector(vector, 10 * seed + index) if random else vector))
            moved = [values[-1] - values[0] for values in curves]
            return {
                "change from -8 to 8, nats": _mean([abs(value) if random else value for value in moved]),
                "least change of a concept, nats": min(moved),
                "least step of strength, nats": min(high - low for each in curves for low, high in pairwise(each)),
                "strength": [float(strength) for strength in STRENGTHS],
                "preference for the concept's words": [_mean(list(values)) for values in zip(*curves, strict=True)],
            }

        return measured

    ours, blind = "concept's direction", "random direction"
    verdict = lab.compare(
        arms={ours: arm(False), blind: arm(True)},
        main=Beats(ours, blind, on="change from -8 to 8, nats", by_ratio=2.0),  # three times as much
        also=[
            AtLeast(ours, 0.0, on="least step of strength, nats"),
            Beats(ours, blind, on="least change of a concept, nats"),
        ],
        seeds=3,
        note="Preference: mean log-probability of the concept's words less that of the opposite words, after eight "
        "neutral beginnings; three contrasts of emotions. Strength 1 adds 1/200 of the stream's mean norm after each "
        "of blocks 8 to 20. The seed draws the scenarios and the random directions, whose change counts either way.",
    )
    lab.curves("preference for the concept's words", x="strength", name="effects")
    return verdict


HAPPY = ("I won the first prize, so I feel", "My best friend came to visit and I am", "We laughed all evening; I was")
SAD = ("I lost my job, so I feel", "My best friend moved far away and I am", "We cried all evening; I was")


@paper.claim(
    "Projecting the direction out blunts what the text calls for, at a small cost",
    paper="Sections 3.1 and 3.2: termination by the projection operator",
    control="random directions projected out; and the cost of adding the direction at strength 8",
    reach="real",
)
def projection_removes(lab: Lab) -> Verdict:
    """Remove the direction, and measure which words follow happy and sad texts, and the cost on neutral ones."""
    model, concept = emotions.emotion_model(lab), concepts.CONCEPTS[0]
    base = concepts.next_words(model)
    last = f"blocks.{lab.pick(smoke=3, small=concepts.LAYERS[-1])}"
    with interpret.record(model, last) as seen:
        concepts.next_words(model, HAPPY)
    longest = 2 * float(seen[last].norm(dim=-1).median())  # of words at most 1.3 times; the sink is far longer

    def effects() -> dict[str, float]:
        changed = concepts.next_words(model)
        return {
            "happy less sad texts, nats": concepts.preference(model, concept, HAPPY)
            - concepts.preference(model, concept, SAD),
            "KL to the model as it is, nats": float((base.exp() * (base - changed)).sum(-1).mean()),
        }

    def removed(seed: int) -> dict[str, float]:
        with concepts.concept_vector(_own(lab, seed), model, concept).remove(model, longest=longest):
            return effects()

    def random(seed: int) -> dict[str, float]:
        vector, found = concepts.concept_vector(_own(lab, seed), model, concept), []
        for draw in range(BLIND):
            with random_vector(vector, 100 * seed + draw).remove(model, longest=longest):
                found.append(effects())
        return {name: _mean([each[name] for each in found]) for name in found[0]}

    def added(seed: int) -> dict[str, float]:
        with concepts.concept_vector(_own(lab, seed), model, concept).apply(model, 8):
            return effects()

    gap, cost = "happy less sad texts, nats", "KL to the model as it is, nats"
    return lab.compare(
        arms={"removed": removed, "random directions removed": random, "added at strength 8": added},
        main=Beats("removed", "random directions removed", on=gap, by_ratio=0.15, lower=True),
        also=[Beats("removed", "added at strength 8", on=cost, by_ratio=0.5, lower=True)],
        seeds=3,
        note=f"Three texts a side; {BLIND} random directions a seed. States longer than twice the median are left "
        "alone: the first token is an attention sink, and taking a share of it away changes all that attends to it.",
    )


@paper.claim(
    "A contrast vector steers by what an instruction changes in the very text",
    paper="Section 3.2: contrast vectors, three forward passes, are the strongest operator",
    control="vectors of equal length in random directions at the same tokens",
    reach="real",
)
def contrast_steers(lab: Lab) -> Verdict:
    """Take the difference of a happy and a sad instruction at the tokens of neutral beginnings, and add it there."""
    model, concept = emotions.emotion_model(lab), concepts.CONCEPTS[0]
    tokenizer: Any = model.tokenizer
    paths = [f"blocks.{layer}" for layer in lab.pick(smoke=(1,), small=(9, 11, 13))]
    happy, sad = (tokenizer.encode(f"You are a very {mood} person.\n") for mood in ("happy", "sad"))

    def arm(random: bool) -> Callable[[int], dict[str, float]]:
        def moved(seed: int) -> dict[str, float]:
            draws, changes = lab.generator(seed), []
            chosen = torch.randperm(len(concepts.NEUTRAL), generator=draws)[: lab.pick(smoke=2, small=5)].tolist()
            for prompt in (concepts.NEUTRAL[index] for index in chosen):
                ids = tokenizer.encode(prompt)
                vectors = contrast_vectors(model, [*happy, *ids], [*sad, *ids], len(ids), paths)
                if random:
                    for path, value in vectors.items():
                        noise = nn.functional.normalize(torch.randn(value.shape, generator=draws), dim=-1).to(value)
                        vectors[path] = noise * value.norm(dim=-1, keepdim=True)
                found = []
                for strength in (-1.0, 1.0):
                    with add_at_end(model, vectors, strength):
                        found.append(concepts.preference(model, concept, [prompt]))
                changes.append(abs(found[1] - found[0]) if random else found[1] - found[0])
            return {"change from -1 to 1, nats": _mean(changes)}

        return moved

    ours, blind = "contrast vectors", "random vectors"
    return lab.compare(
        arms={ours: arm(False), blind: arm(True)},
        main=Beats(ours, blind, on="change from -1 to 1, nats", by_ratio=2.0),  # three times as much
        seeds=3,
        note="Added after blocks 10, 12 and 14 at every token of the beginning; the instruction is not in the text. "
        "Preference for happy words; the change by random vectors counts either way.",
    )


LORRA_BETA = 40.0  # 20% of the stream's mean norm, in three layers instead of 4% in thirteen


@paper.claim(
    "LoRRA trains the shift into low-rank adapters: steering without hooks",
    paper="Section 3.2 and Algorithm 1: LoRRA, rank 8 on queries and values, reaches what vectors reach",
    control="the same adapters trained towards random directions of equal norm",
    reach="real",
)
def lorra_keeps_the_shift(lab: Lab) -> Verdict:
    """Train adapters towards R + beta r at three layers, and compare with adding beta r by hooks."""
    model, concept = emotions.emotion_model(lab), concepts.CONCEPTS[0]
    paths = [f"blocks.{layer}" for layer in lab.pick(smoke=(3,), small=(9, 11, 13))]
    before = concepts.preference(model, concept)

    @cache
    def reading(seed: int) -> ControlVector:
        whole = concepts.concept_vector(_own(lab, seed), model, concept)
        return ControlVector({path: whole.directions[path] for path in paths})

    def hooked(seed: int) -> dict[str, float]:
        # The target of each layer is its own state plus beta r, so what is reproduced is the push at the last layer.
        with ControlVector({paths[-1]: reading(seed).directions[paths[-1]]}).apply(model, LORRA_BETA):
            return {"shift, nats": concepts.preference(model, concept) - before, "left after removal, nats": 0.0}

    def trained(seed: int, target: ControlVector) -> dict[str, float]:
        adapted_towards(_own(lab, seed), model, target, LORRA_BETA, "LoRRA")
        shift = concepts.preference(model, concept) - before
        adapt.remove(model)
        return {
            "shift, nats": shift,
            "left after removal, nats": abs(concepts.preference(model, concept) - before),
        }

    ours, blind, hooks = "LoRRA", "LoRRA, random targets", "hooks"
    return lab.compare(
        arms={
            ours: lambda seed: trained(seed, reading(seed)),
            blind: lambda seed: trained(seed, random_vector(reading(seed), seed)),
            hooks: hooked,
        },
        main=Beats(ours, blind, on="shift, nats", by=0.2),
        also=[
            Within(ours, hooks, on="shift, nats", by_ratio=0.5, lower=False),
            AtMost(ours, 1e-4, on="left after removal, nats"),
        ],
        seeds=2,
        note="Rank 8 on queries and values of blocks 1 to 14, 100 steps of four statements of one length; targets "
        "after blocks 10, 12 and 14; the shift is in the preference for happy words after neutral beginnings.",
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
