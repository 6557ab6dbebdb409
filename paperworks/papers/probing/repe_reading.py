"""Representation engineering, reading: where SmolLM2 keeps happiness, and which way of finding the direction works."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import interpret
from paperworks.interpret.probing.probes import Probe, leading_component, random_probe
from paperworks.interpret.probing.representation_reading import concept_prompt, lat, mean_reading
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.papers.probing import _emotions as emotions
from paperworks.testbeds import statements

paper = Paper(
    key="repe-reading",
    title="Representation Engineering: A Top-Down Approach to AI Transparency (reading)",
    authors="Zou, Phan, Chen, Campbell, Guo, Ren et al.",
    year=2023,
    ref="arXiv:2310.01405; GitHub andyzoujm/representation-engineering",
    family="probing",
    summary=(
        "Put stimuli into a template that asks for a concept, take the states at its end, and find the direction in "
        "which pairs of them differ: a reading vector, whose projection says how much of the concept a text holds."
    ),
    implements=(
        "paperworks.interpret.probing.representation_reading.lat",
        "paperworks.interpret.probing.representation_reading.mean_reading",
        "paperworks.interpret.probing.representation_reading.two_means_reading",
        "paperworks.interpret.probing.representation_reading.scan",
    ),
    equation=r"v = \text{first principal component of } \{\pm (h(x_i^+) - h(x_i^-))\}, \qquad "
    r"\text{score}(x) = v \cdot (h(x) - \bar h)",
    usage="""
import paperworks as pw
from paperworks import interpret
from paperworks.interpret.probing.representation_reading import concept_prompt, mean_reading, scan

model = pw.load("smollm2")
happy, sad = ["I won a prize.", "We laughed all day.", "She hugged me."], ["I lost my job.", "He cried.", "It hurts."]
prompts = [model.tokenizer.encode(concept_prompt("happiness", text)) for text in (*happy, *sad)]
states = interpret.last_token_activations(model, prompts, ["blocks.23"])["blocks.23"]
reading = mean_reading(states[:3], states[3:])
ids = model.tokenizer.encode("My friend came back. Then the house burned down.")
for token, score in zip(ids, scan(model, ids, {"blocks.23": reading})["blocks.23"].tolist()):
    print(f"{model.tokenizer.decode([token])!r}: {score:+.2f}")
