"""The learning-rate finder on problems whose stable limit is known, and the model as it was."""

import math

import pytest
import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.train.batches import Source
from paperworks.train.streams import Streams

from .small import classifier, examples, mean_loss, same_bits, weights

PLAIN = train.Settings(optimizer=train.SGD(), clip=None)


class Quadratic(nn.Module):
    """sum of curvature / 2 * w^2, whose gradient descent is stable for rates below 2 / curvature."""

    def __init__(self, *curvatures: float) -> None:
        super().__init__()
        self.register_buffer("curvatures", torch.tensor(curvatures, dtype=torch.float64))
        self.w = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.curvatures / 2 * self.w.square()).sum()


@pytest.mark.parametrize("curvature", [0.3, 4.0, 50.0])
def test_the_limit_on_a_quadratic_is_two_over_its_curvature(curvature: float) -> None:
    steps = 200
    sweep = train.find_lr(Quadratic(curvature), lambda model, _: model(), [0], PLAIN, low=1e-4, high=100.0, steps=steps)
    factor = (100.0 / 1e-4) ** (1 / (steps - 1))
    # the loss falls until the first rate above 2 / curvature; the median looks five steps around each
    assert 2 / curvature / factor**6 < sweep.limit < 2 / curvature * factor**6
    assert sweep.suggestion <= sweep.limit / 2
    assert sweep.losses[sweep.rates.index(sweep.suggestion)] < 1.01 * sweep.losses[0]
    assert len(sweep.rates) == len(sweep.losses) < steps  # it ended when the loss exploded


def test_training_at_the_suggestion_learns_and_above_twice_the_limit_diverges() -> None:
    sweep = train.find_lr(Quadratic(1.0, 3.0, 10.0), lambda model, _: model(), [0], PLAIN, low=1e-4, high=100.0)
    ends = []
    for rate in (sweep.suggestion, 2 * sweep.limit):
        settings = train.Settings(steps=60, lr=rate, schedule="constant", warmup=0, optimizer=train.SGD(), clip=None)
        ends.append(train.fit(Quadratic(1.0, 3.0, 10.0), lambda model, _: model(), [0], settings).losses)
    assert ends[0][-1] < 0.5 * ends[0][0]
    assert ends[1][-1] > 10 * ends[1][0]


def test_rates_rise_by_equal_factors_from_low_to_high() -> None:
    sweep = train.find_lr(Quadratic(1e-6), lambda model, _: model(), [0], PLAIN, low=1e-3, high=10.0, steps=21)
    assert sweep.rates == pytest.approx([1e-3 * 10 ** (0.2 * k) for k in range(21)], rel=1e-12)
    assert sweep.limit == sweep.rates[-1]  # not reached


def test_model_generators_gradients_and_modes_are_restored_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    model[0].weight.grad = torch.full((8, 4), 7.0)
    objects = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    before = weights(model)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train.find_lr(model, mean_loss, examples(), steps=20)
    assert torch.equal(torch.rand(3), expected)
    assert same_bits(weights(model), before)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == objects
    assert not model.training
    assert torch.equal(model[0].weight.grad, torch.full((8, 4), 7.0))
    assert model[3].weight.grad is None


def test_batches_that_know_their_place_are_put_back_there() -> None:
    streams = Streams(torch.arange(7).repeat(9), batch=2, length=5)
    source = Source(streams, recording=False)
    source.next()
    place = streams.state_dict()["chunk"]
    model = nn.Embedding(7, 7)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return train.next_token_loss(model, batch)

    train.find_lr(model, loss, streams, steps=12)
    assert streams.state_dict()["chunk"] == place == 1


def test_the_planned_optimizer_and_groups_are_swept() -> None:
    frozen = train.Settings(groups=(train.Group("3.*", lr_factor=1e-9),), optimizer=train.Lion())
    plain = train.Settings(optimizer=train.Lion())
    sweeps = [train.find_lr(classifier(), mean_loss, examples(), each, steps=20) for each in (frozen, plain)]
    assert sweeps[0].losses[0] == sweeps[1].losses[0]
    assert sweeps[0].losses[12] != sweeps[1].losses[12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0, "high": 0.1}, r"low is 1\.0 and high is 0\.1; 0 < low < high is needed"),
        ({"high": math.inf}, "high is inf"),
        ({"steps": 5}, "steps is 5; at least 10 are needed"),
        ({"settings": train.Settings(sharded=True)}, "sharded=False"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.find_lr(classifier(), mean_loss, examples(), **options)


def test_a_loss_that_is_not_finite_at_the_start_says_so_and_the_model_is_as_before() -> None:
    model = classifier()
    before = weights(model)
    with pytest.raises(ValueError, match=r"the loss was not finite after 0 steps"):
        train.find_lr(model, lambda model, batch: mean_loss(model, batch) * math.nan, examples())
    assert same_bits(weights(model), before)
