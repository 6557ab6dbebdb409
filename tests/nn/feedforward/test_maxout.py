"""Maxout units against their definition."""

import pytest
import torch

from paperworks.nn.feedforward.maxout import Maxout


def test_a_unit_is_the_largest_of_its_pieces_and_only_that_one_learns():
    torch.manual_seed(0)
    built = Maxout(pieces=3).build(4).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    found = built(x)
    weight, bias = built.linear.weight, built.linear.bias
    for unit in range(4):
        pieces = torch.stack([x @ weight[3 * unit + piece] + bias[3 * unit + piece] for piece in range(3)])
        assert (found[..., unit] - pieces.max(0).values).abs().max() < 1e-14
    found[0, 0, 0].backward()
    winner = (x[0, 0] @ weight[:3].T + bias[:3]).argmax()
    assert (weight.grad[winner] - x[0, 0]).abs().max() < 1e-14
    assert weight.grad.abs().sum() == weight.grad[winner].abs().sum()


def test_one_piece_has_no_maximum():
    with pytest.raises(ValueError, match="must be at least 2, got 1"):
        Maxout(pieces=1)
