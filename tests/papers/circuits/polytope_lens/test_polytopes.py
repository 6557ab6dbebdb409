from itertools import pairwise

import pytest
import torch
from torch import nn

from paperworks.papers.circuits.polytope_lens import polytopes


def mlp(sizes, seed=0, rectifier=nn.ReLU):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), rectifier()]
    return nn.Sequential(*layers[:-1]).double()


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.LeakyReLU(0.1), nn.AvgPool2d(2)),
        *(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)),
    ).double()
    model(torch.randn(16, 1, 8, 8, dtype=torch.float64))  # running statistics that are not 0 and 1
    return model.eval()


def points(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_code_is_the_signs_of_all_pre_activations():
    model, x = mlp([5, 7, 6, 3]), points(4, 5)
    first = model[0](x)
    second = model[2](first.relu())
    assert torch.equal(polytopes.spline_code(model, x), torch.cat([first > 0, second > 0], dim=1))
    assert list(polytopes.pre_activations(model, x)) == ["1", "3"]


def test_the_map_is_the_product_of_the_masked_layers():
    model, x = mlp([5, 7, 6, 3]), points(5)
    on = [value[0].double().gt(0).double() for value in polytopes.pre_activations(model, x[None]).values()]
    weight = model[4].weight @ on[1].diag() @ model[2].weight @ on[0].diag() @ model[0].weight
    first = on[0] * model[0].bias
    bias = model[4].weight @ (on[1] * (model[2].weight @ first + model[2].bias)) + model[4].bias
    found = polytopes.affine_map(model, x)
    torch.testing.assert_close(found.weight, weight.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.bias, bias.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1024, 10])
@torch.no_grad()
def test_the_map_holds_in_all_of_the_polytope_and_not_beyond(chunk):
    model = convolutional()
    x = points(1, 8, 8)
    found = polytopes.affine_map(model, x, chunk=chunk)
    jacobian = torch.autograd.functional.jacobian(lambda each: model(each[None])[0], x).view(4, 64)
    torch.testing.assert_close(found.weight, jacobian, atol=1e-12, rtol=0)
    near = x + 0.02 * points(200, 1, 8, 8, seed=2)
    same = (polytopes.spline_code(model, near) == polytopes.spline_code(model, x[None])).all(1)
    assert 3 < same.sum() < 200
    assert (found(near[same]) - model(near[same])).abs().max() < 1e-12
    assert (found(near[~same]) - model(near[~same])).abs().amax(1).min() > 1e-9


def test_one_hidden_layer_cuts_the_plane_into_as_many_regions_as_lines_do():
    units = 8
    model = mlp([2, units, 1])
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    codes = set()
    for i in range(units):
        for j in range(i):
            pair = torch.stack([weight[i], weight[j]])
            corner = torch.linalg.solve(pair, -bias[[i, j]])
            # the four regions that meet where two lines cross
            for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                step = torch.linalg.solve(pair, torch.tensor(signs, dtype=torch.float64))
                codes.add(tuple(polytopes.spline_code(model, (corner + 1e-7 * step)[None])[0].tolist()))
    assert len(codes) == 1 + units + units * (units - 1) // 2 == 37


def test_crossings_of_one_layer_are_the_zeros_of_its_units():
    model, a, b = mlp([3, 20, 2]), points(3), points(3, seed=2)
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    zeros = -(weight @ a + bias) / (weight @ (b - a))
    expected = zeros[(zeros > 0) & (zeros < 1)].sort().values
    found = polytopes.crossings(model, a, b)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert 0 < len(found) <= 20


@pytest.mark.parametrize("rectifier", [nn.ReLU, lambda: nn.LeakyReLU(0.2)])
def test_crossings_are_those_of_a_very_fine_sample(rectifier):
    model, a, b = mlp([4, 16, 16, 16, 2], rectifier=rectifier), points(4), points(4, seed=2)
    found = polytopes.crossings(model, a, b)
    at = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None]
    code = polytopes.spline_code(model, a + at * (b - a))
    switches = (code[1:] != code[:-1]).sum(1)
    expected = torch.repeat_interleave(at[:-1, 0], switches)
    assert len(found) == len(expected) > 10
    assert (found - expected).abs().max() < 1e-5  # twice the sample's spacing
    density = polytopes.crossing_density(model, a, b)
    assert density == pytest.approx(len(found) / (b - a).norm().item())


def test_codes_do_not_change_when_a_unit_is_scaled():
    model, x = mlp([5, 7, 6, 3]), points(50, 5)
    before = polytopes.spline_code(model, x)
    with torch.no_grad():
        model[0].weight[2] *= 3.7
        model[0].bias[2] *= 3.7
        model[2].weight[:, 2] /= 3.7
    assert torch.equal(polytopes.spline_code(model, x), before)


def test_hamming_counts_the_units_that_differ():
    a, b = points(3, 40) > 0, points(5, 40, seed=2) > 0
    expected = [[int((row != other).sum()) for other in b] for row in a]
    assert polytopes.hamming(a, b).tolist() == expected


def test_networks_that_are_not_piecewise_linear_are_refused():
    def sequence(*parts):
        return nn.Sequential(nn.Linear(4, 4), *parts)

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.linear(x)).sin()

    shared = nn.ReLU()
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="1 is a GELU"):
        polytopes.spline_code(sequence(nn.GELU()), x)
    with pytest.raises(ValueError, match="1 is a LayerNorm"):
        polytopes.affine_map(sequence(nn.LayerNorm(4), nn.ReLU()), x[0])
    with pytest.raises(ValueError, match=r"training mode; call model\.eval"):
        polytopes.spline_code(sequence(nn.BatchNorm1d(4), nn.ReLU()), x)
    with pytest.raises(ValueError, match="has no ReLU"):
        polytopes.crossings(sequence(), x[0], x[1])
    with pytest.raises(ValueError, match="inplace=False"):
        polytopes.spline_code(sequence(nn.ReLU(inplace=True)), x)
    with pytest.raises(ValueError, match="runs more than once"):
        polytopes.spline_code(sequence(shared, nn.Linear(4, 4), shared), x)
    with pytest.raises(ValueError, match="nonlinearity that is not a ReLU"):
        polytopes.affine_map(Hidden(), x[0])


def test_bad_input_is_refused_with_what_would_be_right():
    model = mlp([4, 5, 2])
    with pytest.raises(ValueError, match="must have one shape"):
        polytopes.crossings(model, points(4), points(3))
    with pytest.raises(ValueError, match="the same point"):
        polytopes.crossing_density(model, points(4), points(4))
    with pytest.raises(ValueError, match="codes must be"):
        polytopes.hamming(points(3, 4) > 0, points(3, 5) > 0)
