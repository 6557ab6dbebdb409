"""Span corruption: nothing is lost for good, and the shares are the paper's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.data.tasks.span_corruption import corrupt_spans, random_spans, restored


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(2, 200), st.floats(0.05, 0.9), st.floats(1.0, 8.0), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_source_and_target_together_are_the_text(length, share, mean_span, seed):
    tokens = torch.randint(2, 50, (length,), generator=draws(seed))
    lost = random_spans(length, share=share, mean_span=mean_span, generator=draws(seed))
    source, target = corrupt_spans(tokens, lost, first_sentinel=999, end=None)
    assert restored(source, target, 999) == tokens.tolist()
    assert 0 < int(lost.sum()) < length
    assert not lost[0]  # the first stretch is kept
    spans = int((lost & ~torch.nn.functional.pad(lost[:-1], (1, 0))).sum())
    assert (source > 900).sum() == spans
    assert target[-1] == 999 - spans
    assert len(source) == length - int(lost.sum()) + spans


def test_fifteen_percent_are_lost_in_spans_of_three():
    lost = torch.stack([random_spans(512, generator=draws(seed)) for seed in range(50)])
    begins = lost & ~torch.nn.functional.pad(lost[:, :-1], (1, 0))
    assert lost.float().mean().item() == pytest.approx(0.15, abs=1e-3)
    assert (lost.sum() / begins.sum()).item() == pytest.approx(3.0, abs=0.05)
    assert len({tuple(row.tolist()) for row in lost}) == 50


def test_the_papers_figure():
    """Thank you <X> me to your party <Y> week. -> <X> for inviting <Y> last <Z>"""
    words = torch.tensor([10, 11, 12, 13, 14, 15, 16, 17, 18, 19])  # Thank you for inviting me to your party last week
    lost = torch.zeros(10, dtype=torch.bool)
    lost[2:4] = lost[8] = True
    source, target = corrupt_spans(words, lost, first_sentinel=99)
    assert source.tolist() == [10, 11, 99, 14, 15, 16, 17, 98, 19, 1]
    assert target.tolist() == [99, 12, 13, 98, 18, 97, 1]


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(ValueError, match="at least 2 are needed"):
        random_spans(1)
    with pytest.raises(ValueError, match="share must be in"):
        random_spans(10, share=1.0)
    with pytest.raises(ValueError, match="must be of one length"):
        corrupt_spans(torch.zeros(3).long(), torch.zeros(2).bool(), first_sentinel=9)
    with pytest.raises(ValueError, match="2 sentinels from 50 down reach the largest token, 49"):
        corrupt_spans(torch.tensor([49, 3]), torch.tensor([False, True]), first_sentinel=50)
