import copy

import pytest
import torch

from paperworks.lab import Lab
from paperworks.papers.adaptation._play import lesson


@pytest.fixture(scope="module")
def play():
    return lesson(Lab("smoke"), steps=3)


def test_the_loss_is_that_of_held_out_windows_drawn_by_the_seed(play):
    assert play.loss(play.model, 0) == play.loss(play.model, 0)
    assert play.loss(play.model, 0) != play.loss(play.model, 1)


def test_what_is_held_out_is_not_trained_on(play):
    shown, held_out = play.shown.unfold(0, 64, 1), play.held_out[:64]
    assert not (shown == held_out).all(1).any()
    assert len(play.shown) > 8 * len(play.held_out)


def test_teaching_a_copy_leaves_the_model_as_it_was_and_lowers_the_loss_on_what_is_taught(play):
    before = copy.deepcopy(play.model.state_dict())
    pupil = copy.deepcopy(play.model)
    losses = play.teach(pupil, 0, lr=1e-2)
    assert len(losses) == play.steps
    assert all(torch.equal(value, play.model.state_dict()[name]) for name, value in before.items())
    assert play.loss(pupil, 0) < play.loss(play.model, 0)
