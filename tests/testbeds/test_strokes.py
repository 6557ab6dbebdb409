"""Digits as pen strokes."""

import pytest
import torch

from paperworks.testbeds.strokes import FONT, Hand, Strokes

STEADY = Hand(haste=0.0, slant=0.0, stretch=0.0, shake=0.0)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_steady_hand_walks_the_font_in_even_strides_and_lifts_at_the_end_of_each_stroke():
    for digit in range(10):
        strokes = STEADY.write([[digit]], draws())
        offsets = strokes.offsets[0]
        assert offsets[:, 2].sum() == len(FONT[digit])
        assert offsets[-1, 2] == 1
        assert offsets[0].abs().sum() == 0
        points = offsets[:, :2].cumsum(0) * STEADY.stride + torch.tensor(FONT[digit][0][0])
        ends = (offsets[:, 2] == 1).nonzero()[:, 0].tolist()
        begins = [0, *(end + 1 for end in ends[:-1])]
        for stroke, begin, end in zip(FONT[digit], begins, ends, strict=True):
            assert (points[begin] - torch.tensor(stroke[0])).abs().max() < 1e-5
            assert (points[end] - torch.tensor(stroke[-1])).abs().max() < 1e-5
        inside = torch.ones(len(offsets), dtype=torch.bool)
        inside[begins] = False
        assert offsets[inside, :2].norm(dim=1).max() < 1.3  # a chord is at most the way along the line


def test_rows_of_several_digits_stand_side_by_side_and_are_padded():
    strokes = STEADY.write([[1, 7], [8]], draws())
    assert strokes.text.tolist() == [[1, 7], [8, 0]]
    assert strokes.lengths.tolist() == [2, 1]
    assert strokes.real.sum(1).tolist() == [len(STEADY.write([row], draws()).offsets[0]) for row in ([1, 7], [8])]
    assert not strokes.real.all()
    assert not strokes.offsets[~strokes.real].any()
    x = strokes.offsets[0, :, 0].cumsum(0) * STEADY.stride
    first_lift = int(strokes.offsets[0, :, 2].argmax())
    assert abs(float(x[first_lift + 1]) - (1.6 + 0.05 - 0.2)) < 1e-5  # from where the 1 begins to where the 7 does


def test_hands_differ_and_a_seed_gives_the_same_writing():
    one, again, other = (Hand().draw(4, (2, 5), draws(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.batch(), again.batch(), strict=True))
    assert one.offsets.shape != other.offsets.shape or not torch.equal(one.offsets, other.offsets)
    assert isinstance(one, Strokes)
    assert int(one.lengths.min()) >= 2
    assert int(one.lengths.max()) <= 5
    spread = Hand().draw(200, (4, 4), draws()).offsets
    assert 0.5 < float(spread[..., :2][spread[..., :2].abs().sum(-1) > 0].std()) < 2.0  # offsets are normalised


def test_a_tablet_that_misses_points_joins_offsets_and_keeps_the_ends_of_strokes():
    whole = STEADY.write([[digit] for digit in range(10)] * 20, draws())
    some = Hand(haste=0.0, slant=0.0, stretch=0.0, shake=0.0, missed=0.3).write([[d] for d in range(10)] * 20, draws())
    ends = sum(2 * len(strokes) for strokes in FONT) * 20
    share = 1 - (int(some.real.sum()) - ends) / (int(whole.real.sum()) - ends)
    assert abs(share - 0.3) < 0.05  # 1,400 points inside
    assert (whole.offsets.sum(1) - some.offsets.sum(1)).abs().max() < 1e-4


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match=r"digits from 0 to 9, got \[3, 10\]"):
        Hand().write([[3, 10]], draws())
    with pytest.raises(ValueError, match=r"digits from 0 to 9, got \[\]"):
        Hand().write([[]], draws())
    with pytest.raises(ValueError, match="no row to write"):
        Hand().write([], draws())
    with pytest.raises(ValueError, match="stride must be above 0"):
        Hand(stride=0.0)
    with pytest.raises(ValueError, match="missed is a share"):
        Hand(missed=1.0)
    with pytest.raises(ValueError, match="shake is a deviation"):
        Hand(shake=-1.0)
