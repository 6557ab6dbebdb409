"""Why word2vec needs its negative samples, and what its windows weigh: the derivation, checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from paperworks.data.text.word_contexts import WordContexts
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.models.classic.word_vectors import (
    WordVectors,
    analogy_accuracy,
    negative_sampling_loss,
    word_vector_loss,
)
from paperworks.testbeds.word_vectors import DIM, NEGATIVES, WINDOW, Planted, corpus_of, taught

paper = Paper(
    key="word2vec-explained",
    title="word2vec Explained: deriving Mikolov et al.'s negative-sampling word-embedding method",
    authors="Goldberg, Levy",
    year=2014,
    ref="arXiv:1402.3722",
    family="tokens",
    summary=(
        "Skip-gram asks whether a pair was observed. Asked of observed pairs only, the best answer is always yes, and "
        "all vectors become one; the sampled pairs are what keeps them apart. It is no model of p(context | word)."
    ),
    implements=(
        "paperworks.models.classic.word_vectors.negative_sampling_loss",
        "paperworks.models.classic.word_vectors.pair_scores_loss",
        "paperworks.data.text.word_contexts.WordContexts",
    ),
    equation=r"\sum_{(w,c) \in D} \log \sigma(v_c \cdot v_w) + \sum_{(w,c) \in D'} \log \sigma(-v_c \cdot v_w)",
    usage="""
import torch
from paperworks.models.classic.word_vectors import negative_sampling_loss

word, context = torch.randn(2, 100, 16).unbind()
noise = torch.randn(100, 5, 16)  # five sampled contexts for each observed pair
print("of random vectors:", float(negative_sampling_loss(word, context, noise).mean()))
same = torch.full((100, 16), (40 / 16) ** 0.5)
print("equal vectors, observed pairs only:", float(negative_sampling_loss(same, same, noise[:, :0]).mean()))
""",
)


@paper.claim(
    "The sum over observed and over sampled pairs is word2vec's objective, with the same gradients",
    paper="Section 2: sum over D of log s(v_c . v_w) plus sum over D' of log s(-v_c . v_w)",
    kind="exact",
)
def both_forms_are_one(lab: Lab) -> Verdict:
    """Write D and D' as one list of labelled pairs, by autograd, beside the pairwise and the block form, in float64."""
    draws = lab.generator(lab.seed)
    words, pairs, near = 12, 20, 3
    spec = WordVectors(vocab_size=words, dim=5, negatives=NEGATIVES)
    model = spec.build().double()
    with torch.no_grad():
        for table in (model.input, model.output):
            table.weight.copy_(torch.randn(words, 5, generator=draws, dtype=torch.float64))
    tokens = torch.randint(words, (pairs,), generator=draws)
    batches = WordContexts(
        tokens, torch.zeros_like(tokens), [1] * words, window=near, noise=NEGATIVES, rows=1, span=pairs, seed=lab.seed
    )
    batch = next(iter(batches))
    row, noise = batch["words"][0], batch["noise"][0]
    places = batch["near"][0].nonzero()
    word, context = row[places[:, 0] + near], row[places[:, 1]]
    counted = noise != context[:, None]  # as the program leaves out what equals the context
    against = noise.expand(len(word), -1)
    pairwise = negative_sampling_loss(model.input(word), model.output(context), model.output(against), counted).sum()
    # the paper's form: one list D of observed pairs, one list D' of others
    others = torch.stack((word[:, None].expand_as(against)[counted], against[counted]), 1)
    labelled = torch.cat((torch.stack((word, context), 1), others))
    signs = torch.cat((torch.ones(len(word)), -torch.ones(len(others)))).double()
    scores = (model.input.weight[labelled[:, 0]] * model.output.weight[labelled[:, 1]]).sum(-1)
    listed = -torch.log(1 / (1 + torch.exp(-signs * scores))).sum()
    forms = {"pairwise": pairwise, "block": word_vector_loss(model, batch), "listed": listed}
    gradients = {name: torch.autograd.grad(loss, list(model.parameters())) for name, loss in forms.items()}
    apart = max(
        (one - other).abs().max().item()
        for name in ("pairwise", "block")
        for one, other in zip(gradients[name], gradients["listed"], strict=True)
    )
    return lab.judge(
        checks={
            "gradients are equal to 1e-12": apart < 1e-12,
            "and so are the values": max(abs((loss - listed).item()) for loss in forms.values()) < 1e-11,
        },
        measured={"largest difference of a gradient": apart, "pairs observed": len(word), "sampled": len(others)},
    )


