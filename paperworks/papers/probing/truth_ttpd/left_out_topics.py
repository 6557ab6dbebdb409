"""Truth probes in SmolLM2, each fitted on some topics and read on another, affirmative and negated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paperworks.interpret.probing import ccs
from paperworks.interpret.probing.probes import Probe, lda, logistic, mass_mean
from paperworks.interpret.probing.truth import centered_by, ttpd
from paperworks.lab import Lab
from paperworks.papers.probing._consistency import fit_ccs
from paperworks.testbeds.statements import Seen

# Of logistic regression on SmolLM2: scikit-learn's C = 0.01, without which few statements are overfitted.
PENALTY = 100.0


Fitted = Callable[[Lab, Seen, Sequence[str], int], Probe]


def both_polarities(topics: Sequence[str]) -> list[str]:
    """Names of the data sets of some topics: affirmative ones first, then their negations."""
    return [*topics, *(f"neg_{topic}" for topic in topics)]


def _ttpd(lab: Lab, seen: Seen, topics: Sequence[str], layer: int) -> Probe:
    names = both_polarities(topics)
    return ttpd(seen.at(names, layer), seen.true(names), seen.affirmative(names), seen.groups(names))


def _regression(seen: Seen, names: Sequence[str], layer: int, true: Tensor) -> Probe:
    states = seen.at(names, layer).double()
    center = states.mean(0)
    found = logistic(states - center, true, penalty=PENALTY)
    return Probe(found.direction, found.bias - float(found.direction @ center))


def _shuffled(lab: Lab, seen: Seen, topics: Sequence[str], layer: int) -> Probe:
    true = seen.true(both_polarities(topics))
    order = torch.randperm(len(true), generator=torch.Generator().manual_seed(lab.seed))
    return _regression(seen, both_polarities(topics), layer, true[order])


def _ccs(lab: Lab, seen: Seen, topics: Sequence[str], layer: int) -> Probe:
    """CCS on statements and their negations; each data set centred, all at one scale; the sign from the labels."""
    negations = [f"neg_{topic}" for topic in topics]
    positive = centered_by(seen.at(topics, layer), seen.groups(topics))
    negative = centered_by(seen.at(negations, layer), seen.groups(negations))
    scale = float(torch.cat([positive, negative]).std())
    found = fit_ccs(lab, positive / scale, negative / scale, lab.seed, "mean")
    signed = found.signed_by(positive / scale, negative / scale, seen.true(topics))
    single = ccs.on_statements(signed)
    return Probe(single.direction / scale, single.bias)


PROBES: dict[str, tuple[str, Fitted]] = {
    "TTPD": ("both polarities", _ttpd),
    "logistic regression": (
        "both polarities",
        lambda lab, seen, topics, layer: _regression(
            seen, both_polarities(topics), layer, seen.true(both_polarities(topics))
        ),
    ),
    "mass-mean": (
        "both polarities",
        lambda lab, seen, topics, layer: mass_mean(
            seen.at(both_polarities(topics), layer), seen.true(both_polarities(topics))
        ),
    ),
    "mass-mean with covariance": (
        "both polarities",
        lambda lab, seen, topics, layer: lda(
            seen.at(both_polarities(topics), layer), seen.true(both_polarities(topics)), shrinkage=0.05
        ),
    ),
    "CCS": ("pairs, no labels", _ccs),
    "logistic regression, affirmative": (
        "affirmative only",
        lambda lab, seen, topics, layer: _regression(seen, topics, layer, seen.true(topics)),
    ),
    "logistic regression, labels shuffled": ("control", _shuffled),
}


def held_out(lab: Lab, seen: Seen, layer: int, fitted: Fitted) -> dict[str, float]:
    """Hold each topic out once: the share right of its affirmative, and of its negated statements."""
    topics = [name for name in seen.sets if not name.startswith("neg_")]
    hits: dict[str, list[Tensor]] = {"affirmative": [], "negated": []}
    for topic in topics:
        probe = fitted(lab, seen, [name for name in topics if name != topic], layer)
        for polarity, name in (("affirmative", topic), ("negated", f"neg_{topic}")):
            scores = probe.score(seen.at([name], layer).double())
            # A direction cannot know where a new topic's zero is: its mean, which needs no labels.
            hits[polarity].append((scores > scores.mean()) == seen.sets[name].true)
    return {polarity: float(torch.cat(found).double().mean()) for polarity, found in hits.items()}
