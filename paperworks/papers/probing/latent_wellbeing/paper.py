"""Latent wellbeing: how few directions of a model's states tell which of two scenarios is the more pleasant."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from paperworks.interpret.probing.probes import Probe, random_probe
from paperworks.interpret.probing.representation_reading import ranked
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict, Within
from paperworks.papers.probing.latent_wellbeing import everyday_events
from paperworks.papers.probing.latent_wellbeing.ranking import fit_ranking, principal_components
from paperworks.testbeds import statements
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="latent-wellbeing",
    title="Uncovering Latent Human Wellbeing in Language Model Embeddings",
    authors="Freire, Tan, Radhakrishnan, Hannan, Krasheninnikov et al.",
    year=2024,
    ref="arXiv:2402.11777",
    family="probing",
    summary=(
        "A few principal components of sentence embeddings, found without labels and weighed by a logistic regression "
        "without intercept, rank scenarios by how pleasant they are."
    ),
    implements=(
        "paperworks.papers.probing.latent_wellbeing.ranking.fit_ranking",
        "paperworks.papers.probing.latent_wellbeing.ranking.principal_components",
    ),
    equation=r"P(a \succ b) = \sigma\!\left(w \cdot C\,(\phi(a) - \phi(b))\right), \qquad "
    r"C = \text{first } k \text{ principal components of } \phi",
    usage="""
import torch
from paperworks.interpret.probing.representation_reading import ranked
from paperworks.papers.probing.latent_wellbeing.ranking import fit_ranking

pleasant = torch.randn(400, 1)                                  # stands in for what sentences are about
better, worse = (torch.randn(400, 64) + shift * torch.eye(64)[0] + 3 * pleasant for shift in (2.0, -2.0))
for components in (1, 2, 10, None):
    ranking = fit_ranking(better[:300], worse[:300], components)
    print(components, float(ranked(ranking, better[300:], worse[300:]).double().mean()))
""",
    notes="States of SmolLM2 at the last token of a template stand in for a sentence encoder's embeddings, and sixty "
    "events that were ranked by hand for the ETHICS data.",
)

TEMPLATE = '"{}" How pleasant is this? It is very'
BLOCK = 19  # counted from 0 of 30
KNOWN = 7  # of the ten events of each level
RIGHT = "held-out pairs ranked right"
Pairs = tuple[Tensor, Tensor]

_STATES: dict[str, dict[str, Tensor]] = {}  # by scale: all claims and seeds read the same scenarios


def _states(lab: Lab) -> dict[str, Tensor]:
    """State at the last token of every scenario there is, each dimension scaled by its spread."""
    if lab.scale not in _STATES:
        model = smollm2(lab, smoke_depth=2)
        events = [event for level in everyday_events.LEVELS for event in level]
        texts = [f"{subject} {event}." for subject in everyday_events.SUBJECTS for event in events]
        layer = lab.pick(smoke=1, small=BLOCK)
        prompts = [TEMPLATE.format(text) for text in texts]
        found = statements.last_states(lab, model, prompts, [layer], "scenarios")[0].double()
        # A few of a model's dimensions are far larger than the others.
        found = found / found.std(0, correction=0).clamp_min(1e-12)
        _STATES[lab.scale] = dict(zip(texts, found, strict=True))
    return _STATES[lab.scale]


def _pairs(lab: Lab, seed: int) -> tuple[Pairs, Pairs]:
    """Pairs of some events to fit on, and of others to test on; the seed draws events and pairs."""
    states, draws = _states(lab), random.Random(seed)
    found = []
    for events, count in zip(everyday_events.split(KNOWN, seed), (300, 200), strict=True):
        pairs = everyday_events.scenario_pairs(events, count, draws)
        found.append(tuple(torch.stack([states[text] for text in side]) for side in (pairs.better, pairs.worse)))
    (known, worse_known), (held, worse_held) = found
    return (known, worse_known), (held, worse_held)


def _arm(lab: Lab, components: int | None, *, shuffled: bool = False) -> Callable[[int], dict[str, float]]:
    """Fit a ranking on some events and rank pairs of others; `shuffled` turns half of the training pairs round."""

    def measured(seed: int) -> dict[str, float]:
        (better, worse), held = _pairs(lab, seed)
        shares = []
        for draw in range(10 if shuffled else 1):
            turned = torch.zeros(len(better), 1, dtype=torch.bool)
            if shuffled:
                turned = torch.rand(len(better), 1, generator=lab.generator(1000 * seed + draw)) < 0.5
            one, other = torch.where(turned, worse, better), torch.where(turned, better, worse)
            shares.append(_share(fit_ranking(one, other, components), held))
        return {RIGHT: sum(shares) / len(shares)}

    return measured


def _share(probe: Probe, held: Pairs) -> float:
    return float(ranked(probe, *held).double().mean())


NOTE = (
    "300 training pairs of 42 events, 200 held-out pairs of 18 others, which the seed draws; states after block 20 at "
    "the last token; ten draws of shuffled labels a seed."
)


@paper.claim(
    "One principal component of SmolLM2's states ranks scenarios by wellbeing",
    paper="Abstract: one component of text-embedding-ada-002 ranks 73.9% of ETHICS pairs",
    control="labels shuffled among the training pairs, which leaves the component's sign to chance",
    reach="real",
)
def one_component_ranks_wellbeing(lab: Lab) -> Verdict:
    """Take the first component of the scenarios' states, its sign from the training pairs, and rank others."""
    one, shuffled = "one component", "one component, labels shuffled"

    def blind(seed: int) -> dict[str, float]:
        held = _pairs(lab, seed)[1]
        shares = [_share(random_probe(held[0].shape[1], 1000 * seed + draw), held) for draw in range(10)]
        return {RIGHT: sum(shares) / len(shares)}

    verdict = lab.compare(
        arms={one: _arm(lab, 1), shuffled: _arm(lab, 1, shuffled=True), "random directions": blind},
        main=Beats(one, shuffled, on=RIGHT, by=0.15),
        seeds=5,
        note=NOTE + " The first component of so small a model's states is what a scenario is about.",
    )
    lab.points(RIGHT, name="one", title="Ranked right by one component")
    return verdict


