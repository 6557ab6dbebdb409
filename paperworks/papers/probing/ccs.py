"""Latent knowledge without labels: contrast pairs, the consistency loss, and what SmolLM2 lets it find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperworks.interpret.probing import ccs
from paperworks.interpret.probing.ccs import ContrastProbe, Normalization, consistency_loss
from paperworks.interpret.probing.probes import logistic, random_probe
from paperworks.interpret.probing.separation import Estimate, wilson
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import DecoderModel
from paperworks.papers.probing._consistency import fit_ccs
from paperworks.papers.probing._planted_pairs import planted_pairs
from paperworks.testbeds import statements
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="ccs",
    title="Discovering Latent Knowledge in Language Models Without Supervision (CCS)",
    authors="Burns, Ye, Klein, Steinhardt",
    year=2022,
    ref="arXiv:2212.03827; GitHub collin-burns/discovering_latent_knowledge",
    family="probing",
    summary=(
        "A statement and its opposite cannot both be true. A direction whose readings of such pairs add up to one, "
        "confidently, is a candidate for what a model takes to be true: found without a single label."
    ),
    implements=(
        "paperworks.interpret.probing.ccs.ConsistencyProbes",
        "paperworks.interpret.probing.ccs.consistency_loss",
        "paperworks.interpret.probing.ccs.Normalization",
        "paperworks.interpret.probing.ccs.crc_tpc",
        "paperworks.interpret.probing.ccs.crc_two_means",
    ),
)

EASY = ("cities", "animal_class", "element_symb")  # topics whose affirmative statements SmolLM2 can tell apart
QUESTION = "Is the following statement true? {}\nAnswer:"
PENALTY = 100.0  # of the supervised probe: as in the truth papers, for few pairs in 576 dimensions


def _right(scores: Float[Tensor, " n"], true: Bool[Tensor, " n"]) -> Estimate:
    """Return the share right under the better sign, which is what a probe without labels can promise."""
    hits = int(((scores > 0) == true).sum())
    return wilson(max(hits, len(true) - hits), len(true))


@paper.claim(
    "CCS finds a planted truth without labels, once each side of the pairs is normalised by itself",
    paper="Section 2.2: normalise the representations of each class separately, or the probe learns the token",
    control="the same pairs without normalisation",
)
def finds_planted_truth(lab: Lab) -> Verdict:
    """Search pairs whose strongest difference is the answer's token, with and without normalisation."""
    seeds, epochs = lab.pick(smoke=1, small=5), 1000
    right: dict[str, list[float]] = {"std": [], "mean": [], "none": []}
    closed: dict[str, list[float]] = {"CRC-TPC": [], "2-means": []}
    n = lab.pick(smoke=60, small=500)
    with lab.threads(1):
        for seed in lab.track(seeds, "planted pairs"):
            for noise in (0.3, 1.0):
                data = planted_pairs(lab.seed + seed, n, truth=1.0, token=5.0, noise=noise)
                for scaling, found in right.items():
                    probe = fit_ccs(lab, data.positive, data.negative, seed, scaling, epochs)  # type: ignore[arg-type]
                    found.append(_right(probe.score(data.positive, data.negative), data.true).value)
                for name, crc in (("CRC-TPC", ccs.crc_tpc), ("2-means", ccs.crc_two_means)):
                    scores = crc(data.positive, data.negative).score(data.positive, data.negative)
                    closed[name].append(_right(scores, data.true).value)
    return lab.judge(
        checks={
            "more than 95% right in every draw": min(right["std"]) > 0.95,
            "less than 70% without normalisation": max(right["none"]) < 0.7,
        },
        measured={
            "right, least of all draws": min(right["std"]),
            "right with means subtracted only, least": min(right["mean"]),
            **{f"{name}, least": min(values) for name, values in closed.items()},
            "draws": len(right["std"]),
            "pairs in each": n,
        },
        control={"without normalisation, most": max(right["none"]), "without normalisation": right["none"]},
        note="Pairs base +- (1 truth + 5 token) + noise in 64 dimensions, noise 0.3 and 1; under the better sign.",
    )


