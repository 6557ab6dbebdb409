"""Phrases against gensim's, and against the equation."""

import random

import pytest

from paperworks.data.text.phrases import Phrases


def corpus(seed=0, sentences=600):
    draws = random.Random(seed)
    written = []
    for _ in range(sentences):
        sentence = [f"w{int(draws.paretovariate(0.9)) % 40}" for _ in range(draws.randint(3, 9))]
        if draws.random() < 0.3:
            at = draws.randrange(len(sentence))
            sentence[at:at] = draws.choice((["new", "york"], ["ice", "cream", "cone"], ["new", "shoes"]))
        written.append(sentence)
    return written


@pytest.mark.parity
@pytest.mark.parametrize(("discount", "threshold"), [(5, 10.0), (5, 1.0), (2, 3.0)])
def test_phrases_and_scores_equal_gensims(discount, threshold):
    from gensim.models.phrases import Phrases as Peer

    sentences = corpus()
    peer = Peer(sentences, min_count=discount, threshold=threshold, delimiter="_")
    # gensim's size of the vocabulary counts the pairs it has seen as words too
    words = {word for sentence in sentences for word in sentence}
    factor = len(words) / len(peer.vocab)
    ours = Phrases.find(sentences, discount=discount, threshold=threshold * factor)
    theirs = {tuple(pair.split("_")): score * factor for pair, score in peer.find_phrases(sentences).items()}
    assert ours.joined.keys() >= theirs.keys()  # find_phrases names only those that were not part of another
    assert all(ours.joined[pair] == pytest.approx(score) for pair, score in theirs.items())
    assert [ours.join(sentence) for sentence in sentences] == [peer[sentence] for sentence in sentences]


def test_the_score_is_the_papers_times_the_vocabulary():
    sentences = [["a", "b"]] * 8 + [["a", "c"]] * 2 + [["c"]] * 4
    found = Phrases.find(sentences, discount=2, threshold=0.0)
    assert found.joined[("a", "b")] == pytest.approx((8 - 2) / (10 * 8) * 3)
    assert ("a", "c") not in found.joined  # its count is the discount: a score of 0 is not above 0


def test_a_second_pass_makes_longer_phrases_and_no_word_is_in_two():
    sentences = [["ice", "cream", "cone"]] * 20 + [[f"x{n}"] for n in range(60)]
    first = Phrases.find(sentences, discount=1, threshold=2.5)
    once = [first.join(sentence) for sentence in sentences]
    assert once[0] == ["ice_cream", "cone"]
    second = Phrases.find(once, discount=1, threshold=2.0)
    assert second.join(once[0]) == ["ice_cream_cone"]
    assert first.join([]) == []


def test_without_the_discount_any_two_rare_neighbours_are_a_phrase():
    sentences = [["once", "only"]] + [["common", "words"]] * 50 + [[f"x{n}", f"y{n}"] for n in range(30)]
    assert ("once", "only") in Phrases.find(sentences, discount=0, threshold=10.0).joined
    assert ("once", "only") not in Phrases.find(sentences, discount=1, threshold=10.0).joined


@pytest.mark.parametrize("wrong", [{"discount": -1}, {"threshold": -0.1}])
def test_negative_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="0 or more"):
        Phrases.find([["a", "b"]], **wrong)
