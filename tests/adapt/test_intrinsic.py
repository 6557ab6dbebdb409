import copy

import pytest
import torch
from torch import nn

from paperworks import adapt
from paperworks.adapt.intrinsic import Fastfood
from paperworks.kernels.hadamard import transform


def network():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def matrix(length):
    """Sylvester's construction, in float64."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < length:
        made = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), made)
    return made


def dense(fastfood, dimension):
    """P written down from the paper's product of matrices."""
    length = len(fastfood.gauss)
    used = min(dimension, length)
    signs = torch.zeros(length, dimension, dtype=torch.float64)
    signs[:used, :used] = torch.diag(fastfood.signs.double())
    permuted = torch.eye(length, dtype=torch.float64)[fastfood.order.long()]
    gauss = fastfood.gauss.double()
    product = matrix(length) @ torch.diag(gauss) @ permuted @ matrix(length) @ signs
    return product[: fastfood.size] / (length * gauss.square().sum() * fastfood.size / length).sqrt()


@pytest.mark.parametrize("length", [1, 2, 8, 64])
def test_the_transform_is_hadamards_matrix_and_its_own_inverse(length):
    x = torch.randn(3, length, dtype=torch.float64, requires_grad=True)
    assert (transform(x) - x @ matrix(length) / length**0.5).abs().max() < 1e-12
    assert (transform(transform(x)) - x).abs().max() < 1e-12
    assert torch.autograd.gradcheck(transform, (x,))


@pytest.mark.parametrize(("dimension", "size"), [(5, 96), (40, 64), (300, 100), (3, 1)])
def test_fastfood_equals_the_product_of_its_matrices(dimension, size):
    fastfood = Fastfood.draw(dimension, size, seed=3)
    theta = torch.randn(dimension, dtype=torch.float64)
    expected = dense(fastfood, dimension) @ theta
    assert (fastfood(theta) - expected).abs().max() < 1e-12


def test_columns_have_norm_one_on_average():
    fastfood = Fastfood.draw(300, 5000, seed=0)
    norms = torch.stack([fastfood(row).square().sum() for row in torch.eye(300)])
    assert abs(norms.mean() - 1) < 0.02  # the catalogue measures 1.00 for these sizes
    assert norms.min() > 0.8
    assert norms.max() < 1.25


def test_nothing_changes_at_first_and_the_layers_share_one_vector():
    model, x = network(), torch.randn(3, 12)
    before = model(x)
    adapt.apply(model, adapt.DID(dimension=30), "*")
    assert torch.equal(model(x), before)
    assert adapt.trainable_parameters(model) == 30
    model(x).square().sum().backward()
    assert (model[0].delta.theta.grad != 0).all()


def test_the_structure_aware_kind_counts_its_scalars_in_the_dimension():
    model, x = network(), torch.randn(3, 12)
    adapt.apply(model, adapt.SAID(dimension=30), "*")
    assert adapt.trainable_parameters(model) == 30
    assert len(model[0].delta.theta) == 28
    model(x).square().sum().backward()
    assert (model[0].delta.theta.grad != 0).all()  # lambda starts at one, so theta has a gradient
    with pytest.raises(ValueError, match="2 layers take a scalar each; choose at least 3"):
        adapt.apply(network(), adapt.SAID(dimension=2), "*")


@pytest.mark.parametrize("adapter", [adapt.DID(dimension=7), adapt.SAID(dimension=7)])
def test_the_update_is_linear_and_equal_to_its_equation(adapter):
    model = network().double()
    base = model[0].weight.clone()
    adapt.apply(model, adapter, "*", dtype=torch.float64)
    delta = model[0].delta
    nn.init.normal_(delta.theta)
    scale = 1.0
    if delta.scale is not None:
        scale = 0.5
        nn.init.constant_(delta.scale, scale)
    change = scale * (dense(delta.projection, len(delta.theta)) @ delta.theta).view(16, 12)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert (model[0](x) - (x @ (base + change).T + model[0].base.bias)).abs().max() < 1e-12
    assert (delta.weight() - change).abs().max() < 1e-12
    once = delta.weight().detach()
    with torch.no_grad():
        delta.theta.mul_(3)
    assert (delta.weight() - 3 * once).abs().max() < 1e-12


def test_layers_have_projections_of_their_own_drawn_from_seeds():
    def weights(seed):
        torch.manual_seed(0)
        model = adapt.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), adapt.DID(dimension=9, seed=seed), "*")
        nn.init.normal_(model[0].delta.theta, generator=torch.Generator().manual_seed(1))
        return [module.delta.weight() for module in model]

    one, other = weights(0), weights(1)
    assert torch.equal(one[0], weights(0)[0])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_only_the_seed_is_kept_and_a_new_one_is_noticed():
    model = adapt.apply(network(), adapt.DID(dimension=9), "*")
    nn.init.normal_(model[0].delta.theta)
    assert set(model[0].delta.state_dict()) == {"theta", "seed"}
    before, twin = model[0].delta.weight(), copy.deepcopy(model)
    model[0].delta.redraw(5)
    assert not torch.equal(model[0].delta.weight(), before)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin[0].delta.weight(), model[0].delta.weight())
    assert twin[0].delta.theta is twin[2].delta.theta


def test_merging_gives_the_same_function():
    model, x = adapt.apply(network(), adapt.SAID(dimension=50), "*"), torch.randn(3, 12)
    nn.init.normal_(model[0].delta.theta)
    before = model(x)
    assert (adapt.merge(model)(x) - before).abs().max() < 1e-5  # float32
