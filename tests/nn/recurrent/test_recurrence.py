"""The parts of recurrent mixers against plain loops: the token before, the convolution, the recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from paperworks.nn import Placement
from paperworks.nn.recurrent.recurrence import (
    CausalConvolution,
    StateCache,
    before,
    doubling_recurrence,
    linear_recurrence,
    state_of,
)


def loop(decay, drive, initial):
    states, state = [], initial
    for step in range(decay.shape[1]):
        state = decay[:, step] * state + drive[:, step]
        states.append(state)
    return torch.stack(states, 1)


def arguments(time=11, dtype=torch.float64, shape=(3, 2)):
    torch.manual_seed(time)
    decay = torch.randn(2, time, *shape, dtype=dtype) * 0.7
    drive, initial = torch.randn(2, time, *shape, dtype=dtype), torch.randn(2, *shape, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (decay, drive, initial)]


@pytest.mark.parametrize("function", [linear_recurrence, doubling_recurrence])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("time", [1, 2, 11, 16])
def test_a_recurrence_and_its_gradients_equal_the_loop(function, dtype, time):
    ours, theirs = arguments(time, dtype), arguments(time, dtype)
    result, expected = function(*ours), loop(*theirs)
    assert (result - expected).abs().max() < 1e-12
    weights = torch.randn_like(expected)
    (result * weights).sum().abs().backward()
    (expected * weights).sum().abs().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad - other.grad).abs().max() < 1e-11


def test_a_recurrence_without_a_past_starts_at_zero_and_refuses_unequal_shapes():
    decay, drive, _ = arguments()
    assert torch.equal(linear_recurrence(decay, drive)[:, 0], drive[:, 0])
    with pytest.raises(ValueError, match="must have one shape"):
        linear_recurrence(decay, drive[:, :-1])


def test_a_recurrence_leaves_its_arguments_as_they_were():
    decay, drive, initial = (tensor.detach().clone() for tensor in arguments())
    kept = [tensor.clone() for tensor in (decay, drive, initial)]
    linear_recurrence(decay, drive, initial)
    assert all(torch.equal(one, other) for one, other in zip((decay, drive, initial), kept, strict=True))


def test_a_convolution_is_torchs():
    ours = CausalConvolution(6, 4)
    theirs = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 6)
    out, window = ours(x)
    assert (out - theirs(x.transpose(1, 2))[..., :9].transpose(1, 2)).abs().max() < 1e-6
    assert torch.equal(window, x[:, -3:])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_segments_and_chunks_are_convolved_as_if_alone(lengths, width, data):
    layer = CausalConvolution(3, width).double()
    documents = [torch.randn(1, length, 3, dtype=torch.float64) for length in lengths]
    apart = torch.cat([layer(document)[0] for document in documents], 1)
    row = torch.cat(documents, 1)
    begins = torch.cat([functional.one_hot(torch.tensor(0), length).bool() for length in lengths])[None]
    assert (layer(row, None, begins)[0] - apart).abs().max() < 1e-12
    cut = data.draw(st.integers(0, row.shape[1]))
    first, window = layer(row[:, :cut], None, begins[:, :cut])
    second, _ = layer(row[:, cut:], window, begins[:, cut:])
    assert (torch.cat((first, second), 1) - apart).abs().max() < 1e-12


def test_the_token_before_is_zero_where_a_segment_begins():
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    begins = torch.tensor([[True, False, True, False, False]])
    assert before(x, None, None).flatten().tolist() == [0, 1, 2, 3, 4]
    assert before(x, torch.tensor([[9.0]]), None).flatten().tolist() == [9, 1, 2, 3, 4]
    assert before(x, torch.tensor([[9.0]]), begins).flatten().tolist() == [0, 1, 0, 3, 4]


def test_a_stream_says_where_segments_begin():
    placement = Placement(segments=torch.tensor([[0, 0, 1, 1, 2]])).resolve(1, 5, torch.device("cpu"))
    assert placement.begins().tolist() == [[True, False, True, False, True]]
    assert Placement().resolve(1, 5, torch.device("cpu")).begins() is None


def test_a_state_cache_keeps_rows_and_no_gradients():
    cache = StateCache(state=torch.arange(6.0).view(3, 2))
    cache.reorder(torch.tensor([2, 0]))
    assert cache["state"].tolist() == [[4, 5], [0, 1]]
    cache["state"] = torch.ones(2, 2, requires_grad=True) * 2
    assert not cache["state"].requires_grad
    assert cache.bytes() == 16


def test_the_cache_of_another_mixer_is_refused():
    from paperworks.nn.attention.attention import KeyValueCache

    placement = Placement().resolve(1, 2, torch.device("cpu"))
    assert state_of(placement) is None
    other = KeyValueCache(1, 1, 4, 2, False, torch.float32, torch.device("cpu"))
    with pytest.raises(TypeError, match="given a KeyValueCache"):
        state_of(placement.at(other))