@paper.claim(
    "The loss is 0 for confident consistent probes only, 1/4 for the undecided one, and does not know the sides",
    paper="Section 2.2: consistency and confidence, equations 1 to 3",
    kind="exact",
)
def loss_is_exact(lab: Lab) -> Verdict:
    """Evaluate the loss where its value is known, and normalisation where a token stands in the way."""
    draws = torch.Generator().manual_seed(lab.seed)
    truth = (torch.rand(100, generator=draws) < 0.5).double()
    half = torch.full((100,), 0.5, dtype=torch.float64)
    one, other = (torch.rand(20, 100, generator=draws, dtype=torch.float64) for _ in range(2))
    # Where is it least? On a grid of both probabilities, nowhere but in the two corners (0, 1) and (1, 0).
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    p, q = torch.meshgrid(grid, grid, indexing="ij")
    surface = consistency_loss(p.reshape(-1, 1), q.reshape(-1, 1)).view(101, 101)
    zeros = (surface == 0).nonzero().tolist()
    data = planted_pairs(lab.seed, 200, truth=1.0, token=5.0, noise=0.3)
    normalised = Normalization.of(data.positive, data.negative)(data.positive, data.negative)
    left = max(side.mean(0).abs().max().item() for side in normalised)
    return lab.judge(
        checks={
            "0 for p(x+) = 1 - p(x-) in {0, 1}": float(consistency_loss(truth, 1 - truth)) == 0,
            "and nowhere else": zeros == [[0, 100], [100, 0]],
            "1/4 for p = 1/2": float(consistency_loss(half, half)) == 0.25,
            "the same with the sides swapped": torch.equal(consistency_loss(one, other), consistency_loss(other, one)),
            # A mean of 200 float64 numbers near 1.
            "after normalisation each side has mean 0, so the token's direction is gone": left < 1e-12,
        },
        measured={"zeros on a grid of 101 x 101": len(zeros), "largest mean after normalisation": left},
    )


@dataclass(frozen=True)
class Answered:
    """One topic's statements: the states after "Yes" and after "No" by layer, truth, and the model's own log-odds."""

    yes: Float[Tensor, "layers n dim"]
    no: Float[Tensor, "layers n dim"]
    true: Bool[Tensor, " n"]
    own: Float[Tensor, " n"]
    known: Bool[Tensor, " n"]  # which pairs are searched; the others are scored


def _answered(lab: Lab, model: DecoderModel, topic: str, layers: Sequence[int]) -> Answered:
    part = statements.paired(topic, lab.pick(smoke=12, small=70), lab.seed)[0]
    questions = [QUESTION.format(text) for text in part.texts]
    yes, no = (
        statements.last_states(lab, model, [question + answer for question in questions], layers, f"{topic},{answer}")
        for answer in (" Yes", " No")
    )
    known = torch.arange(len(part)) % 2 == 0  # rows come true first, then false: both halves are balanced
    return Answered(yes, no, part.true, _zero_shot(lab, model, questions), known)


@torch.no_grad()
def _zero_shot(lab: Lab, model: DecoderModel, questions: Sequence[str]) -> Float[Tensor, " n"]:
    """Return log p(" Yes") - log p(" No") after each question."""
    tokenizer: Any = model.tokenizer
    yes, no = (tokenizer.encode(answer)[0] for answer in (" Yes", " No"))
    last = model.spec.depth - 1
    states = statements.last_states(lab, model, questions, [last], "the model's own answers")[0]
    assert model.norm is not None
    logits = model.logits(model.norm(states.to(model.device)))
    return (logits[:, yes] - logits[:, no]).double().cpu()


