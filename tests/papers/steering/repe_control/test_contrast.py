import pytest
import torch

from paperworks import interpret
from paperworks.papers.steering.repe_control.contrast import add_at_end, contrast_vectors
from tests.interpret.test_taps import model as fixture

POSITIVE, NEGATIVE, TEXT = [1, 2, 3], [4, 5], [6, 7, 8, 9]


def test_the_vectors_are_the_difference_of_two_runs_at_the_shared_tokens():
    model = fixture.__wrapped__()
    found = contrast_vectors(model, POSITIVE + TEXT, NEGATIVE + TEXT, 4, ["blocks.0", "blocks.1"])
    states = []
    for prompt in (POSITIVE, NEGATIVE):
        with interpret.record(model, "blocks.1") as seen:
            model(torch.tensor([prompt + TEXT]))
        states.append(seen["blocks.1"][0, -4:])
    assert torch.equal(found["blocks.1"], states[0] - states[1])
    assert set(found) == {"blocks.0", "blocks.1"}


def test_equal_instructions_have_no_contrast_and_strength_zero_does_nothing():
    model = fixture.__wrapped__()
    same = contrast_vectors(model, POSITIVE + TEXT, POSITIVE + TEXT, 4, ["blocks.0"])
    assert not same["blocks.0"].any()
    vectors = contrast_vectors(model, POSITIVE + TEXT, NEGATIVE + TEXT, 4, ["blocks.0"])
    tokens = torch.tensor([TEXT])
    before = model(tokens)
    with add_at_end(model, vectors, 0.0):
        assert torch.allclose(model(tokens), before)
    assert torch.equal(model(tokens), before)


def test_the_vectors_are_added_at_the_last_tokens_only():
    model = fixture.__wrapped__()
    vectors = contrast_vectors(model, POSITIVE + TEXT, NEGATIVE + TEXT, 2, ["blocks.0"])
    tokens = torch.tensor([TEXT])
    with interpret.record(model, "blocks.0") as plain:
        model(tokens)
    with add_at_end(model, vectors, 2.0), interpret.record(model, "blocks.0") as moved:
        model(tokens)
    assert torch.equal(moved["blocks.0"][:, :2], plain["blocks.0"][:, :2])
    added = moved["blocks.0"][0, 2:] - plain["blocks.0"][0, 2:]
    assert torch.allclose(added, 2.0 * vectors["blocks.0"], atol=1e-5)


def test_with_all_layers_below_in_place_the_positive_run_is_reproduced():
    # One layer's whole contrast, added once to the negative run, gives the positive run from there on: positions aside,
    # what the last layer says at the last token depends on that layer's state alone.
    model = fixture.__wrapped__()
    last = max(path for path in dict(model.named_modules()) if path in ("blocks.0", "blocks.1", "blocks.2"))
    vectors = contrast_vectors(model, POSITIVE + TEXT, NEGATIVE + TEXT, 1, [last])
    with add_at_end(model, vectors):
        steered = model(torch.tensor([NEGATIVE + TEXT]))[0, -1]
    assert torch.allclose(steered, model(torch.tensor([POSITIVE + TEXT]))[0, -1], atol=1e-4)


def test_bad_input_is_refused():
    model = fixture.__wrapped__()
    with pytest.raises(ValueError, match="same text"):
        contrast_vectors(model, [1, 2, 3], [1, 2, 4], 2, ["blocks.0"])
    with pytest.raises(ValueError, match="1 to 3"):
        contrast_vectors(model, [1, 2, 3], [1, 2, 3], 4, ["blocks.0"])
    vectors = contrast_vectors(model, POSITIVE + TEXT, NEGATIVE + TEXT, 4, ["blocks.0"])
    with add_at_end(model, vectors), pytest.raises(ValueError, match="sees 2 tokens"):
        model(torch.tensor([[1, 2]]))
