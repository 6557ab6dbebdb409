"""Skip-gram with negative sampling, subsampling of frequent words, and phrases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks import train
from paperworks.data.text.phrases import Phrases
from paperworks.data.text.texts import load_text
from paperworks.data.text.word_contexts import NoiseWords, WordContexts, WordVocabulary, keep_probability
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.models.classic.word_vectors import (
    WordVectorModel,
    WordVectors,
    analogy_accuracy,
    negative_sampling_loss,
)
from paperworks.testbeds.training import fit
from paperworks.testbeds.word_vectors import DIM, NEGATIVES, WINDOW, corpus_of, taught

paper = Paper(
    key="sgns",
    title="Distributed Representations of Words and Phrases and their Compositionality",
    authors="Mikolov, Sutskever, Chen, Corrado, Dean",
    year=2013,
    ref="arXiv:1310.4546",
    family="tokens",
    summary=(
        "Negative sampling tells observed pairs from noise instead of normalizing over the vocabulary; frequent words "
        "are thinned out before windows are formed; pairs of words that keep together become one token."
    ),
    implements=(
        "paperworks.models.classic.word_vectors.negative_sampling_loss",
        "paperworks.data.text.word_contexts.NoiseWords",
        "paperworks.data.text.word_contexts.keep_probability",
        "paperworks.data.text.phrases.Phrases",
    ),
    equation=(
        r"\log \sigma(v'_{w_O} \cdot v_{w_I}) + \sum_{i=1}^k \mathbb E_{w_i \sim P_n} \log \sigma(-v'_{w_i} \cdot "
        r"v_{w_I}), \quad P_n \propto U^{3/4}"
    ),
    usage="""
import torch
from paperworks.data.text.phrases import Phrases
from paperworks.data.text.word_contexts import NoiseWords, keep_probability

counts = [1000, 300, 50, 5]
print("noise:", NoiseWords(counts).draw((10,), torch.Generator().manual_seed(0)).tolist())
print("kept of each word:", keep_probability(counts, 1e-2, "tool").tolist())
lines = [["new", "york", "is", "large"], ["he", "left", "new", "york"]] * 20
print("phrases:", Phrases.find(lines, discount=5, threshold=0.01).joined)
""",
)

WORDS = 50


@cache
def dense_pairs(seed: int) -> Float[Tensor, "words words"]:
    """Return p(word, context), log-normal, so that every pair occurs."""
    draws = torch.Generator().manual_seed(seed)
    counts = torch.randn(WORDS, WORDS, generator=draws, dtype=torch.float64).exp()
    return counts / counts.sum()


def pmi(joint: Tensor) -> Float[Tensor, "words words"]:
    """Return log p(w, c) / (p(w) p(c))."""
    return (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log()


@paper.claim(
    "Where every score is free, the optimum of the objective is PMI(w, c) - log k, and the noise follows the 3/4 power",
    paper="Equation 4; its optimum is Levy and Goldberg's reading of it. Section 2.2: unigram distribution to the 3/4",
    kind="exact",
)
def optimum_is_shifted_pmi(lab: Lab) -> Verdict:
    """Take the gradient of the expected loss with respect to every score at PMI - log k, in float64."""
    joint = dense_pairs(lab.seed)
    words, contexts = joint.sum(1, keepdim=True), joint.sum(0)
    scores = (pmi(joint) - torch.tensor(float(NEGATIVES), dtype=torch.float64).log()).requires_grad_()
    expected = -joint * nn.functional.logsigmoid(scores)
    expected = expected - NEGATIVES * words * contexts * nn.functional.logsigmoid(-scores)
    (gradient,) = torch.autograd.grad(expected.sum(), scores)
    counts = [round(1000 / rank) for rank in range(1, WORDS + 1)]
    draws = lab.pick(smoke=5_000, small=1_000_000)
    drawn = NoiseWords(counts).draw((draws,), lab.generator(lab.seed))
    wanted = torch.tensor(counts, dtype=torch.float64) ** 0.75
    wanted = draws * wanted / wanted.sum()
    square = ((torch.bincount(drawn, minlength=WORDS) - wanted) ** 2 / wanted).sum().item()
    return lab.judge(
        checks={
            "the gradient there is zero": gradient.abs().max().item() < 1e-15,
            "noise passes a chi-square test of 49 degrees at 1 in 1,000": square < 85.4,
        },
        measured={
            "largest gradient": gradient.abs().max().item(),
            "typical probability of a pair": joint.mean().item(),
            "chi-square of the noise": square,
        },
    )


def _pair_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    assert isinstance(model, WordVectorModel)
    word, context, noise = batch
    return negative_sampling_loss(model.input(word), model.output(context), model.output(noise)).mean()


def _factorized(lab: Lab, power: float, seed: int) -> Float[Tensor, "words words"]:
    """All scores after training on pairs drawn from the known table, noise from contexts' shares to a power."""
    joint = dense_pairs(seed)
    steps, rows = lab.pick(smoke=20, small=2_000), lab.pick(smoke=64, small=2048)
    noise = joint.sum(0) ** power
    noise = noise / noise.sum()
    model = WordVectors(vocab_size=WORDS, dim=WORDS, negatives=NEGATIVES).build()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        draws = lab.generator(1000 + seed)
        for _ in range(steps):
            pairs = torch.multinomial(joint.flatten(), rows, True, generator=draws)
            against = torch.multinomial(noise, rows * NEGATIVES, True, generator=draws).view(rows, NEGATIVES)
            yield pairs // WORDS, pairs % WORDS, against

    with lab.threads(1):
        fit(
            model, _pair_loss, batches, steps=steps, lr=0.01, seed=seed,
            schedule="linear", warmup=0, min_lr=0, optimizer=train.AdamW(weight_decay=0), clip=None,
        )  # fmt: skip
    with torch.no_grad():
        return (model.input.weight @ model.output.weight.T).double()


