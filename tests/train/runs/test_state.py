from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paperworks import train
from paperworks.core.errors import CorruptFile
from paperworks.train.batches import Source
from paperworks.train.runs.state import State
from paperworks.train.step_log import Diverged

from ..small import classifier, examples, mean_loss, same_bits, weights


def state_of(model: nn.Module, optimizer: train.AdamW | train.SGD | None = None, **settings: Any) -> State:
    chosen = optimizer or train.AdamW()
    built = chosen.build([{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.0}])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return State(model, built, scaler, Source(examples(), recording=True), train.Settings(steps=10, **settings))


def step(state: State) -> None:
    state.optimizer.zero_grad()
    mean_loss(state.model, examples()[state.step % 6]).backward()
    state.optimizer.step()
    state.step += 1
    state.counted += 5


def test_what_was_saved_is_restored_bit_for_bit_and_goes_on_alike(tmp_path: Path) -> None:
    first = state_of(classifier())
    step(first)
    step(first)
    first.save(tmp_path, seconds=1.5)
    other = state_of(classifier(seed=7))
    other.resume(tmp_path)
    assert (other.step, other.seconds, other.counted) == (2, 1.5, 10)
    assert same_bits(weights(first.model), weights(other.model))
    step(first)
    step(other)
    assert same_bits(weights(first.model), weights(other.model))


def test_the_optimizers_state_keeps_the_layout_of_its_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight = nn.Parameter(torch.randn(4, 3).t())  # columns in order
    first = state_of(model)
    step(first)
    first.save(tmp_path, seconds=0.0)
    again = nn.Sequential(nn.Linear(4, 3))
    again[0].weight = nn.Parameter(torch.randn(4, 3).t())
    other = state_of(again)
    other.resume(tmp_path)
    for kept, restored in zip(first.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert {name: value.stride() for name, value in kept.items()} == {
            name: value.stride() for name, value in restored.items()
        }


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    state = state_of(classifier())
    with torch.no_grad():
        next(state.model.parameters())[0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"after step 0 the weight 0\.weight is not finite; it was not saved"):
        state.save(tmp_path / "run", seconds=0.0)
    assert not (tmp_path / "run").exists()


def test_every_difference_of_two_runs_is_named(tmp_path: Path) -> None:
    state_of(classifier()).save(tmp_path, seconds=0.0)
    other = state_of(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 3)), train.SGD(), seed=5)
    with pytest.raises(ValueError, match="differs from the one saved") as refused:
        other.resume(tmp_path)
    told = str(refused.value)
    for part in ("seed", "0.weight", "optimizer: was", "train in another run_dir"):
        assert part in told


def test_a_state_without_an_entry_is_a_corrupt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(classifier())
    state.save(tmp_path, seconds=0.0)
    monkeypatch.setattr("paperworks.train.runs.checkpoint.read_state", lambda folder: {"settings": {}})
    with pytest.raises(CorruptFile, match="does not hold what a checkpoint must"):
        state.resume(tmp_path)
