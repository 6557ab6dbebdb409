"""Gradients clipped number by number."""

import pytest
import torch

from paperworks import train
from tests.train.small import classifier, examples, mean_loss, same_bits, weights


def test_every_number_is_clipped_by_itself_and_before_the_step():
    model = torch.nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    gradient = torch.tensor([[7.0, -0.5, -9.0]])

    def loss(model, batch):
        return (model.weight * gradient).sum()

    clipped = train.ClipByValue(optimizer=train.SGD(), limit=2.0)
    settings = train.Settings(steps=1, lr=1.0, schedule="constant", warmup=0, optimizer=clipped, clip=None)
    train.fit(model, loss, [torch.zeros(1)], settings)
    assert torch.allclose(before - model.weight, torch.tensor([[2.0, -0.5, -2.0]]))


def test_a_limit_that_nothing_reaches_changes_nothing():
    found = []
    for limit in (1e6, None, 1e-3):
        plain = train.RMSprop()
        model = classifier()
        optimizer = plain if limit is None else train.ClipByValue(optimizer=plain, limit=limit)
        train.fit(model, mean_loss, examples(), train.Settings(steps=5, lr=1e-2, optimizer=optimizer, clip=None))
        found.append(weights(model))
    assert same_bits(found[0], found[1])
    assert not same_bits(found[2], found[1])


def test_weight_decay_is_that_of_the_wrapped_optimizer():
    settings = train.Settings(optimizer=train.ClipByValue(optimizer=train.AdamW(weight_decay=0.3), limit=1.0))
    assert [group["weight_decay"] for group in train.parameter_groups(classifier(), settings)] == [0.3, 0.0]


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"ClipByValue\.limit is 0\.0; it must be above 0"):
        train.ClipByValue(optimizer=train.SGD(), limit=0.0)
