"""Documents of repeated pairs: what is asked, and that maps are fresh, shared, or of few keys."""

import pytest
import torch

from paperworks.testbeds.recall import IGNORED, RepeatedPairs


def draw(task: RepeatedPairs, rows: int = 50, seed: int = 0) -> dict[str, torch.Tensor]:
    return task.draw(rows, torch.Generator().manual_seed(seed))


def test_each_value_is_asked_for_at_its_key_and_a_row_has_one_map() -> None:
    batch = draw(RepeatedPairs(keys=5, values=7, pairs=12))
    keys, values = batch["tokens"][:, ::2], batch["tokens"][:, 1::2]
    assert int(keys.max()) < 5 <= int(values.min())
    assert int(values.max()) < 12
    assert torch.equal(batch["targets"][:, ::2], values)
    assert (batch["targets"][:, 1::2] == IGNORED).all()
    for row in range(50):
        found = {}
        for key, value in zip(keys[row].tolist(), values[row].tolist(), strict=True):
            assert found.setdefault(key, value) == value


def test_rows_have_maps_of_their_own_or_share_one() -> None:
    fresh, shared = draw(RepeatedPairs(pairs=300)), draw(RepeatedPairs(pairs=300, one_map=3))
    again = draw(RepeatedPairs(pairs=300, one_map=3), seed=9)

    def value_of(batch: dict[str, torch.Tensor], row: int, key: int) -> int:
        place = int((batch["tokens"][row, ::2] == key).int().argmax())
        return int(batch["tokens"][row, 2 * place + 1])

    assert len({value_of(fresh, row, 2) for row in range(50)}) > 5
    assert len({value_of(shared, row, 2) for row in range(50)} | {value_of(again, row, 2) for row in range(50)}) == 1


def test_fewest_draws_rows_of_few_keys_and_of_all() -> None:
    batch = draw(RepeatedPairs(keys=8, pairs=80, fewest=2), rows=200)
    used = {len(set(row.tolist())) for row in batch["tokens"][:, ::2]}
    assert min(used) == 2
    assert max(used) == 8
    assert set(batch["tokens"][:, ::2].flatten().tolist()) == set(range(8))
    with pytest.raises(ValueError, match="fewest must be between 1 and the 8 keys"):
        RepeatedPairs(keys=8, fewest=9)
