import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from paperworks.train.batches import Source
from paperworks.train.runs import randomness

NUMBERS = TensorDataset(torch.arange(10))


class Augmented(Dataset):
    """Adds noise from every global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


class Stateful:
    """Counts up to 7, knows its place."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < 7:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "noise": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["noise"], torch.ones(2))
        self.at = state["at"]


def shuffled_by_epoch(epoch: int) -> Iterator[int]:
    yield from np.random.default_rng(epoch).permutation(6).tolist()


def drawn_as_it_goes(epoch: int) -> Iterator[torch.Tensor]:
    order = torch.randperm(5)
    for index in order:
        yield index + torch.rand(2)


KINDS = {
    "list": lambda: list(range(5)),
    "tuple": lambda: tuple(range(5)),
    "range": lambda: range(4),
    "function": lambda: shuffled_by_epoch,
    "function that draws": lambda: drawn_as_it_goes,
    "stateful": Stateful,
    "loader": lambda: DataLoader(NUMBERS, batch_size=3),
    "shuffling loader": lambda: DataLoader(NUMBERS, batch_size=3, shuffle=True),
    "shuffling loader with a generator": lambda: DataLoader(
        NUMBERS, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "augmenting loader": lambda: DataLoader(Augmented(), batch_size=2, shuffle=True),
}


def as_text(batch: Any) -> str:
    return str([part.tolist() for part in batch]) if isinstance(batch, list) else str(batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("consumed", [1, 4, 5, 9])
def test_a_restored_place_goes_on_with_the_same_batches_and_the_same_draws(kind: str, consumed: int) -> None:
    def draw() -> str:
        return f"{random.random()} {np.random.rand()} {torch.rand(1).item()}"  # what a model with dropout would draw

    randomness.seed(7)
    source = Source(KINDS[kind](), recording=True)
    for _ in range(consumed):
        source.next()
        draw()
    place, generators = source.state(), randomness.to_json(randomness.capture())
    expected = [(as_text(source.next()), source.epoch, source.position, draw()) for _ in range(12)]

    randomness.seed(99)
    again = Source(KINDS[kind](), recording=True)
    again.restore(place)
    randomness.restore(randomness.from_json(generators))
    assert [(as_text(again.next()), again.epoch, again.position, draw()) for _ in range(12)] == expected
    assert expected[-1][1] >= 1  # it went through an epoch's end


def test_workers_are_replayed_too() -> None:
    def loader() -> DataLoader:
        return DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=1, generator=torch.Generator())

    source = Source(loader(), recording=True)
    for _ in range(3):
        source.next()
    place = source.state()
    expected = as_text(source.next())
    again = Source(loader(), recording=True)
    again.restore(place)
    assert as_text(again.next()) == expected


def test_a_restored_place_can_be_saved_and_restored_again() -> None:
    randomness.seed(0)
    source = Source(KINDS["shuffling loader"](), recording=True)
    for _ in range(2):
        source.next()
    middle = Source(KINDS["shuffling loader"](), recording=True)
    middle.restore(source.state())
    middle.next()
    source.next()
    last = Source(KINDS["shuffling loader"](), recording=True)
    last.restore(middle.state())
    assert as_text(last.next()) == as_text(source.next())


def test_samplers_are_told_the_epoch() -> None:
    told = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    source = Source(DataLoader(NUMBERS, batch_size=5, sampler=Sampler(NUMBERS)), recording=False)
    for _ in range(5):
        source.next()
    assert sorted(set(told)) == [0, 1, 2]


def test_empty_batches_are_an_error() -> None:
    with pytest.raises(ValueError, match="epoch 0 yielded nothing"):
        Source([], recording=False).next()


def test_an_epoch_that_turns_empty_is_an_error() -> None:
    source = Source(lambda epoch: [1, 2] if epoch == 0 else [], recording=False)
    source.next(), source.next()
    with pytest.raises(ValueError, match="epoch 1 yielded nothing"):
        source.next()


def test_an_iterator_that_runs_out_says_so() -> None:
    source = Source(iter([1, 2]), recording=False)
    assert source.one_shot
    source.next(), source.next()
    with pytest.raises(ValueError, match="ran out after 2"):
        source.next()


def test_what_cannot_be_gone_through_is_refused() -> None:
    with pytest.raises(TypeError, match="batches is int"):
        Source(3, recording=False)  # type: ignore[arg-type]


def test_fewer_batches_than_were_consumed_are_noticed() -> None:
    source = Source(list(range(5)), recording=True)
    for _ in range(4):
        source.next()
    with pytest.raises(ValueError, match="consumed 4 batches of epoch 0; now it has only 2"):
        Source([0, 1], recording=True).restore(source.state())


def test_another_kind_of_batches_is_noticed() -> None:
    source = Source(Stateful(), recording=True)
    source.next()
    with pytest.raises(ValueError, match="knew their own place"):
        Source([0, 1], recording=True).restore(source.state())


def test_a_generator_more_or_less_is_noticed() -> None:
    source = Source(KINDS["shuffling loader with a generator"](), recording=True)
    source.next()
    with pytest.raises(ValueError, match="drew from 1 generators of their own, these from 0"):
        Source(KINDS["shuffling loader"](), recording=True).restore(source.state())