""",
    notes="The scenarios are the authors'; the model is far smaller than theirs.",
)

TRAINING, HELD_OUT = 32, 24  # scenarios of each side
BLOCK = 23  # counted from 0 of 30; chosen on seed 0 in an earlier design
Pairs = tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]  # states of the positives and of the negatives
RIGHT = "held-out pairs ranked right"


def _block(lab: Lab) -> int:
    return lab.pick(smoke=3, small=BLOCK)


_READ: dict[tuple[str, int], tuple[Pairs, Pairs]] = {}  # by scale and seed: the claims read the same scenarios


def _unrelated(lab: Lab, seed: int) -> tuple[Pairs, Pairs]:
    """Happy and sad scenarios in the template for concepts: to find the direction with, and held-out ones."""
    if (lab.scale, seed) not in _READ:
        known, held = lab.pick(smoke=(6, 4), small=(TRAINING, HELD_OUT))
        texts = [
            concept_prompt("happiness", text)
            for emotion in ("happiness", "sadness")
            for text in emotions.scenarios(emotion, known + held, seed)
        ]
        happy, sad = _states(lab, texts).chunk(2)
        _READ[lab.scale, seed] = (happy[:known], sad[:known]), (happy[known:], sad[known:])
    return _READ[lab.scale, seed]


def _matched(lab: Lab, seed: int) -> Pairs:
    """One scenario under opposite instructions: the same text on both sides of a pair, neither happy nor sad."""
    texts = emotions.scenarios("surprise", lab.pick(smoke=6, small=TRAINING), seed)
    people = [f"USER: Pretend you are a {mood} person. {text}\nASSISTANT: I feel" for mood in MOODS for text in texts]
    happy, sad = _states(lab, people).chunk(2)
    return happy, sad


MOODS = ("happy", "sad")


def _states(lab: Lab, texts: list[str]) -> Float[Tensor, "texts dim"]:
    return statements.last_states(lab, emotions.emotion_model(lab), texts, [_block(lab)], "scenarios")[0]


def _ranked(probe: Probe, held_out: Pairs) -> float:
    """Share of all pairs of a positive and a negative of which the positive scores higher."""
    positive, negative = (probe.score(side) for side in held_out)
    return float((positive[:, None] > negative).double().mean())


def _arm(lab: Lab, find: Callable[[int, Pairs], Probe]) -> Callable[[int], dict[str, float]]:
    def measured(seed: int) -> dict[str, float]:
        known, held_out = _unrelated(lab, seed)
        return {RIGHT: _ranked(find(seed, known), held_out)}

    return measured


def _shuffled(seed: int, known: Pairs) -> Probe:
    """Difference of means after the members of about half of the pairs have changed sides."""
    positive, negative = known
    turned = torch.rand(len(positive), 1, generator=torch.Generator().manual_seed(seed)) < 0.5
    return mean_reading(torch.where(turned, negative, positive), torch.where(turned, positive, negative))


@paper.claim(
    "The difference of means reads happiness against sadness from a late block of SmolLM2",
    paper="Section 6.1: reading vectors of six emotions separate held-out scenarios",
    control="labels shuffled within the training pairs",
    reach="real",
)
def means_read_emotions(lab: Lab) -> Verdict:
    """Find the direction with some scenarios, and rank held-out ones by their projection."""
    ours, shuffled = "difference of means", "labels shuffled"
    verdict = lab.compare(
        arms={
            ours: _arm(lab, lambda seed, known: mean_reading(*known)),
            shuffled: _arm(lab, _shuffled),
            "random direction": _arm(lab, lambda seed, known: random_probe(known[0].shape[1], seed)),
        },
        main=Beats(ours, shuffled, on=RIGHT, by=0.2),
        also=[AtLeast(ours, 0.85, on=RIGHT), Beats(ours, "random direction", on=RIGHT, by=0.1)],
        seeds=3,
        note=f"{TRAINING} scenarios of each emotion to find the direction, {HELD_OUT} of each to rank, after block "
        f"{BLOCK + 1}; the seed draws them.",
    )
    lab.points(RIGHT, name="means", title="Held-out pairs ranked right")
    return verdict


@paper.claim(
    "LAT's principal component reads the emotion without labels, from matched pairs",
    paper="Section 3.1: PCA of the differences between paired stimuli; Section 6.1 with unrelated scenarios",
    control="a random direction; and LAT on unrelated scenarios",
    reach="real",
)
def component_reads_emotions(lab: Lab) -> Verdict:
    """Take the component of pairs of one text under opposite instructions, and of unrelated pairs; rank scenarios."""
    matched, unrelated, random = "LAT, matched pairs", "LAT, unrelated pairs", "random direction"
    verdict = lab.compare(
        arms={
            matched: _arm(lab, lambda seed, known: lat(*_matched(lab, seed), seed=seed)),
            unrelated: _arm(lab, lambda seed, known: lat(*known, seed=seed)),
            "difference of means": _arm(lab, lambda seed, known: mean_reading(*known)),
            random: _arm(lab, lambda seed, known: random_probe(known[0].shape[1], seed)),
        },
        main=Beats(matched, random, on=RIGHT, by=0.2),
        also=[AtLeast(matched, 0.85, on=RIGHT), Beats(matched, unrelated, on=RIGHT)],
        seeds=3,
        note="What varies most between two unrelated scenarios is what they are about, not how happy they are. A "
        "matched pair is one scenario read under two instructions, 'Pretend you are a happy (sad) person'; its "
        "difference has little else in it. Both are scored on the same held-out scenarios.",
    )
    lab.points(RIGHT, name="components", title="Held-out pairs ranked right")
    return verdict


@paper.claim(
    "A reading vector follows a text token by token",
    paper="Section 4: projections at every token, as a detector of lies",
    control="a random direction on the same tokens",
    reach="real",
)
def follows_a_text(lab: Lab) -> Verdict:
    """Read texts of a happy and a sad sentence, in either order, and compare the tokens of the two."""
    model = emotions.emotion_model(lab)
    tokenizer, path = model.tokenizer, f"blocks.{_block(lab)}"

    @cache
    def texts(seed: int) -> list[tuple[Tensor, int, bool]]:
        """States of a text's tokens, where its second sentence begins, and whether the first is the happy one."""
        known, held = lab.pick(smoke=(6, 4), small=(TRAINING, HELD_OUT))
        happy, sad = (emotions.scenarios(name, known + held, seed)[known:] for name in ("happiness", "sadness"))
        found = []
        for index, pair in enumerate(zip(happy, sad, strict=True)):
            first, second = pair if index % 2 == 0 else pair[::-1]
            ids = torch.tensor([tokenizer.encode(f"{first} {second}")], device=model.device)
            with interpret.record(model, path) as seen, torch.no_grad():
                model.hidden(ids)
            found.append((seen[path][0].cpu(), len(tokenizer.encode(first)), index % 2 == 0))
        return found

    def arm(find: Callable[[int, Pairs], Probe]) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            probe, right = find(seed, _unrelated(lab, seed)[0]), []
            for states, cut, happy_first in texts(seed):
                trace = probe.score(states)
                # The first token is an attention sink whose state says nothing of the text.
                right.append(bool(trace[1:cut].mean() > trace[cut:].mean()) == happy_first)
            return {"texts whose happy sentence scores higher": sum(right) / len(right)}

        return measured

    ours, random, on = "difference of means", "random direction", "texts whose happy sentence scores higher"
    verdict = lab.compare(
        arms={
            ours: arm(lambda seed, known: mean_reading(*known)),
            random: arm(lambda seed, known: random_probe(known[0].shape[1], seed)),
        },
        main=Beats(ours, random, on=on, by=0.2),
        also=[AtLeast(ours, 0.85, on=on)],
        seeds=3,
        note="The vector was found at the last token of the template; here it reads every token of plain sentences, "
        f"the first left out; {HELD_OUT} texts a seed, half of which begin sad.",
    )
    lab.points(on, name="scan", title="Texts read the right way round")
    return verdict


