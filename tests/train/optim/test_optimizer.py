"""Optimizers as values: JSON, ranges, and the torch optimizers that they build."""

import json

import pytest
import torch
from torch import nn

from paperworks import train
from paperworks.core.spec import Spec
from tests.train.small import classifier, examples, mean_loss, same_bits, weights

EVERY = [
    train.AdamW(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2),
    train.Adam(betas=(0.8, 0.95), eps=1e-6),
    train.SGD(momentum=0.9, nesterov=True, weight_decay=0.2),
    train.RMSprop(alpha=0.9, momentum=0.5),
    train.RMSPropGraves(decay=0.9),
    train.Lion(betas=(0.8, 0.95), weight_decay=0.2),
    train.PagedAdamW(budget=2**20, page=64),
    train.ClipByValue(optimizer=train.RMSprop(), limit=5.0),
]


@pytest.mark.parametrize("optimizer", EVERY, ids=lambda each: type(each).__name__)
def test_an_optimizer_round_trips_through_json(optimizer: train.OptimizerSpec) -> None:
    assert Spec.from_dict(json.loads(json.dumps(optimizer.to_dict()))) == optimizer


@pytest.mark.parametrize(
    ("optimizer", "builds"),
    [
        (EVERY[0], lambda g: torch.optim.AdamW(g, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2, fused=True)),
        (EVERY[1], lambda g: torch.optim.Adam(g, betas=(0.8, 0.95), eps=1e-6, fused=True)),
        (EVERY[2], lambda g: torch.optim.SGD(g, momentum=0.9, nesterov=True, weight_decay=0.2)),
        (EVERY[3], lambda g: torch.optim.RMSprop(g, alpha=0.9, momentum=0.5)),
    ],
    ids=["AdamW", "Adam", "SGD", "RMSprop"],
)
def test_an_optimizer_takes_the_steps_of_torchs(optimizer: train.OptimizerSpec, builds: object) -> None:
    found = []
    for each in (optimizer, builds):
        model = classifier()
        train.fit(model, mean_loss, examples(), train.Settings(steps=7, lr=0.01, optimizer=each))  # type: ignore[arg-type]
        found.append(weights(model))
    assert same_bits(*found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train.AdamW(betas=(0.9, 1.0)), r"AdamW\.betas is \(0\.9, 1\.0\); it must be in \[0, 1\)"),
        (lambda: train.AdamW(betas=(0.9,)), r"AdamW\.betas must be a tuple"),
        (lambda: train.AdamW(eps=-1.0), r"AdamW\.eps is -1\.0; it must be 0 or more"),
        (lambda: train.AdamW(weight_decay=float("nan")), r"AdamW\.weight_decay is nan"),
        (lambda: train.SGD(momentum=1.5), r"SGD\.momentum is 1\.5"),
        (lambda: train.SGD(nesterov=True), r"SGD\.nesterov is True; it must be False where momentum is 0"),
        (lambda: train.RMSprop(alpha=-0.1), r"RMSprop\.alpha is -0\.1"),
    ],
)
def test_a_field_out_of_its_range_is_named_with_its_value(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_an_update_rule_written_in_a_few_lines_trains_and_has_groups_and_rates() -> None:
    class SignDescent(train.UpdateRule):
        state = ()

        def update(self, weight, gradient, state, lr, weight_decay):
            weight.sub_(lr * gradient.sign())

    model = nn.Linear(4, 3)
    before = weights(model)
    groups = (train.Group("bias", lr_factor=0.5),)
    settings = train.Settings(
        steps=1, lr=0.25, warmup=0, schedule="constant", optimizer=SignDescent(), groups=groups, clip=None
    )
    train.fit(model, mean_loss, examples(), settings)
    moved = {name: (tensor - before[name]).abs() for name, tensor in weights(model).items()}
    # steps of 1/4 and 1/8 are exact but for the sum, which is rounded at values below 1
    torch.testing.assert_close(moved["weight"], torch.full((3, 4), 0.25), rtol=0, atol=1e-6)
    torch.testing.assert_close(moved["bias"], torch.full((3,), 0.125), rtol=0, atol=1e-6)
