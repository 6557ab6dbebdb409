"""What consistency does not single out: probes without labels follow whatever is most conspicuous in the pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperworks.interpret.probing import ccs
from paperworks.interpret.probing.ccs import ContrastProbe, Normalization, consistency_loss
from paperworks.interpret.probing.probes import logistic
from paperworks.interpret.probing.separation import auroc
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
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
    equation=r"p(x^+) = h(x),\ p(x^-) = 1 - h(x) \ \Rightarrow\ L_{CCS} = 0 \text{ for every } h: x \mapsto \{0, 1\}",
    usage="""
import torch
from paperworks.interpret.probing import ccs

truth, word = (torch.randint(2, (400, 1)).double() * 2 - 1 for _ in range(2))  # what is true, and a random word
axes = torch.eye(32, dtype=torch.float64)
shift = truth * axes[0] + 2 * word * axes[1] + 5 * axes[2]     # the answer's token adds to every pair
noise = 0.3 * torch.randn(2, 400, 32, dtype=torch.float64)
positive, negative = shift + noise[0], -shift + noise[1]
found = ccs.crc_tpc(positive, negative).score(positive, negative) > 0
for name, label in (("truth", truth), ("the word", word)):
    share = float((found == (label[:, 0] > 0)).double().mean())
    print(name, max(share, 1 - share))
""",
    notes="The paper's opinions of a character and prompts of a persona are not repeated.",
)


def _agrees(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    """Share that agrees with labels under the better sign."""
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


def _ccs(lab: Lab, data: Pairs, seed: int) -> ContrastProbe:
    return fit_ccs(lab, data.positive, data.negative, seed)


def _component(lab: Lab, data: Pairs, seed: int) -> ContrastProbe:
    return ccs.crc_tpc(data.positive, data.negative)


def _labelled(lab: Lab, data: Pairs, seed: int) -> ContrastProbe:
    """Logistic regression on the labels of half of the pairs."""
    normalization = Normalization.of(data.positive, data.negative)
    apart = torch.sub(*normalization(data.positive, data.negative))
    known = torch.arange(len(apart)) % 2 == 0
    return ContrastProbe(logistic(apart[known], data.true[known], penalty=1.0).direction, normalization, squash=False)


@paper.claim(
    "Methods without labels find the stronger of truth and a distractor; labels find truth",
    paper="Section 4: CCS and its variants predict the distractor, logistic regression does not",
    control="the strengths exchanged",
)
def the_stronger_feature_wins(lab: Lab) -> Verdict:
    """Plant truth and a distractor that turns round with the answer, one twice as strong, and exchange them."""
    n = lab.pick(smoke=60, small=500)

    def arm(
        search: Callable[[Lab, Pairs, int], ContrastProbe], truth: float, distractor: float
    ) -> Callable[[int], dict[str, float]]:
        def followed(seed: int) -> dict[str, float]:
            data = planted_pairs(seed, n, truth=truth, token=5.0, distractor=distractor, noise=0.5, own=0.3)
            with lab.threads(1):
                scores = search(lab, data, seed).score(data.positive, data.negative)
            held = torch.arange(n) % 2 == 1  # the half that no label was given of
            return {
                "agreement with the distractor": _agrees(scores[held], data.distractor[held]),
                "agreement with truth": _agrees(scores[held], data.true[held]),
            }

        return followed

    distracted, undistracted, on = "CCS, distractor stronger", "CCS, truth stronger", "agreement with the distractor"
    verdict = lab.compare(
        arms={
            distracted: arm(_ccs, 1.0, 2.0),
            undistracted: arm(_ccs, 2.0, 1.0),
            "CRC-TPC, distractor stronger": arm(_component, 1.0, 2.0),
            "CRC-TPC, truth stronger": arm(_component, 2.0, 1.0),
            "labels, distractor stronger": arm(_labelled, 1.0, 2.0),
        },
        main=Beats(distracted, undistracted, on=on, by=0.3),
        also=[
            Beats("CRC-TPC, distractor stronger", "CRC-TPC, truth stronger", on=on, by=0.3),
            AtLeast("labels, distractor stronger", 0.95, on="agreement with truth"),
            AtMost("labels, distractor stronger", 0.65, on=on),
        ],
        seeds=10,
        note="Pairs base +- (truth + 5 token + distractor) in 64 dimensions, strengths 1 and 2; agreement under the "
        "better sign.",
    )
    lab.points(on, name="distractor", title="Agreement with the distractor")
    return verdict


WORDS = ("banana", "shed")
DISTRACTED = "Is the following statement true? {statement} {word}\nAnswer:{answer} {word}"
PLAIN = "Is the following statement true? {statement}\nAnswer:{answer}"


@paper.claim(
    "A random word after each question is what methods without labels find in SmolLM2",
    paper="Section 4.1: 'banana' or 'shed' appended to each question at random; the top component separates the words",
    control="the same questions without the word",
    reach="real",
)
def words_are_found_in_smollm2(lab: Lab) -> Verdict:
    """Ask about easy statements with a random word, and see what separates the normalised differences."""
    model = smollm2(lab, smoke_depth=2)
    layer = lab.pick(smoke=1, small=13)

    @cache
    def asked(seed: int) -> tuple[statements.Statements, Bool[Tensor, " n"]]:
        part = statements.paired("cities", lab.pick(smoke=10, small=48), seed)[0]
        return part, torch.rand(len(part), generator=lab.generator(seed)) < 0.5

    def arm(template: str) -> Callable[[int], dict[str, float]]:
        def separated(seed: int) -> dict[str, float]:
            part, banana = asked(seed)
            # Normalisation removes what the word adds to both sides alike: what is left is the word turned round by
            # the answer, which only a model that combines the two has.
            words = [WORDS[0] if word else WORDS[1] for word in banana.tolist()]
            yes, no = (
                statements.last_states(
                    lab,
                    model,
                    [
                        template.format(statement=text, answer=answer, word=word)
                        for text, word in zip(part.texts, words, strict=True)
                    ],
                    [layer],
                    "answered questions",
                )[0].double()
                for answer in (" Yes", " No")
            )
            data = Pairs(yes, no, part.true, banana)
            component, consistent = (search(lab, data, seed).score(yes, no) for search in (_component, _ccs))
            return {
                "AUROC of the word, first component": _either(component, banana),
                "AUROC of truth, first component": _either(component, part.true),
                "AUROC of the word, CCS": _either(consistent, banana),
                "AUROC of truth, CCS": _either(consistent, part.true),
            }

        return separated

    word, plain, on = "with a random word", "without the word", "AUROC of the word, first component"
    verdict = lab.compare(
        arms={word: arm(DISTRACTED), plain: arm(PLAIN)},
        main=Beats(word, plain, on=on, by=0.25),
        also=[AtLeast(word, 0.9, on=on), AtMost(word, 0.7, on="AUROC of truth, first component")],
        seeds=3,
        note="48 statements about cities a seed, after block 14; AUROC under the better sign. Which word it is says "
        "nothing of the answer, yet it is what varies most.",
    )
    lab.points(on, name="words", title="A random word, first component")
    return verdict


def _either(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    found = auroc(scores, labels)
    return max(found, 1 - found)
