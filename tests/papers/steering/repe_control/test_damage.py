import warnings

import pytest
import torch
from torch import nn

from paperworks.papers.steering.repe_control.damage import Damage, SteeringDamage, damage, perplexity_of


class Bigram(nn.Module):
    """Logits of the next token from the last one only, with known probabilities."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[0.9, 0.09, 0.01], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]]).log())

    def forward(self, tokens):
        return self.table[tokens]


def test_perplexity_is_the_inverse_of_the_mean_probability_in_the_logarithm():
    model = Bigram()
    found = perplexity_of(model, [[0], [2, 1]], [[1, 0], [2]])
    # 0 -> 1: 0.09, 1 -> 0: 0.5; 1 -> 2: 0.1. Three tokens in all.
    assert abs(found - (0.09 * 0.5 * 0.1) ** (-1 / 3)) < 1e-4
    assert abs(perplexity_of(model, [[0]], [[0, 0, 0]]) - 1 / 0.9) < 1e-4


def test_an_empty_continuation_counts_for_nothing():
    model = Bigram()
    assert perplexity_of(model, [[0], [1]], [[1], []]) == perplexity_of(model, [[0]], [[1]])


def test_outputs_of_other_libraries_are_read_too():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Foreign(Bigram):
        def forward(self, tokens):
            return Output(super().forward(tokens))

    assert perplexity_of(Foreign(), [[0]], [[1]]) == perplexity_of(Bigram(), [[0]], [[1]])


def test_destroyed_text_is_warned_of_with_its_perplexity():
    model = Bigram()
    with pytest.warns(SteeringDamage, match="perplexity is 100"):
        found = damage(model, [[0]], steered=[[2]], unsteered=[[0]])
    assert isinstance(found, Damage)
    assert abs(found.ratio - 90) < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        damage(model, [[0]], steered=[[1]], unsteered=[[0]], most=20)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="its prompt"):
        perplexity_of(Bigram(), [[0]], [])
    with pytest.raises(ValueError, match="empty"):
        perplexity_of(Bigram(), [[]], [[1]])
    with pytest.raises(ValueError, match="nothing was written"):
        perplexity_of(Bigram(), [[0]], [[]])
