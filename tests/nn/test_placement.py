import pytest
import torch

from paperworks.nn import Attention, Cache, Placement
from paperworks.nn.placement import places_in_segments
from paperworks.nn.position.paired import TargetPlacement

CPU = torch.device("cpu")


def cache(batch: int = 2, capacity: int = 8) -> Cache:
    mixer = Attention(heads=2).build(8)
    return Cache([mixer.new_cache(batch, capacity, torch.float32, CPU)], capacity)  # type: ignore[operator]


def test_by_default_tokens_stand_at_0_1_2():
    here = Placement().resolve(2, 5, CPU)
    assert here.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert here.default_positions
    assert here.begins() is None


def test_positions_begin_again_with_each_segment():
    here = Placement(segments=torch.tensor([[1, 1, 2, 2, 2], [1, 2, 3, 0, 0]])).resolve(2, 5, CPU)
    assert here.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 0, 1]]
    assert here.begins().tolist() == [[True, False, True, False, False], [True, True, True, True, False]]


def test_a_segment_that_comes_again_later_is_another_run():
    assert places_in_segments(torch.tensor([[1, 1, 2, 1, 1]])).tolist() == [[0, 1, 0, 0, 1]]


def test_tokens_go_on_where_the_cache_ended():
    held = cache()
    Placement(cache=held).resolve(2, 3, CPU)
    here = Placement(cache=held).resolve(2, 2, CPU)
    assert (here.start, here.time, here.horizon, held.length) == (3, 2, 8, 5)
    assert here.positions.tolist() == [[3, 4]]


def test_tokens_go_on_after_positions_of_their_own():
    held = cache()
    Placement(cache=held, positions=torch.tensor([[5, 9]])).resolve(2, 2, CPU)
    assert Placement(cache=held).resolve(2, 2, CPU).positions.tolist() == [[10, 11], [10, 11]]


def test_tokens_belong_to_the_segment_that_the_cache_ended_with():
    held = cache()
    Placement(cache=held, segments=torch.tensor([[1, 1, 2], [1, 1, 1]])).resolve(2, 3, CPU)
    here = Placement(cache=held).resolve(2, 1, CPU)
    assert here.segments.tolist() == [[2], [1]]
    assert here.positions.tolist() == [[1], [3]]


def test_a_full_cache_is_refused_and_stays_as_it_was():
    held = cache(capacity=4)
    Placement(cache=held).resolve(2, 3, CPU)
    with pytest.raises(ValueError, match=r"holds 4 tokens and 3 are in it.*capacity=5"):
        Placement(cache=held).resolve(2, 2, CPU)
    assert held.length == 3


@pytest.mark.parametrize("name", ["positions", "segments"])
def test_a_wrong_shape_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} must have shape \(2, 5\).*got \(2, 4\)"):
        Placement(**{name: torch.zeros(2, 4, dtype=torch.int64)}).resolve(2, 5, CPU)


def test_segments_of_a_context_need_its_shape():
    with pytest.raises(ValueError, match=r"context_segments \(1, 3\).*context \(1, 4, 8\)"):
        Placement(context=torch.zeros(1, 4, 8), context_segments=torch.ones(1, 3, dtype=torch.int64)).resolve(1, 2, CPU)


def test_resolving_leaves_what_the_caller_holds_as_it_was():
    given = Placement(segments=torch.tensor([[1, 1, 2]]))
    given.resolve(4, 3, CPU)
    assert given.positions is None
    assert given.segments.shape == (1, 3)


def test_parts_of_a_call_share_memo_and_see_their_own_cache():
    here = Placement(cache=cache()).resolve(2, 3, CPU)
    inside = here.at(here.cache.layers[0])
    inside.memo["mask"] = 1
    assert here.memo == {"mask": 1}
    assert inside.cache is here.cache.layers[0]
    assert here.at(here.cache) is here


def test_a_batch_describes_the_placement_whose_fields_it_has():
    assert Placement.from_batch({"tokens": torch.zeros(1, 3), "segments": None}) is None
    plain = Placement.from_batch({"segments": torch.ones(1, 3)})
    assert type(plain) is Placement
    asked = Placement.from_batch({"positions": torch.zeros(1, 3), "target_positions": torch.ones(1, 3)})
    assert type(asked) is TargetPlacement


def test_a_cut_cache_counts_on_from_the_cut():
    held = cache()
    Placement(cache=held, positions=torch.tensor([[5, 6, 7]])).resolve(2, 3, CPU)
    held.truncate(1)
    assert Placement(cache=held).resolve(2, 1, CPU).positions.tolist() == [[6], [6]]
    with pytest.raises(ValueError, match="holds 2 tokens and cannot be cut to 3"):
        held.truncate(3)


def test_reordered_rows_take_their_segments_and_positions_along():
    held = cache()
    segments, positions = torch.tensor([[1, 1], [1, 2]]), torch.tensor([[0, 1], [7, 8]])
    Placement(cache=held, segments=segments, positions=positions).resolve(2, 2, CPU)
    held.reorder(torch.tensor([1, 1, 0]))
    here = Placement(cache=held).resolve(3, 1, CPU)
    assert here.segments.tolist() == [[2], [2], [1]]