@paper.claim(
    "Ten components do, and all dimensions add little",
    paper="Abstract: 300 components of text-embedding-ada-002 rank 81.8%",
    control="labels shuffled among the training pairs",
    reach="real",
)
def ten_components_rank_wellbeing(lab: Lab) -> Verdict:
    """Weigh ten components, and all dimensions, by a logistic regression without intercept."""
    ten, shuffled, whole = "ten components", "ten components, labels shuffled", "all dimensions"
    verdict = lab.compare(
        arms={
            ten: _arm(lab, 10),
            shuffled: _arm(lab, 10, shuffled=True),
            "fifty components": _arm(lab, 50),
            whole: _arm(lab, None),
        },
        main=Beats(ten, shuffled, on=RIGHT, by=0.15),
        also=[AtLeast(ten, 0.65, on=RIGHT), AtLeast(whole, 0.7, on=RIGHT), Within(whole, ten, on=RIGHT, by=0.1)],
        seeds=5,
        note=NOTE,
    )
    lab.points(RIGHT, name="ten", title="Ranked right by several")
    return verdict


@paper.claim(
    "The ranking is antisymmetric, knows no sign of a component, and with all components is plain regression",
    paper="Method: logistic regression without intercept on differences of projected embeddings",
    kind="exact",
)
def ranking_is_antisymmetric(lab: Lab) -> Verdict:
    """Check the identities on random embeddings in float64."""
    draws = torch.Generator().manual_seed(lab.seed)
    better, worse = (torch.randn(120, 16, generator=draws, dtype=torch.float64) for _ in range(2))
    better[:, 0] += 1.0
    test = [torch.randn(60, 16, generator=draws, dtype=torch.float64) for _ in range(2)]
    forward, backward = fit_ranking(better, worse, 5), fit_ranking(worse, better, 5)
    flipped = (forward.direction + backward.direction).abs().max().item()
    right = float(ranked(forward, *test).double().mean())
    swapped = float(ranked(forward, test[1], test[0]).double().mean())
    whole = (fit_ranking(better, worse, 16).direction - fit_ranking(better, worse).direction).abs().max().item()
    axis = principal_components(torch.cat([better, worse]), 1)[0]
    one = fit_ranking(better, worse, 1).direction
    mirrored = fit_ranking(-better, -worse, 1).direction  # the components of -x are those of x, of either sign
    # Two convex problems solved to 1e-9 of their gradient.
    return lab.judge(
        checks={
            "swapping all pairs turns the direction round, to 1e-8": flipped < 1e-8,
            "swapping the test pairs gives 1 - accuracy": abs(right + swapped - 1) < 1e-12,
            "all components: regression on the raw differences, to 1e-6": whole < 1e-6,
            "one component: its own direction": abs(abs(float(axis @ one / one.norm())) - 1) < 1e-12,
            "of mirrored embeddings: the mirrored direction": float((one + mirrored).abs().max()) < 1e-8,
        },
        measured={"change under swapping": flipped, "difference from raw regression": whole},
    )
