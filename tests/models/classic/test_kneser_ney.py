"""Kneser-Ney against its definition, read off the text again for every probability; and mixtures of models."""

import pytest
import torch

from paperworks.models.classic.kneser_ney import KneserNey
from paperworks.models.surgery.interpolation import interpolated, mixture_weights


def text(length=300, words=9):
    draws = torch.Generator().manual_seed(3)
    shares = 1.0 / torch.arange(1, words + 1)
    return torch.multinomial(shares, length, replacement=True, generator=draws).tolist()


def naive(tokens, vocab, order, word, history):
    """Recursion and counts as written, nothing kept."""

    def ngrams(size):
        return [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]

    def count(size, gram):
        if size == order:
            return sum(each == gram for each in ngrams(size))
        return len({each for each in ngrams(size + 1) if each[1:] == gram})

    def discount(size):
        kinds = set(ngrams(size))
        counts = [count(size, gram) for gram in kinds]
        once, twice = counts.count(1), counts.count(2)
        return once / (once + 2 * twice) if once else 0.5

    def p(size, history):
        if size == 0:
            return 1 / vocab
        here = history[len(history) - size + 1 :]
        all_counts = [count(size, (*here, each)) for each in range(vocab)]
        lower = p(size - 1, history)
        if sum(all_counts) == 0:
            return lower
        rest = discount(size) * sum(each > 0 for each in all_counts)
        return (max(all_counts[word] - discount(size), 0) + rest * lower) / sum(all_counts)

    return p(min(order, len(history) + 1), tuple(history))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_the_definition(order):
    tokens = text(60, 6)
    model = KneserNey(tokens, 7, order)
    for at in range(len(tokens) - 8, len(tokens)):
        history = tokens[max(0, at - order + 1) : at]
        assert abs(model.probability(tokens[at], history) - naive(tokens, 7, order, tokens[at], history)) < 1e-14
    for history in ([], [6], [6, 0], [0, 6]):  # a word never seen, far back and near
        history = history[-(order - 1) :] if order > 1 else []
        assert abs(model.probability(6, history) - naive(tokens, 7, order, 6, history)) < 1e-14


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_history(order):
    tokens = text()
    model = KneserNey(tokens, 12, order)  # three words that were never seen
    for history in ([], [0], [11], [4, 11, 2], tokens[40:44], tokens[100:110], [9, 10, 11, 9]):
        assert abs(sum(model.probability(word, history) for word in range(12)) - 1) < 1e-12
        assert min(model.probability(word, history) for word in range(12)) > 0


def test_a_word_seen_after_one_word_only_is_less_likely_elsewhere_than_its_count_says():
    """The idea of the paper, San Francisco: `5` is frequent but only follows `4`, `3` follows everything."""
    tokens = []
    for other in (0, 1, 2, 0, 1, 2):
        tokens += [other, 3, 4, 5, 4, 5]
    model = KneserNey(tokens, 7, 2)
    assert tokens.count(5) > tokens.count(3)
    assert model.probability(5, [6]) < model.probability(3, [6])
    assert model.probability(5, [4]) > 0.5


def test_a_text_is_scored_from_its_second_word_on():
    tokens = text()
    model = KneserNey(tokens[:250], 9, 3)
    found = model.log_probabilities(tokens[250:])
    expected = [model.probability(tokens[at], tokens[250:at]) for at in range(251, 300)]
    assert (found - torch.tensor(expected, dtype=torch.float64).log()).abs().max() < 1e-12


def test_a_text_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        KneserNey([0, 1], 2, 0)
    with pytest.raises(ValueError, match="a text of 2 tokens holds no 3-gram"):
        KneserNey([0, 1], 2, 3)
    with pytest.raises(ValueError, match="token id 5 is outside the vocabulary of 3"):
        KneserNey([0, 5], 3, 2)


def logs(seed, rows=400):
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log()


def test_mixtures_average_probabilities_and_their_weights_are_the_best():
    one, other = logs(0), logs(1) - 0.3
    found = mixture_weights([one, other])
    assert abs(sum(found) - 1) < 1e-12
    assert (
        interpolated([one, other], found) - (found[0] * one.exp() + found[1] * other.exp()).log()
    ).abs().max() < 1e-12
    best = float(interpolated([one, other], found).sum())
    for moved in (0.02, -0.02):
        assert float(interpolated([one, other], [found[0] + moved, found[1] - moved]).sum()) < best
    assert best >= max(float(one.sum()), float(other.sum()))
    assert mixture_weights([one, one - 5.0])[0] > 0.999
    assert torch.equal(interpolated([one, other], [1.0, 0.0]), one)


def test_mixtures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 models and 1 weights"):
        interpolated([logs(0), logs(1)], [1.0])
    with pytest.raises(ValueError, match="shares that sum to 1"):
        interpolated([logs(0), logs(1)], [0.7, 0.7])
    with pytest.raises(ValueError, match=r"different numbers of tokens: \[3, 400\]"):
        mixture_weights([logs(0), logs(1, 3)])
    with pytest.raises(ValueError, match="no model to mix"):
        mixture_weights([])
