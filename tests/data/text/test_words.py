"""Words and their rare class."""

import math

import pytest
import torch

from paperworks.data.text.words import Vocabulary, split_words


def test_words_marks_and_line_ends_are_tokens():
    assert split_words("Who's there?\n\nNay -- answer me.") == [
        "Who's", "there", "?", "\n", "\n", "Nay", "-", "-", "answer", "me", ".",
    ]  # fmt: skip


def test_rare_words_share_one_class_whose_probability_is_shared_equally():
    words = ["a", "a", "a", "b", "b", "c", "d", "e", "a", "b"]
    vocabulary = Vocabulary.of(words, 2)
    assert (vocabulary.size, vocabulary.rare) == (3, {"c", "d", "e"})
    ids = vocabulary.encode(["a", "b", "c", "e", "unheard"])
    assert ids.tolist() == [1, 2, 0, 0, 0]
    assert vocabulary.known(["a", "c", "unheard"]).tolist() == [True, True, False]
    y = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)  # of the class, a, b
    everything = ["a", "b", "c", "d", "e"]
    classes = vocabulary.encode(everything)
    found = vocabulary.of_words(y[classes].log(), classes).exp()
    assert abs(float(found.sum()) - 1) < 1e-15
    assert torch.allclose(found[2:], torch.tensor(0.1, dtype=torch.float64))
    assert math.isclose(float(found[0]), 0.5)


@pytest.mark.parametrize(("least", "which"), [(1, "rare"), (9, "frequent")])
def test_a_threshold_that_leaves_nothing_is_refused(least, which):
    with pytest.raises(ValueError, match=f"no word of 2 is {which}"):
        Vocabulary.of(["a", "b", "b"], least)
