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


def steered(vector_context, model, x):
    with vector_context, interpret.record(model, "0") as seen:
        model(x)
    return seen["0"]


def test_removing_a_direction_leaves_nothing_of_it_and_is_idempotent():
    model = nn.Sequential(nn.Identity())
    x, v = torch.randn(2, 3, 12), ControlVector({"0": 7 * torch.randn(12)})
    once = steered(v.remove(model), model, x)
    # Float32 rounding of entries of a few units.
    assert (once @ v.directions["0"]).abs().max() < 1e-4
    assert torch.allclose(steered(v.remove(model), model, once), once, atol=1e-6)
    unit = v.directions["0"] / v.directions["0"].norm()
    assert torch.allclose(once, x - (x @ unit)[..., None] * unit, atol=1e-5)
    x[0, 0] *= 1000  # an attention sink
    spared = steered(v.remove(model, longest=100.0), model, x)
    assert torch.equal(spared[0, 0], x[0, 0])
    assert torch.equal(spared[1], once[1])
    with pytest.raises(ValueError, match="is zero"):
        ControlVector({"0": torch.zeros(12)}).remove(model)


def test_amplifying_keeps_the_sign_and_adds_to_the_size():
    model = nn.Sequential(nn.Identity())
    x = torch.randn(4, 5, 12)
    v = torch.nn.functional.normalize(torch.randn(12), dim=0)
    before, after = x @ v, steered(ControlVector({"0": v}).amplify(model, 3.0), model, x) @ v
    assert torch.equal(after.sign(), before.sign())
    assert torch.allclose(after.abs(), before.abs() + 3.0, atol=1e-5)
    across = torch.zeros(1, 1, 12)
    assert torch.equal(steered(ControlVector({"0": v}).amplify(model, 3.0), model, across), across)


def test_random_vectors_have_the_same_lengths_and_other_directions():
    v = ControlVector({"0": 3 * torch.ones(400), "1": torch.ones(400)})
    random = interpret.steering.random_vector(v, 1)
    for path, direction in v.directions.items():
        assert abs(random.directions[path].norm() - direction.norm()) < 1e-4
        # The cosine of random directions has a standard deviation of 1 / 20 here: five of them.
        assert abs(torch.cosine_similarity(random.directions[path], direction, dim=0)) < 0.25
    assert torch.equal(random.directions["1"], interpret.steering.random_vector(v, 1).directions["1"])


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_of_equal_length_keep_the_order_of_the_prompts(batch):
    from tests.interpret.test_taps import model

    decoder = model.__wrapped__()
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8], [9], [3, 2, 1], [5, 5, 5]]
    found = interpret.last_token_activations(
        decoder, prompts, ["blocks.0", "blocks.1"], batch=batch, forward=decoder.hidden
    )
    alone = interpret.last_token_activations(decoder, prompts, ["blocks.0", "blocks.1"])
    assert found.keys() == alone.keys()
    for path, rows in alone.items():
        # Kernels for other batch sizes add up in another order.
        assert torch.allclose(found[path], rows, atol=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        interpret.last_token_activations(decoder, prompts, ["blocks.0"], batch=0)
    with pytest.raises(ValueError, match="empty"):
        interpret.last_token_activations(decoder, [[]], ["blocks.0"])
