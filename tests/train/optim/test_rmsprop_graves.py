"""The optimizer of Graves 2013 against its equations, number by number."""

import math
from pathlib import Path

import pytest
import torch

from paperworks import train
from tests.train.small import classifier, examples, mean_loss, same_bits, weights


def test_steps_are_those_of_the_equations():
    weight = torch.nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
    optimizer = train.RMSPropGraves().build([{"params": [weight], "lr": 1e-4}])
    w, n, m, v = [0.3, -0.7], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for step in range(20):
        gradient = [math.sin(3 * step) + 0.2, 0.01 * step]
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            n[i] = 0.95 * n[i] + 0.05 * g**2
            m[i] = 0.95 * m[i] + 0.05 * g
            v[i] = 0.9 * v[i] - 1e-4 * g / math.sqrt(n[i] - m[i] ** 2 + 1e-4)
            w[i] += v[i]
        assert (weight - torch.tensor(w, dtype=torch.float64)).abs().max() < 1e-14


def test_a_gradient_that_never_changes_keeps_steps_finite():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = train.RMSPropGraves().build([{"params": [weight], "lr": 1e-4}])
    for _ in range(2000):
        weight.grad = torch.full((1,), 1e3)
        optimizer.step()
    assert torch.isfinite(weight).all()
    assert weight.item() < 0


def test_a_run_with_it_resumes_bit_for_bit(tmp_path: Path):
    settings = train.Settings(steps=8, lr=1e-2, save_every=3, optimizer=train.RMSPropGraves())

    def run(folder, seed, stop=None):
        model = classifier(seed)
        train.fit(
            model, mean_loss, examples(), settings, run_dir=tmp_path / folder, on_step=lambda step: step == stop,
        )  # fmt: skip
        return model

    straight = run("straight", 0)
    run("broken", 0, stop=5)
    assert same_bits(weights(run("broken", 4)), weights(straight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"RMSPropGraves\.decay is 1\.0; it must be in \[0, 1\)"),
        ({"momentum": -0.1}, r"RMSPropGraves\.momentum is -0\.1"),
        ({"eps": 0.0}, r"RMSPropGraves\.eps is 0\.0; it must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train.RMSPropGraves(**options)