def _correlation(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1].item()


@paper.claim(
    "Trained vectors factorize the table of shifted PMI: v . v' follows PMI - log k",
    paper="Equation 4 (the reading of it as a factorization is later); k = 5 to 20 for small data",
    control="the same training with uniform noise, whose optimum is another table",
)
def learns_shifted_pmi(lab: Lab) -> Verdict:
    """Train 50 words of 50 numbers on pairs of a known dense table, noise from the contexts' own shares."""

    def arm(power: float) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            target = pmi(dense_pairs(seed)) - math.log(NEGATIVES)
            scores = _factorized(lab, power, seed)
            distance = float((scores - target).abs().mean())
            return {"mean distance from PMI - log k": distance, "correlation": _correlation(scores, target)}

        return measures

    verdict = lab.compare(
        arms={"own noise": arm(1.0), "uniform noise": arm(0.0)},
        main=Beats("own noise", "uniform noise", on="mean distance from PMI - log k", by_ratio=0.3, lower=True),
        also=[AtLeast("own noise", 0.97, on="correlation"), Beats("own noise", "uniform noise", on="correlation")],
        seeds=3,
        note="A correlation hardly tells the two tables apart (0.996 and 0.982 in an earlier design), because "
        "contexts are nearly equally frequent; the distance does.",
    )
    lab.points("mean distance from PMI - log k", name="scores", title="Distance of 2,500 scores from PMI - log 5")
    return verdict


@paper.claim(
    "Thinning out frequent words trains on fewer words and answers at least as many analogies",
    paper="Table 1: with 1e-5 subsampling NEG-5 takes 14 minutes instead of 38, and has 60% instead of 59%",
    control="as many words left out, but any words",
)
def subsampling_spares_work(lab: Lab) -> Verdict:
    """Train three models over equally many passages: all words, frequent ones thinned, and any ones thinned."""
    epochs, threshold = lab.pick(smoke=1, small=8), 1e-3

    def arm(subsample: float, some: bool) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            corpus = corpus_of(lab, seed)
            counts, tokens, places = corpus.vocabulary.counts, corpus.tokens, corpus.sentences
            kept = float((keep_probability(counts, threshold, "tool")[tokens]).mean())
            if some:
                rows = torch.rand(len(tokens), generator=lab.generator(seed)) < kept
                tokens, places = tokens[rows], places[rows]
            batches = WordContexts(
                tokens, places, counts, window=WINDOW, subsample=subsample, noise=16, rows=16, span=16, seed=seed
            )
            spec = WordVectors(vocab_size=len(counts), dim=DIM, negatives=NEGATIVES)
            model = taught(lab, spec, batches, counts, epochs, 0.025, seed)
            return {
                "analogies right": analogy_accuracy(model.input.weight.detach(), corpus.questions),
                "share of words trained on": kept if some or subsample else 1.0,
            }

        return measures

    verdict = lab.compare(
        arms={"thinned": arm(threshold, False), "any words left out": arm(0.0, True), "all words": arm(0.0, False)},
        main=Beats("thinned", "any words left out", on="analogies right", by=0.05),
        also=[
            Within("thinned", "all words", on="analogies right", by=0.02, lower=False),
            AtMost("thinned", 0.8, on="share of words trained on"),
        ],
        seeds=3,
        note=(
            "The threshold is 1e-3, the published program's own and not the paper's 1e-5, for words are more frequent "
            "here. A first try of 3e-4 thinned the countries' own words as well, and answered 0.43."
        ),
    )
    lab.points("analogies right", name="thinning", title="Analogies right, by the words left out")
    return verdict


