"""What a transformation reached of a model's weights."""

import warnings

import pytest
import torch
from torch import nn

from paperworks.core.coverage import CoverageWarning, coverage_of, warn_of_gaps


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 4, 5))


def model():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "experts": Stack(),
            "norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 10, bias=False),
        }
    )


def test_each_weight_is_counted_once_by_what_it_is():
    found = coverage_of(model(), ["head", "experts.up"])
    assert found.left_out == {
        "embeddings": 40,
        "matrices held directly": 48,  # the fused input projection, 12 x 4
        "norms and biases": 12 + 4 + 8,
        "linear layers": 16,
    }
    assert found.reached == 40 + 60
    assert found.weights == sum(parameter.numel() for parameter in model().parameters())
    assert found.paths["matrices held directly"] == ("attention.in_proj_weight",)
    assert found.share == pytest.approx(100 / found.weights)
    assert "43.9% of 228 weights reached; left out: matrices held directly 21.1% (attention.in_proj_weight)" in str(
        found
    )


def test_only_matrices_that_are_no_layers_are_warned_of():
    with pytest.warns(
        CoverageWarning, match=r"it reaches 18% .* leaves out 47% in stacked experts \(experts.up\); matrices .*; go"
    ):
        warn_of_gaps(coverage_of(model(), ["head"]), "it", "go")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_gaps(coverage_of(model(), ["head", "experts", "attention"]), "it", "go")
