"""What consistency does not single out: probes without labels follow whatever is most conspicuous in the pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperworks.interpret.probing import ccs
from paperworks.interpret.probing.ccs import ContrastProbe, Normalization, consistency_loss
from paperworks.interpret.probing.probes import leading_component, logistic
from paperworks.interpret.probing.separation import Estimate, auroc, bootstrap, wilson
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.papers.probing._consistency import fit_ccs
from paperworks.papers.probing._planted_pairs import Pairs, planted_pairs
from paperworks.testbeds import statements
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="ccs-challenges",
    title="Challenges with Unsupervised LLM Knowledge Discovery",
    authors="Farquhar, Varma, Kenton, Gasteiger, Mikulik, Shah",
    year=2023,
    ref="arXiv:2312.10029",
    family="probing",
    summary=(
        "Any yes-or-no feature of a question satisfies CCS's consistency as well as truth does. So a method without "
        "labels finds the most conspicuous feature of the pairs, which need not be what the model knows."
    ),
    implements=(
        "paperworks.interpret.probing.ccs.consistency_loss",
        "paperworks.interpret.probing.ccs.crc_tpc",
        "paperworks.interpret.probing.ccs.crc_two_means",
    ),
)


def _agrees(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    """Return the share that agrees with labels under the better sign."""
    share = float(((scores > 0) == labels).double().mean())
    return max(share, 1 - share)


@paper.claim(
    "Every binary feature of a question has a probe with CCS loss 0, and so has its exclusive-or with any other",
    paper="Theorems 1 and 2: arbitrary features satisfy consistency and confidence; a CCS probe can be transformed "
    "into others of the same loss",
    kind="exact",
)
def any_feature_is_consistent(lab: Lab) -> Verdict:
    """Build the probes of random features and evaluate their loss."""
    draws = torch.Generator().manual_seed(lab.seed)
    features = torch.rand(50, 200, generator=draws) < 0.5
    p = features.double()
    losses = consistency_loss(p, 1 - p)
    # Theorem 2: the probe of h, turned round where another feature g is on, is the probe of h xor g.
    other = torch.rand(50, 200, generator=draws) < 0.5
    turned = torch.where(other, 1 - p, p)
    combined = consistency_loss(turned, 1 - turned)
    soft = torch.rand(50, 200, generator=draws, dtype=torch.float64)  # a probe that is not perfect either
    q = torch.rand(50, 200, generator=draws, dtype=torch.float64)
    before = consistency_loss(soft, q)
    after = consistency_loss(torch.where(other, 1 - soft, soft), torch.where(other, 1 - q, q))
    swapped = consistency_loss(torch.where(other, q, soft), torch.where(other, soft, q))
    return lab.judge(
        checks={
            "the loss of 50 random features is exactly 0": bool((losses == 0).all()),
            "combined with another feature it is 0 as well": bool((combined == 0).all()),
            "each is the probe of the exclusive-or": torch.equal(turned.bool(), features ^ other),
            # The same 200 float64 terms.
            "swapping the sides where a feature is on changes no loss": float((swapped - before).abs().max()) < 1e-15,
        },
        measured={
            "largest loss of a random feature": losses.max(),
            "largest loss of an exclusive-or": combined.max(),
            "features": len(features),
            "largest change of an imperfect probe's loss when p becomes 1 - p": (after - before).abs().max(),
        },
        note="For probes that are not perfect, p -> 1 - p on both sides keeps the consistency but not the confidence; "
        "exchanging the sides keeps both.",
    )


Search = Callable[[Lab, Pairs, int], ContrastProbe]
SEARCHES: dict[str, Search] = {
    "CCS": lambda lab, data, seed: fit_ccs(lab, data.positive, data.negative, seed),
    "CRC-TPC": lambda lab, data, seed: ccs.crc_tpc(data.positive, data.negative),
    "2-means": lambda lab, data, seed: ccs.crc_two_means(data.positive, data.negative),
}


@paper.claim(
    "Methods without labels find the stronger of truth and a distractor; labels find truth",
    paper="Section 4: CCS and its variants predict the distractor, logistic regression does not",
    control="the strengths exchanged; and logistic regression on labels",
)
def the_stronger_feature_wins(lab: Lab) -> Verdict:
    """Plant truth and a distractor that turns round with the answer, one twice as strong, and exchange them."""
    seeds, n = lab.pick(smoke=1, small=20), lab.pick(smoke=60, small=500)
    followed: dict[str, dict[str, int]] = {name: {"distractor stronger": 0, "truth stronger": 0} for name in SEARCHES}
    supervised: list[float] = []
    with lab.threads(1):
        for seed in lab.track(seeds, "planted distractors"):
            for case, (truth, distractor) in (("distractor stronger", (1.0, 2.0)), ("truth stronger", (2.0, 1.0))):
                data = planted_pairs(
                    lab.seed + seed, n, truth=truth, token=5.0, distractor=distractor, noise=0.5, own=0.3
                )
                for name, search in SEARCHES.items():
                    scores = search(lab, data, seed).score(data.positive, data.negative)
                    followed[name][case] += _agrees(scores, data.distractor) > _agrees(scores, data.true)
                if case == "distractor stronger":
                    supervised.append(_labelled(data))
    chosen = {name: counts["distractor stronger"] / seeds for name, counts in followed.items()}
    reversed_ = {name: counts["truth stronger"] / seeds for name, counts in followed.items()}
    return lab.judge(
        checks={
            "CCS follows the distractor in more than 80% of draws": chosen["CCS"] > 0.8,
            "so does CRC-TPC": chosen["CRC-TPC"] > 0.8,
            "with the strengths exchanged both do in less than 20%": max(reversed_["CCS"], reversed_["CRC-TPC"]) < 0.2,
            "labels find truth: more than 95% of held-out pairs in every draw": min(supervised) > 0.95,
        },
        measured={
            **{f"{name} follows the distractor": str(wilson(round(v * seeds), seeds)) for name, v in chosen.items()},
            "draws": seeds,
            "pairs in each": n,
        },
        control={
            **{f"{name}, strengths exchanged": str(wilson(round(v * seeds), seeds)) for name, v in reversed_.items()},
            "logistic regression, least of held-out pairs right": min(supervised),
        },
        note="Pairs base +- (truth + 5 token + distractor) in 64 dimensions, strengths 1 and 2.",
    )


def _labelled(data: Pairs) -> float:
    """Fit labels on half of the pairs' normalised differences; return the share right of the other half."""
    one, other = Normalization.of(data.positive, data.negative)(data.positive, data.negative)
    apart = one - other
    first = torch.arange(len(apart)) % 2 == 0
    probe = logistic(apart[first], data.true[first], penalty=1.0)
    return float((probe.predict(apart[~first]) == data.true[~first]).double().mean())


