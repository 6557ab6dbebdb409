"""Latent knowledge without labels: contrast pairs, the consistency loss, and what SmolLM2 lets it find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from paperworks.interpret.probing import ccs
from paperworks.interpret.probing.ccs import ContrastProbe, Normalization, consistency_loss
from paperworks.interpret.probing.probes import logistic, random_probe
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.papers.probing._consistency import fit_ccs
from paperworks.papers.probing._planted_pairs import planted_pairs
from paperworks.testbeds import statements
from paperworks.testbeds.smollm2 import smollm2
from paperworks.train.objective import Loss

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
    equation=r"L = \frac{1}{n} \sum_i \left(p(x_i^+) - (1 - p(x_i^-))\right)^2 + \min\left(p(x_i^+), p(x_i^-)\right)^2",
    usage="""
import torch
from paperworks import train
from paperworks.interpret.probing import ccs

true = torch.randint(2, (300, 1)) * 2.0 - 1
shift = true * torch.eye(16)[0] + 5 * torch.eye(16)[1]              # what is true, and the token of the answer
positive, negative = (sign * shift + 0.5 * torch.randn(300, 16) for sign in (1, -1))
normalization = ccs.Normalization.of(positive, negative)
pairs = tuple(side.float() for side in normalization(positive, negative))
probes = ccs.ConsistencyProbes(16)
settings = train.Settings(steps=300, lr=3e-3, warmup=0, schedule="constant", clip=None, progress=False)
train.fit(probes, ccs.ccs_loss, [pairs], settings)
found = ccs.best_of(probes, normalization, positive, negative).score(positive, negative) > 0
print("agrees with what is true:", float((found == (true[:, 0] > 0)).double().mean()), "or the opposite")
""",
    notes="The sign of what is found is free. SmolLM2-135M does not judge its own answers at the answer's token, so on "
    "its states there is no truth to be found.",
)

Sides = tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]
LOUD = 2.5  # strength of the feature that each side has by itself; that of truth is 1


def _planted(lab: Lab, seed: int) -> tuple[Sides, Bool[Tensor, " n"]]:
    """Pairs of a truth that turns round with the side, and a louder binary feature that each side has by itself."""
    data, draws = planted_pairs(seed, lab.pick(smoke=60, small=500), truth=1.0, token=5.0), lab.generator(1000 + seed)
    axis = functional.normalize(torch.randn(64, generator=draws, dtype=torch.float64), dim=0)
    one, other = ((torch.rand(len(data.true), 1, generator=draws) < 0.5).double() * 2 - 1 for _ in range(2))
    return (data.positive + LOUD * one * axis, data.negative + LOUD * other * axis), data.true


def confidence_alone(model: nn.Module, pairs: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """The loss without its first term: of each pair one probability must be low, the other may be anything."""
    return torch.minimum(model(pairs[0]), model(pairs[1])).square().mean(-1).sum()


def consistency_alone(model: nn.Module, pairs: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """The loss without its second term: the probabilities of a pair add up to one, and may both be a half."""
    return (model(pairs[0]) - (1 - model(pairs[1]))).square().mean(-1).sum()


@paper.claim(
    "CCS finds a planted truth without labels, which principal component and clusters miss",
    paper="Section 2.2: consistency and confidence, on representations of which each class is normalised by itself",
    control="the principal component and the clusters of the same differences; CCS without normalisation, without "
    "consistency and without confidence",
)
def finds_planted_truth(lab: Lab) -> Verdict:
    """Search pairs in which a feature that has nothing to do with the other side is louder than truth."""

    def arm(search: Callable[[Sides, int], ContrastProbe]) -> Callable[[int], dict[str, float]]:
        def right(seed: int) -> dict[str, float]:
            sides, true = _planted(lab, seed)
            with lab.threads(1):
                share = float(((search(sides, seed).score(*sides) > 0) == true).double().mean())
            return {"right, better sign": max(share, 1 - share)}

        return right

    def consistent(scaling: ccs.Scaling = "std", loss: Loss = ccs.ccs_loss) -> Callable[[int], dict[str, float]]:
        return arm(lambda sides, seed: fit_ccs(lab, *sides, seed, scaling, loss))

    ours, component, means, on = "CCS", "CRC-TPC", "2-means", "right, better sign"
    raw, unsure, inconsistent = "CCS, not normalised", "CCS without confidence", "CCS without consistency"
    verdict = lab.compare(
        arms={
            ours: consistent(),
            raw: consistent("none"),
            unsure: consistent(loss=consistency_alone),
            inconsistent: consistent(loss=confidence_alone),
            component: arm(lambda sides, seed: ccs.crc_tpc(*sides)),
            means: arm(lambda sides, seed: ccs.crc_two_means(*sides)),
        },
        main=Beats(ours, component, on=on, by=0.15),
        also=[
            AtLeast(ours, 0.95, on=on),
            *(Beats(ours, other, on=on, by=0.1) for other in (means, raw, unsure, inconsistent)),
        ],
        seeds=5,
        note="Pairs base +- (truth + 5 token) + noise 0.3 in 64 dimensions, and a binary feature of strength "
        f"{LOUD:g} drawn for each side. The principal component of the differences follows that feature. Where CCS "
        "without consistency does as well, that is because 1,000 steps from a small start do not reach its trivial "
        "solution, p = 0 for all.",
    )
    lab.points(on, name="planted", title="Right about a planted truth")
    return verdict


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


TOPICS = ("cities", "animal_class")  # whose affirmative statements SmolLM2 can tell apart
QUESTION = "Is the following statement true? {}\nAnswer:"
PENALTY = 100.0  # of the supervised probe: as in the truth papers, for few pairs in 576 dimensions
Search = Callable[[Lab, Sides, Bool[Tensor, " n"], int], ContrastProbe]


def _supervised(lab: Lab, sides: Sides, true: Bool[Tensor, " n"], seed: int) -> ContrastProbe:
    """Logistic regression on the differences of normalised sides."""
    normalization = Normalization.of(*sides)
    one, other = normalization(*sides)
    return ContrastProbe(logistic(one - other, true, penalty=PENALTY).direction, normalization, squash=False)


def _random(lab: Lab, sides: Sides, true: Bool[Tensor, " n"], seed: int) -> ContrastProbe:
    return ContrastProbe(random_probe(sides[0].shape[1], seed).direction, Normalization.of(*sides), squash=False)


SEARCHES: dict[str, Search] = {
    "CCS": lambda lab, sides, true, seed: fit_ccs(lab, *sides, seed),
    "CRC-TPC": lambda lab, sides, true, seed: ccs.crc_tpc(*sides),
    "2-means": lambda lab, sides, true, seed: ccs.crc_two_means(*sides),
    "supervised": _supervised,
    "random direction": _random,
}


@paper.claim(
    "CCS reads from SmolLM2, without labels, whether easy statements are true",
    paper="Table 1: CCS is 4 points above zero-shot accuracy, on average of 6 models and 10 data sets",
    control="random directions on the same normalised pairs, and the model's own answer",
    reach="real",
)
def reads_smollm2(lab: Lab) -> Verdict:
    """Search each topic by itself, as the paper does with its data sets, and score the pairs held out."""
    model = smollm2(lab, smoke_depth=2)
    layer = lab.pick(smoke=1, small=17)
    read: dict[tuple[int, str], tuple[Sides, Bool[Tensor, " n"], list[str]]] = {}

    def answered(seed: int, topic: str) -> tuple[Sides, Bool[Tensor, " n"], list[str]]:
        """States after Yes and after No, truth, and the questions."""
        if (seed, topic) not in read:
            part = statements.paired(topic, lab.pick(smoke=12, small=48), seed)[0]
            questions = [QUESTION.format(text) for text in part.texts]
            yes, no = (
                statements.last_states(lab, model, [text + answer for text in questions], [layer], topic)[0]
                for answer in (" Yes", " No")
            )
            read[seed, topic] = (yes, no), part.true, questions
        return read[seed, topic]

    def arm(search: Search) -> Callable[[int], dict[str, float]]:
        def right(seed: int) -> dict[str, float]:
            hits = []
            for topic in TOPICS:
                (yes, no), true, _ = answered(seed, topic)
                known = torch.arange(len(true)) % 2 == 0  # rows come true first: both halves are balanced
                searched, held = (yes[known], no[known]), (yes[~known], no[~known])
                probe = search(lab, searched, true[known], seed).signed_by(*searched, true[known])
                hits.append((probe.score(*held) > 0) == true[~known])
            return {"held-out pairs right": float(torch.cat(hits).double().mean())}

        return right

    def own(seed: int) -> dict[str, float]:
        """The model's own answers, calibrated: its median log-odds is the threshold, as it says Yes to most."""
        hits = []
        for topic in TOPICS:
            _, true, questions = answered(seed, topic)
            known = torch.arange(len(true)) % 2 == 0
            odds = _log_odds(lab, model, questions)
            hits.append((odds[~known] > odds[known].median()) == true[~known])
        return {"held-out pairs right": float(torch.cat(hits).double().mean())}

    ours, random, answers, on = "CCS", "random direction", "the model's own answers", "held-out pairs right"
    verdict = lab.compare(
        arms={**{name: arm(search) for name, search in SEARCHES.items()}, answers: own},
        main=Beats(ours, random, on=on, by=0.1),
        also=[Beats(ours, answers, on=on, by=0.04), AtLeast("supervised", 0.6, on=on)],
        seeds=3,
        note="Cities and animals, each searched alone, after block 18: asked in one template and answered Yes and No; "
        "half of 48 pairs to search, half to score. The sign comes from the labels of the searched half, for random "
        "directions too. Where it does not hold, the supervised probe says why: a model of 135M parameters does not "
        "judge its answer at the answer's token, so there is no truth there to be found.",
    )
    lab.points(on, name="smollm2", title="Truth of easy statements")
    return verdict


@torch.no_grad()
def _log_odds(lab: Lab, model: DecoderModel, questions: list[str]) -> Float[Tensor, " n"]:
    """log p(" Yes") - log p(" No") after each question."""
    tokenizer: Any = model.tokenizer
    yes, no = (tokenizer.encode(answer)[0] for answer in (" Yes", " No"))
    states = statements.last_states(lab, model, questions, [model.spec.depth - 1], "the model's own answers")[0]
    assert model.norm is not None
    logits = model.logits(model.norm(states.to(model.device)))
    return (logits[:, yes] - logits[:, no]).double().cpu()