@paper.claim(
    "CCS reads from SmolLM2, without labels, whether easy statements are true",
    paper="Table 1: CCS is 4 points above zero-shot accuracy, on average of 6 models and 10 data sets",
    control="random directions on the same normalised pairs, and the model's own answer",
)
def reads_smollm2(lab: Lab) -> Verdict:
    """Search each topic by itself, as the paper does with its data sets, and score the pairs held out."""
    model = smollm2(lab, smoke_depth=statements.depth(lab))
    layers = lab.pick(smoke=(1, 2), small=(5, 11, 17, 23, 29))
    topics = {topic: _answered(lab, model, topic, layers) for topic in lab.pick(smoke=EASY[:1], small=EASY)}
    found: dict[str, dict[int, Estimate]] = {name: {} for name in SEARCHES}
    band: dict[int, list[float]] = {}
    for place, layer in enumerate(lab.track(layers, "probes")):
        for name, search in SEARCHES.items():
            found[name][layer] = _pooled([_hits(lab, search, part, place) for part in topics.values()])
        band[layer] = _random_band(lab, list(topics.values()), place)
    # Where it says Yes to everything, its own median is the fairer threshold: the paper's calibrated zero-shot.
    held = [(part.own[~part.known], part.true[~part.known], part.own[part.known].median()) for part in topics.values()]
    answers = _pooled([(own > 0) == true for own, true, _ in held])
    calibrated = _pooled([(own > median) == true for own, true, median in held])
    _draw(lab, layers, found, band, calibrated)
    middle = layers[len(layers) // 2]
    ours = found["CCS"][middle]
    lab.table(
        f"Share right on {ours.n} held-out pairs (seed {lab.seed}; 95% intervals)",
        ["block", *found, "random directions, 5% to 95%"],
        [
            [
                layer + 1,
                *(f"{by[layer].value:.3f} [{by[layer].low:.3f}, {by[layer].high:.3f}]" for by in found.values()),
                f"{band[layer][0]:.3f} to {band[layer][1]:.3f}",
            ]
            for layer in layers
        ],
    )
    return lab.judge(
        checks={
            "above 95% of random directions, after the middle block": ours.value > band[middle][1],
            "above the model's own answers, calibrated": ours.value > calibrated.value,
            "the supervised probe is above chance (95%)": found["supervised"][middle].low > 0.5,
        },
        measured={
            "CCS, middle block": str(ours),
            "CCS by block": [round(estimate.value, 3) for estimate in found["CCS"].values()],
            "CRC-TPC, middle block": str(found["CRC-TPC"][middle]),
            "2-means, middle block": str(found["2-means"][middle]),
            "supervised, middle block": str(found["supervised"][middle]),
            "supervised by block": [round(estimate.value, 3) for estimate in found["supervised"].values()],
            "blocks, counted from 1": [layer + 1 for layer in layers],
            "seed": lab.seed,
        },
        control={
            "random directions, 5% to 95%, middle block": band[middle],
            "the model's own answers": str(answers),
            "the model's own answers, calibrated": str(calibrated),
        },
        note="Cities, animals and elements, each searched alone: asked in one template and answered Yes and No; half "
        "of the pairs to search, half to score. The sign comes from the labels of the searched half, for random "
        "directions too. Where it does not hold, the supervised probe says why: a model of 135M parameters does not "
        "judge its answer at the answer's token, so there is no truth there to be found.",
    )


Search = Callable[[Lab, Tensor, Tensor, Tensor], ContrastProbe]


def _supervised(lab: Lab, positive: Tensor, negative: Tensor, true: Bool[Tensor, " n"]) -> ContrastProbe:
    """Logistic regression on the differences of normalised sides."""
    normalization = Normalization.of(positive, negative)
    one, other = normalization(positive, negative)
    return ContrastProbe(logistic(one - other, true, penalty=PENALTY).direction, normalization, squash=False)


SEARCHES: dict[str, Search] = {
    "CCS": lambda lab, positive, negative, true: fit_ccs(lab, positive, negative, lab.seed),
    "CRC-TPC": lambda lab, positive, negative, true: ccs.crc_tpc(positive, negative),
    "2-means": lambda lab, positive, negative, true: ccs.crc_two_means(positive, negative),
    "supervised": _supervised,
}


def _hits(lab: Lab, search: Search, part: Answered, place: int) -> Bool[Tensor, " held_out"]:
    """Search one half of a topic's pairs after one block; return which of the other half are read right."""
    known = part.known
    searched = (part.yes[place][known], part.no[place][known])
    probe = search(lab, *searched, part.true[known]).signed_by(*searched, part.true[known])
    return (probe.score(part.yes[place][~known], part.no[place][~known]) > 0) == part.true[~known]


def _pooled(hits: list[Bool[Tensor, " n"]]) -> Estimate:
    joined = torch.cat(hits)
    return wilson(int(joined.sum()), len(joined))


def _random_band(lab: Lab, topics: list[Answered], place: int) -> list[float]:
    """Return the 5% and 95% quantiles of the share right of random directions."""

    def drawn(seed: int) -> Search:
        def search(lab: Lab, positive: Tensor, negative: Tensor, true: Tensor) -> ContrastProbe:
            direction = random_probe(positive.shape[1], seed).direction
            return ContrastProbe(direction, Normalization.of(positive, negative), squash=False)

        return search

    shares = [
        _pooled([_hits(lab, drawn(lab.seed + draw), part, place) for part in topics]).value
        for draw in range(lab.pick(smoke=20, small=200))
    ]
    ends = torch.tensor(shares, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    return [float(end) for end in ends]


def _draw(
    lab: Lab,
    layers: Sequence[int],
    found: dict[str, dict[int, Estimate]],
    band: dict[int, list[float]],
    calibrated: Estimate,
) -> None:
    blocks = [layer + 1 for layer in layers]
    with lab.figure("layers", figsize=(8.4, 3.8)) as figure:
        axes = figure.subplots()
        axes.fill_between(
            blocks,
            [band[layer][0] for layer in layers],
            [band[layer][1] for layer in layers],
            color=CONTROL,
            alpha=0.3,
            linewidth=0,
            label="random directions, 5% to 95%",
        )
        for color, (name, by) in zip(COLORS, found.items(), strict=False):
            style = "--" if name == "supervised" else "-"
            axes.plot(blocks, [by[layer].value for layer in layers], style, color=color, marker="o", ms=4, label=name)
        axes.axhline(calibrated.value, color=CONTROL, linestyle=":", label="the model's own answer, calibrated")
        axes.set_xlabel("block of SmolLM2")
        axes.set_ylabel("held-out pairs read right")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(0.4, 0.92)
        axes.set_title("Truth of easy statements, read from pairs of answers")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