WORDS = ("banana", "shed")
DISTRACTED = "Is the following statement true? {statement} {word}\nAnswer:{answer} {word}"
PLAIN = "Is the following statement true? {statement}\nAnswer:{answer}"


@paper.claim(
    "A random word after each question is what methods without labels find in SmolLM2",
    paper="Section 4.1: 'banana' or 'shed' appended to each question at random; the top component separates the words",
    control="the same questions without the word; and logistic regression on labels",
)
def words_are_found_in_smollm2(lab: Lab) -> Verdict:
    """Ask about easy statements with a random word, and see what separates the normalised differences."""
    model = smollm2(lab, smoke_depth=statements.depth(lab))
    topics = ("cities", "animal_class")
    count = lab.pick(smoke=10, small=60)
    parts = [statements.paired(topic, count, lab.seed)[0] for topic in lab.pick(smoke=topics[:1], small=topics)]
    texts = [text for part in parts for text in part.texts]
    true = torch.cat([part.true for part in parts])
    draws = torch.Generator().manual_seed(lab.seed)
    banana = torch.rand(len(texts), generator=draws) < 0.5
    layers = lab.pick(smoke=(1, 2), small=(9, 13, 17, 21, 25))

    def sides(template: str, description: str) -> list[Tensor]:
        found = []
        for answer in (" Yes", " No"):
            # Normalisation removes what the word adds to both sides alike: what is left is the word turned round by
            # the answer, which only a model that combines the two has.
            prompts = [
                template.format(statement=text, answer=answer, word=WORDS[0] if word else WORDS[1])
                for text, word in zip(texts, banana.tolist(), strict=True)
            ]
            found.append(statements.last_states(lab, model, prompts, layers, f"{description},{answer}"))
        return found

    distracted, plain = sides(DISTRACTED, "with a word"), sides(PLAIN, "without")
    found: dict[str, dict[int, float]] = {"word": {}, "truth": {}, "word, absent": {}, "labels": {}}
    searched: dict[str, list[str]] = {name: [] for name in SEARCHES}
    for place, layer in enumerate(lab.track(layers, "components")):
        apart, without = _differences(distracted, place), _differences(plain, place)
        component = apart @ leading_component(apart)
        found["word"][layer] = _either(component, banana)
        found["truth"][layer] = _either(component, true)
        found["word, absent"][layer] = _either(without @ leading_component(without), banana)
        found["labels"][layer] = _supervised(apart, true)
        data = Pairs(distracted[0][place].double(), distracted[1][place].double(), true, banana)
        for name, search in SEARCHES.items():
            scores = search(lab, data, lab.seed).score(data.positive, data.negative)
            searched[name].append(f"word {_agrees(scores, banana):.2f}, truth {_agrees(scores, true):.2f}")
    best = max(layers, key=lambda layer: found["word"][layer])
    interval = _interval(_differences(distracted, layers.index(best)), banana, lab)
    _draw(lab, [layer + 1 for layer in layers], found)
    lab.table(
        f"What is found without labels (agreement under the better sign; n = {len(true)}, seed {lab.seed})",
        ["block", *SEARCHES],
        [[layer + 1, *(searched[name][place] for name in SEARCHES)] for place, layer in enumerate(layers)],
    )
    return lab.judge(
        checks={
            "the first component separates the words: AUROC above 0.9 in some block": found["word"][best] > 0.9,
            "it does not separate truth: below 0.7 there": found["truth"][best] < 0.7,
            "without the word it does not separate them: below 0.7": max(found["word, absent"].values()) < 0.7,
        },
        measured={
            "AUROC of the word, best block": str(interval),
            "best block": best + 1,
            "AUROC of the word, by block": [round(value, 3) for value in found["word"].values()],
            "AUROC of truth, by block": [round(value, 3) for value in found["truth"].values()],
            "blocks, counted from 1": [layer + 1 for layer in layers],
            "n": len(true),
            "seed": lab.seed,
        },
        control={
            "AUROC of the word where it is absent, by block": [round(v, 3) for v in found["word, absent"].values()],
            "logistic regression on labels, AUROC of truth, by block": [round(v, 3) for v in found["labels"].values()],
        },
        note="First principal component of the differences of normalised sides; AUROC under the better sign. Which "
        "word it is says nothing of the answer, yet it is what varies most. Labels do not find truth here either (half "
        "of the pairs to fit, half to score, both ways): at the word after the answer SmolLM2 does not hold it.",
    )


