import pytest
import torch
from torch import nn

from paperworks import interpret
from paperworks.interpret import ControlVector, control_vector, mean_difference, pca_difference


def pairs(count=40, dim=12):
    torch.manual_seed(2)
    direction = torch.nn.functional.normalize(torch.randn(dim), dim=0)
    shared = torch.randn(count, dim)
    amount = 1 + torch.rand(count, 1)
    return shared + amount * direction + 0.1 * torch.randn(count, dim), shared - amount * direction, direction


@pytest.mark.parametrize("method", [mean_difference, pca_difference])
def test_planted_directions_are_found_with_their_sign(method):
    positive, negative, direction = pairs()
    assert method(positive, negative) @ direction > 0.99
    assert method(negative, positive) @ direction < -0.99
    assert abs(method(positive, negative).norm() - 1) < 1e-6


def test_pca_is_the_top_eigenvector_of_the_uncentred_second_moment():
    positive, negative, _ = pairs()
    difference = (positive - negative).double()
    top = torch.linalg.eigh(difference.T @ difference).eigenvectors[:, -1]
    assert abs(top @ pca_difference(positive, negative).double()) > 1 - 1e-6
    midpoint = (positive + negative) / 2
    both = torch.cat((positive - midpoint, negative - midpoint)).double()  # repeng's pca_center
    centred = torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[0]
    assert abs(centred @ pca_difference(positive, negative).double()) > 1 - 1e-6


def test_vectors_form_a_vector_space():
    positive, negative, _ = pairs()
    v = control_vector({"0": positive}, {"0": negative})
    assert torch.equal((v + -v).directions["0"], torch.zeros(12))
    assert torch.allclose((2 * v - v).directions["0"], v.directions["0"])
    w = ControlVector({"1": torch.ones(12)})
    assert set((v + w).directions) == {"0", "1"}


def test_strength_zero_is_the_identity_bit_for_bit_and_steering_is_linear():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    positive, negative, _ = pairs()
    v = control_vector({"0": positive}, {"0": negative}, "pca_difference")
    x = torch.randn(2, 3, 12)
    before = model(x)
    with v.apply(model, 0.0):
        assert torch.equal(model(x), before)
    with v.apply(model, 2.0):
        assert torch.allclose(model(x), model[1](model[0](x)))
        with interpret.record(model, "0") as seen:
            model(x)
    assert torch.equal(model(x), before)
    assert seen["0"].shape == x.shape


def test_keeping_the_norm_changes_the_direction_only():
    model = nn.Sequential(nn.Identity())
    x = torch.randn(2, 3, 12)
    with ControlVector({"0": torch.ones(12)}).apply(model, 5.0, keep_norm=True):
        moved = model(x)
    assert torch.allclose(moved.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert not torch.allclose(moved, x)


def test_sides_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="must pair up"):
        control_vector({"0": torch.ones(3, 4)}, {"0": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="same paths"):
        control_vector({"0": torch.ones(3, 4)}, {"1": torch.ones(3, 4)})
    with pytest.raises(ValueError, match="no direction between them"):
        control_vector({"0": torch.ones(3, 4)}, {"0": torch.ones(3, 4)})


def test_last_token_activations_take_each_prompts_own_end():
    from tests.interpret.test_taps import model

    decoder = model.__wrapped__()
    prompts = [[1, 2, 3], [4, 5]]
    found = interpret.last_token_activations(decoder, prompts, ["blocks.1"])
    with interpret.record(decoder, "blocks.1") as seen:
        decoder(torch.tensor([prompts[1]]))
    assert torch.equal(found["blocks.1"][1], seen["blocks.1"][0, -1])
