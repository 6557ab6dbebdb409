"""Gradients clipped number by number."""

import pytest
import torch

from paperworks import train
from paperworks.train.optim.clipping import clipped_by_value
from tests.train.small import classifier, examples, mean_loss, same_bits, weights


def test_every_number_is_clipped_by_itself_and_before_the_step():
    model = torch.nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    gradient = torch.tensor([[7.0, -0.5, -9.0]])

    def loss(model, batch):
        return (model.weight * gradient).sum()

    settings = train.Settings(steps=1, lr=1.0, schedule="constant", warmup=0, weight_decay=0.0, clip=None)
    sgd = clipped_by_value(lambda groups: torch.optim.SGD(groups), 2.0)
    train.fit(model, loss, [torch.zeros(1)], settings, optimizer=sgd)
    assert torch.allclose(before - model.weight, torch.tensor([[2.0, -0.5, -2.0]]))


def test_a_limit_that_nothing_reaches_changes_nothing():
    found = []
    for limit in (1e6, None, 1e-3):
        make = lambda groups: torch.optim.RMSprop(groups, lr=1e-2)  # noqa: E731
        model = classifier()
        settings = train.Settings(steps=5, clip=None)
        optimizer = make if limit is None else clipped_by_value(make, limit)
        train.fit(model, mean_loss, examples(), settings, optimizer=optimizer)
        found.append(weights(model))
    assert same_bits(found[0], found[1])
    assert not same_bits(found[2], found[1])


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="limit must be above 0, got 0"):
        clipped_by_value(torch.optim.SGD, 0.0)