def _differences(sides: list[Tensor], place: int) -> Float[Tensor, "n dim"]:
    one, other = sides[0][place], sides[1][place]
    return torch.sub(*Normalization.of(one, other)(one, other))


def _either(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    found = auroc(scores, labels)
    return max(found, 1 - found)


def _interval(apart: Float[Tensor, "n dim"], labels: Bool[Tensor, " n"], lab: Lab) -> Estimate:
    scores = apart @ leading_component(apart)
    return bootstrap(lambda rows: _either(scores[rows], labels[rows]), len(labels), draws=300, seed=lab.seed)


def _supervised(apart: Float[Tensor, "n dim"], true: Bool[Tensor, " n"]) -> float:
    first = torch.arange(len(true)) % 2 == 0
    scores = torch.empty(len(true), dtype=torch.float64)
    for rows in (first, ~first):
        scores[~rows] = logistic(apart[rows], true[rows], penalty=100.0).score(apart[~rows])
    return auroc(scores, true)


def _draw(lab: Lab, blocks: list[int], found: dict[str, dict[int, float]]) -> None:
    names = {
        "word": ("the random word, first component", COLORS[1], "-"),
        "truth": ("truth, first component", COLORS[0], "-"),
        "labels": ("truth, logistic regression on labels", COLORS[2], "--"),
        "word, absent": ("the word, where it is absent", CONTROL, ":"),
    }
    with lab.figure("layers", figsize=(8.6, 3.6)) as figure:
        axes = figure.subplots()
        for key, (label, color, style) in names.items():
            axes.plot(blocks, list(found[key].values()), style, color=color, marker="o", ms=4, label=label)
        axes.set_ylim(0.35, 1.03)
        axes.set_xticks(blocks)
        axes.set_xlabel("block of SmolLM2")
        axes.set_ylabel("AUROC, better sign")
        axes.set_title("What varies most between answers Yes and No")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