@paper.claim(
    "Pairs all in one order lose their mean difference when centred; random order or no centring keeps it",
    paper="Section 3.1 and the authors' code: differences in random order, centred, then PCA",
    kind="exact",
)
def order_and_centring(lab: Lab) -> Verdict:
    """Build pairs with a known difference and check the algebra in float64."""
    draws = torch.Generator().manual_seed(lab.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    base, noise, shift, tests = normal(80, 24), 0.3 * normal(80, 24), normal(24), normal(9, 24)
    shift = 5 * shift / shift.norm()
    positive, negative = base + shift + noise, base
    wanted = shift / shift.norm()
    ordered = lat(positive, negative, order="as given", center=False)
    centred = lat(positive, negative, order="as given", center=True)
    random = [lat(positive, negative, seed=seed) for seed in range(5)]
    uncentred = [lat(positive, negative, seed=seed, center=False) for seed in range(5)]
    differences = positive - negative
    top = leading_component(differences, center=False)
    same = max(1 - float(probe.direction @ ordered.direction) for probe in uncentred)
    constant = 10 * normal(24)
    moved = max(
        (fit(positive + constant, negative + constant).score(tests + constant) - fit(positive, negative).score(tests))
        .abs()
        .max()
        .item()
        for fit in (lat, mean_reading)
    )
    flipped = (lat(negative, positive).direction + lat(positive, negative).direction).abs().max().item()
    return lab.judge(
        checks={
            "in one order, not centred: the mean difference, cosine above 0.99": float(ordered.direction @ wanted)
            > 0.99,
            "in one order, centred: it is lost, cosine below 0.7": abs(float(centred.direction @ wanted)) < 0.7,
            "in random order centring does no harm, cosine above 0.95": min(
                float(probe.direction @ wanted) for probe in random
            )
            > 0.95,
            # Differences of float64 numbers near 10 and a singular vector.
            "without centring no order matters, to 1e-10": same < 1e-10,
            "the sign alone is chosen: |cosine| with the singular vector is 1": abs(
                abs(float(ordered.direction @ top)) - 1
            )
            < 1e-12,
            "a constant added to all activations changes no score, to 1e-9": moved < 1e-9,
            "swapping the sides flips the vector": flipped < 1e-9,
        },
        measured={
            "cosine, one order, not centred": float(ordered.direction @ wanted),
            "cosine, one order, centred": abs(float(centred.direction @ wanted)),
            "cosine, random order, least of 5": min(float(probe.direction @ wanted) for probe in random),
            "change of scores under a constant": moved,
        },
    )