@paper.claim(
    "Planted phrases are found, and the discount keeps rare accidents out",
    paper="Section 4, equation 6: delta prevents too many phrases of very infrequent words",
    control="the same threshold without the discount",
)
def finds_phrases(lab: Lab) -> Verdict:
    """Plant 40 phrases in Zipf's words, 6 to 60 times each, and count what the detector joins."""
    rows, words = lab.pick(smoke=400, small=6_000), 4_000

    @cache
    def sentences(seed: int) -> tuple[list[list[str]], set[tuple[str, str]]]:
        draws = lab.generator(seed)
        tokens = torch.multinomial(1 / torch.arange(1, words + 1), rows * 10, True, generator=draws).view(rows, 10)
        written = [[f"w{token}" for token in row] for row in tokens.tolist()]
        phrases = {(f"first{n}", f"second{n}"): int(torch.randint(6, 61, (1,), generator=draws)) for n in range(40)}
        for phrase, count in phrases.items():
            for at in torch.randint(rows, (count,), generator=draws).tolist():
                place = int(torch.randint(len(written[at]) + 1, (1,), generator=draws))
                written[at][place:place] = phrase
        return written, set(phrases)

    def arm(discount: int) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            written, phrases = sentences(seed)
            found = set(Phrases.find(written, discount=discount, threshold=20.0).joined)
            right = len(found & phrases)
            return {"precision": right / max(1, len(found)), "recall": right / len(phrases)}

        return measures

    return lab.compare(
        arms={"discount of 5": arm(5), "no discount": arm(0)},
        main=Beats("discount of 5", "no discount", on="precision", by=0.5),
        also=[AtLeast("discount of 5", 0.9, on="precision"), AtLeast("discount of 5", 0.9, on="recall")],
        seeds=10,
        note=f"{10 * rows:,} words of {words:,} kinds; threshold 20.",
    )


@paper.claim(
    "Neighbours of frequent words agree with gensim's",
    paper="Section 2.2; the published program and gensim train by the same rules",
    kind="parity",
)
def neighbours_agree(lab: Lab) -> Verdict:
    """Train both on the words of tinyshakespeare, one thread, and compare the ten nearest of 100 frequent words."""
    try:
        from gensim.models import Word2Vec
    except ImportError:
        return Verdict(status="not run", note="needs gensim, which is installed for the tests only")
    text = load_text("tinyshakespeare", download=True).text.lower()
    lines = ["".join(c if c.isalpha() or c == "'" else " " for c in line).split() for line in text.split("\n\n")]
    vocabulary = WordVocabulary.of(lines, min_count=5)
    tokens, places = vocabulary.encode(lines)
    epochs, count = lab.pick(smoke=1, small=16), 100
    if lab.scale == "smoke":
        tokens, places, lines = tokens[:5_000], places[:5_000], lines[:200]
    batches = WordContexts(
        tokens, places, vocabulary.counts, window=WINDOW, subsample=1e-3, noise=16, rows=32, span=16, seed=lab.seed
    )
    spec = WordVectors(vocab_size=len(vocabulary), dim=DIM, negatives=NEGATIVES)
    model = taught(lab, spec, batches, vocabulary.counts, epochs, 0.025, lab.seed)
    theirs = []
    for seed in (1, 2):
        peer = Word2Vec(vector_size=DIM, window=WINDOW, min_count=1, workers=1, sg=1, negative=NEGATIVES, sample=1e-3,
                        seed=seed)  # fmt: skip
        peer.build_vocab_from_freq(dict(zip(vocabulary.words, vocabulary.counts, strict=True)))
        peer.train(lines, total_words=len(tokens), epochs=epochs, start_alpha=0.025, end_alpha=0.0001)
        theirs.append(torch.stack([torch.from_numpy(peer.wv[word].copy()) for word in vocabulary.words]))
    asked = torch.arange(20, 20 + count)  # beyond the very first, which are near to everything
    overlap = _overlap(model.input.weight.detach(), theirs[0], asked)
    itself = _overlap(theirs[0], theirs[1], asked)
    return lab.judge(
        checks={"as many of the ten nearest as two runs of gensim have in common, to 0.05": overlap >= itself - 0.05},
        measured={"overlap with gensim": overlap, "gensim's with itself, another seed": itself,
                  "words": len(vocabulary), "passages": epochs},
        note=(
            "What two runs of gensim with other seeds have in common is as much as can be asked. A first try made 8 "
            "passages: 0.48 with gensim, and gensim with itself 0.54."
        ),
    )  # fmt: skip


def _overlap(one: Tensor, other: Tensor, asked: Tensor) -> float:
    """The mean share of the ten nearest words that two tables have in common."""
    near = []
    for table in (one, other):
        unit = nn.functional.normalize(table, dim=-1)
        cosines = (unit[asked] @ unit.T).scatter(1, asked[:, None], -torch.inf)
        near.append(cosines.topk(10).indices)
    return (near[0][:, :, None] == near[1][:, None]).any(-1).float().mean().item()