@paper.claim(
    "A window of random reach weighs a context at distance d by (C - d + 1) / C",
    paper="Section 3.1: dynamic window size; e.g. 1, 4/5, 3/5, 2/5, 1/5 for a window of 5",
    kind="exact",
)
def windows_weigh_distance(lab: Lab) -> Verdict:
    """Count contexts by distance in one passage over a long row of words."""
    count = lab.pick(smoke=2_000, small=400_000)
    tokens = torch.zeros(count, dtype=torch.int64)
    batches = WordContexts(tokens, tokens, [count], window=WINDOW, rows=64, span=16, seed=lab.seed)
    seen = torch.zeros(2 * WINDOW + 1, dtype=torch.float64)
    for batch in batches:
        for centre in range(16):
            seen += batch["near"][:, centre, centre : centre + 2 * WINDOW + 1].sum(0)
    shares = ((seen[WINDOW + 1 :] + seen[:WINDOW].flip(0)) / (2 * count)).tolist()
    expected = [(WINDOW - distance + 1) / WINDOW for distance in range(1, WINDOW + 1)]
    apart = max(abs(share - weight) for share, weight in zip(shares, expected, strict=True))
    # five standard deviations of a share counted `count` times, and the few words at the two ends
    return lab.judge(
        checks={"every share is as derived": apart < 5 * 0.5 / count**0.5 + 2 * WINDOW / count},
        measured={"shares by distance": shares, "derived": expected},
    )


@paper.claim(
    "Without sampled pairs all vectors become one and every pair looks observed; with them they stay apart",
    paper="Section 2: with all vectors equal and v . v = K, K about 40, the objective is at its best",
    control="no sampled pairs; the same steps and rates",
)
def collapses_without_negatives(lab: Lab) -> Verdict:
    """Train skip-gram on the planted relations with five negative samples and without."""
    epochs = lab.pick(smoke=1, small=12)

    def arm(negatives: int) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            corpus = corpus_of(lab, seed)
            counts = corpus.vocabulary.counts
            words = len(counts)
            spec = WordVectors(vocab_size=words, dim=DIM, negatives=negatives)
            batches = WordContexts(
                corpus.tokens, corpus.sentences, counts, window=WINDOW, noise=16, rows=16, span=16, seed=seed
            )
            model = taught(lab, spec, batches, counts, epochs, 0.025, seed)
            vectors, contexts = model.input.weight.detach(), model.output.weight.detach()
            unit = functional.normalize(vectors, dim=-1)
            cosines = (unit @ unit.T)[torch.triu(torch.ones(words, words, dtype=torch.bool), 1)]
            return {
                "probability of an observed pair": _observed(vectors, contexts, corpus),
                "mean cosine of two words": cosines.mean().item(),
                "least cosine of two words": cosines.min().item(),
                "analogies right": analogy_accuracy(vectors, corpus.questions),
            }

        return measures

    same = torch.full((1, DIM), (40 / DIM) ** 0.5, dtype=torch.float64)
    verdict = lab.compare(
        arms={"five negatives": arm(NEGATIVES), "observed pairs only": arm(0)},
        main=Beats("five negatives", "observed pairs only", on="mean cosine of two words", by=0.6, lower=True),
        also=[
            AtMost("five negatives", 0.3, on="mean cosine of two words"),
            AtLeast("five negatives", 0.5, on="analogies right"),
            AtLeast("observed pairs only", 0.999, on="probability of an observed pair"),
            AtLeast("observed pairs only", 0.95, on="mean cosine of two words"),
            AtLeast("observed pairs only", 0.95, on="least cosine of two words"),
        ],
        seeds=3,
        measured={"loss a pair at v . v = 40": -functional.logsigmoid((same * same).sum()).item()},
        note=f"{epochs} passages. A pairwise cosine of all words may mean their mean or every pair, so both are "
        "checked. Once every pair looks observed the gradient is gone, and rare words, which it moved least, stay "
        "where "
        "they are: their cosines are what keeps the least one low.",
    )
    lab.points("mean cosine of two words", name="cosines", title="Mean cosine of all pairs of words")
    return verdict


def _observed(vectors: Tensor, contexts: Tensor, corpus: Planted) -> float:
    """Return the mean of sigmoid(v_c . v_w) over neighbouring words of the corpus."""
    beside = corpus.sentences[1:] == corpus.sentences[:-1]
    first, second = corpus.tokens[:-1][beside], corpus.tokens[1:][beside]
    return torch.sigmoid((vectors[first] * contexts[second]).sum(-1)).mean().item()
