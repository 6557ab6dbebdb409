import math

import pytest
import torch

from paperworks.nn import Placement
from paperworks.nn.attention.mask import Mask, mask_of

CPU = torch.device("cpu")


def mask(queries: int = 5, keys: int | None = None, **fields: object) -> Mask:
    return Mask(queries=queries, keys=queries if keys is None else keys, device=CPU, **fields)  # type: ignore[arg-type]


def by_pairs(found: Mask, row: int = 0) -> list[list[bool]]:
    """What is seen, pair by pair, from what the fields say."""
    places = found.places().tolist()
    seen = []
    for i in range(found.queries):
        at, line = found.start + i, []
        for j, place in enumerate(places):
            shown = not found.causal or place <= at
            if found.window is not None:
                shown = shown and place > at - found.window and (found.causal or place < at + found.window)
            if found.segments is not None:
                shown = shown and found.segments[row, i] == found.key_segments[row, j]
            line.append(bool(shown))
        seen.append(line)
    return seen


SEGMENTS = torch.tensor([[1, 1, 2, 2, 0], [3, 3, 3, 4, 4]])
CASES = {
    "causal": mask(causal=True),
    "a window": mask(causal=True, window=2),
    "a window both ways": mask(window=2),
    "documents": mask(causal=True, segments=SEGMENTS, key_segments=SEGMENTS),
    "documents read both ways": mask(segments=SEGMENTS, key_segments=SEGMENTS),
    "after a cache": mask(2, 5, start=3, causal=True),
    "slots of a rolled cache": mask(1, 3, start=7, causal=True, window=3, order=torch.tensor([6, 7, 5])),
}


@pytest.mark.parametrize("name", CASES)
def test_the_dense_mask_is_what_the_fields_say(name):
    found = CASES[name]
    rows = 1 if found.segments is None else len(found.segments)
    for row in range(rows):
        assert found.visible().expand(rows, 1, -1, -1)[row, 0].tolist() == by_pairs(found, row)


def test_nothing_hidden_is_no_tensor():
    assert mask(3, 7).visible() is None
    assert mask(3, 7).dense() is None


def test_a_bias_is_minus_infinity_where_nothing_is_seen():
    bias = torch.arange(25.0).view(1, 1, 5, 5)
    dense = mask(causal=True, bias=bias).dense()
    assert torch.equal(dense.isinf()[0, 0], torch.ones(5, 5, dtype=torch.bool).triu(1))
    assert torch.equal(dense[0, 0].tril().nan_to_num(neginf=0), bias[0, 0].tril())
    assert dense[0, 0, 0, 1] == -math.inf


def test_tensors_are_made_once_and_kept_by_the_biased_mask():
    plain = mask(causal=True)
    visible = plain.visible()
    assert plain.visible() is visible
    assert plain.biased(torch.zeros(5, 5)).visible() is visible


def test_only_a_square_from_the_first_token_is_plain_causal():
    assert mask(causal=True).is_plain_causal
    assert mask(causal=True, window=5).is_plain_causal
    assert not mask(causal=True, window=4).is_plain_causal
    assert not mask(2, 5, start=3, causal=True).is_plain_causal
    assert not mask(causal=True, bias=torch.zeros(5, 5)).is_plain_causal


def test_edges_are_where_documents_begin_in_rows_laid_end_to_end():
    assert CASES["documents"].edges(2).tolist() == [0, 2, 4, 5, 8, 10]
    torn = torch.tensor([[1, 2, 1, 1, 1]])
    assert mask(causal=True, segments=torn, key_segments=torn).edges(1) is None


def test_layers_that_are_alike_share_one_mask():
    here = Placement().resolve(1, 4, CPU)
    assert mask_of(here, None, True, None) is mask_of(here, None, True, None)
    assert mask_of(here, None, True, None) is not mask_of(here, None, True, 2)


def test_one_new_token_sees_all_there_is():
    here = Placement().resolve(1, 1, CPU)
    assert mask_of(here, None, True, None).hides_nothing
