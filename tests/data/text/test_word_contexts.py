"""Windows of a corpus, subsampling and noise: counted against what the papers say they are."""

import math

import pytest
import torch

from paperworks.data.text.word_contexts import NoiseWords, WordContexts, WordVocabulary, keep_probability
from paperworks.testbeds.relations import RelationCorpus, question_ids

SENTENCES = [["a", "b", "c", "a"], ["b", "a"], ["c"], ["a", "rare", "b"]]


def pairs(batches, window):
    """Return all (centre, context) pairs as ids, in order of centres."""
    found = []
    for batch in batches:
        for words, near in zip(batch["words"], batch["near"], strict=True):
            for i, row in enumerate(near):
                found += [(int(words[i + window]), int(words[j])) for j in row.nonzero()[:, 0].tolist()]
    return found


def test_a_vocabulary_is_ordered_by_count_and_drops_what_is_rare():
    vocabulary = WordVocabulary.of(SENTENCES, min_count=2)
    assert vocabulary.words == ("a", "b", "c")
    assert vocabulary.counts == (4, 3, 2)
    tokens, places = vocabulary.encode(SENTENCES)
    assert tokens.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1]
    assert places.tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3]  # "rare" is gone before windows are formed


@pytest.mark.parametrize(("rows", "span"), [(1, 1), (2, 3), (4, 16)])
def test_full_windows_give_every_pair_of_a_sentence_once_whatever_the_block(rows, span):
    vocabulary = WordVocabulary.of(SENTENCES, min_count=2)
    tokens, places = vocabulary.encode(SENTENCES)
    naive = [
        (int(tokens[i]), int(tokens[j]))
        for i in range(len(tokens))
        for j in range(len(tokens))
        if i != j and abs(i - j) <= 2 and places[i] == places[j]
    ]
    batches = WordContexts(tokens, places, vocabulary.counts, window=2, shrink=False, rows=rows, span=span)
    assert len(list(batches)) == len(batches)
    assert sorted(pairs(batches, 2)) == sorted(naive)


def test_a_word_at_distance_d_is_a_context_with_probability_c_minus_d_plus_1_over_c():
    count, window = 40_000, 4
    batches = WordContexts(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64), [count],
                           window=window, rows=8, span=16)  # fmt: skip
    seen = torch.zeros(2 * window + 1)
    for batch in batches:
        for i in range(16):
            seen += batch["near"][:, i, i : i + 2 * window + 1].sum(0)
    for distance in range(1, window + 1):
        expected = (window - distance + 1) / window
        spread = math.sqrt(expected * (1 - expected) / count)
        for side in (-1, 1):
            assert abs(seen[window + side * distance] / count - expected) <= 5 * spread + 5 / count
    assert seen[window] == 0  # no word is its own context


def test_subsampling_keeps_the_expected_count_of_each_word_and_comes_before_windows():
    counts = (30_000, 6_000, 300)
    tokens = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    batches = WordContexts(tokens, torch.zeros_like(tokens), counts, window=1, shrink=False, subsample=1e-2,
                           form="paper", rows=4, span=64)  # fmt: skip
    kept = torch.zeros(3)
    for batch in batches:
        real = batch["near"].any(-1)
        kept += torch.bincount(batch["words"][:, 1:-1][real], minlength=3)
    for number, count in enumerate(counts):
        share = min(1.0, math.sqrt(1e-2 / (count / sum(counts))))
        assert abs(kept[number] - share * count) <= 5 * math.sqrt(count * share * (1 - share)) + 1
    assert len(pairs(batches, 1)) == 2 * int(kept.sum()) - 2  # what is left stands side by side


def test_the_forms_of_subsampling():
    counts = (900, 90, 10)
    share = torch.tensor([0.9, 0.09, 0.01], dtype=torch.float64)
    paper, tool = keep_probability(counts, 0.04), keep_probability(counts, 0.04, "tool")
    torch.testing.assert_close(paper, (0.04 / share).sqrt().clamp(max=1))
    torch.testing.assert_close(tool, ((share / 0.04).sqrt().add(1) * 0.04 / share).clamp(max=1))
    assert keep_probability(counts, 0).tolist() == [1, 1, 1]


def test_noise_follows_counts_to_the_power_of_three_quarters():
    counts, draws = [1000, 300, 100, 30, 10, 1], 200_000
    drawn = torch.bincount(NoiseWords(counts).draw((draws,), torch.Generator().manual_seed(1)), minlength=6).double()
    weights = torch.tensor(counts, dtype=torch.float64) ** 0.75
    expected = draws * weights / weights.sum()
    assert ((drawn - expected) ** 2 / expected).sum() < 20.5  # chi-square of 5 degrees: passed by chance 1 time in 1000


def test_an_epoch_can_be_drawn_again_and_the_next_one_is_another():
    tokens = torch.randint(9, (300,))
    batches = WordContexts(tokens, torch.zeros_like(tokens), [1] * 9, noise=4, rows=2, span=8, subsample=0.05)
    first, again = list(batches), list(batches)
    batches.set_epoch(1)
    other = list(batches)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    assert not all(torch.equal(a["near"], b["near"]) for a, b in zip(first, other, strict=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"noise": -1}, "noise must be at least 0"),
        ({"counts": [1]}, "outside the 1 counts"),
        ({"tokens": torch.tensor([0])}, "one length"),
        ({"subsample": -1.0}, "0 or more"),
        ({"subsample": 0.1, "form": "both"}, "unknown form"),
        ({"counts": [0, 1], "noise": 2}, "every one positive"),
    ],
)
def test_what_makes_no_windows_is_refused(change, message):
    right = {"tokens": torch.tensor([0, 1]), "sentences": torch.tensor([0, 0]), "counts": [1, 1]}
    with pytest.raises(ValueError, match=message):
        WordContexts(**(right | change))


def test_an_empty_vocabulary_or_corpus_is_refused():
    with pytest.raises(ValueError, match="lower min_count"):
        WordVocabulary.of(SENTENCES, min_count=9)
    with pytest.raises(ValueError, match="no contexts"):
        WordContexts(torch.tensor([0]), torch.tensor([0]), [1])


def test_planted_relations_are_in_every_sentence_and_can_be_asked():
    corpus = RelationCorpus(countries=3, sentences=60)
    sentences = corpus.draw(0)
    assert len(sentences) == 60
    grid = {corpus.word(c, f): (c, f) for c in range(3) for f in range(3)}
    for sentence in sentences:
        assert len(sentence) == corpus.length
        (subject,) = [word for word in sentence if word in grid]
        country, form = grid[subject]
        assert all(word.split("_")[0] == f"topic{country}" for word in sentence if word.startswith("topic"))
        assert all(word.split("_")[0] == f"usage{form}" for word in sentence if word.startswith("usage"))
    questions = corpus.questions()
    assert len(set(questions)) == 6 * 6
    assert ("name0", "capital0", "name1", "capital1") in questions
    vocabulary = WordVocabulary.of(sentences, 1)
    assert question_ids(questions, vocabulary.index).shape == (36, 4)
    assert corpus.draw(0) == sentences
    with pytest.raises(ValueError, match="none of 36"):
        question_ids(questions, {})
    with pytest.raises(ValueError, match="two countries"):
        RelationCorpus(countries=1)
