"""The pen's density: it integrates to 1, it is torch's mixture, and a bias leaves its mode."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from paperworks.nn.mixture_density import StrokeDensity, StrokeMixture


def outputs(*rows, components=3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*rows, 6 * components + 1, dtype=torch.float64, generator=draws)


def test_the_papers_twenty_components_take_121_numbers():
    assert StrokeMixture().build(7).out_features == 121


@torch.no_grad()
def test_the_density_integrates_to_one_with_its_bit():
    density = StrokeDensity(outputs(1))
    grid = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    places = torch.cartesian_prod(grid, grid)[:, None]
    total = 0.0
    for lifted in (True, False):
        total += density.log_prob(places, torch.full((1,), lifted)).exp().sum(0) * 0.05**2
    assert (total - 1).abs().max() < 1e-4  # sums over a grid of 0.05; the narrowest spread is about 0.2


@pytest.mark.parity
def test_it_is_torchs_mixture_with_its_gradients():
    given = outputs(4, 6).requires_grad_()
    density = StrokeDensity(given)
    offset = torch.randn(4, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours = density.log_offset(offset)
    weights, means, spreads, correlations, lift = given.split((3, 6, 6, 3, 1), -1)
    sigma, rho = spreads.unflatten(-1, (3, 2)).exp(), correlations.tanh()
    across = rho * sigma.prod(-1)
    covariance = torch.stack(
        (torch.stack((sigma[..., 0] ** 2, across), -1), torch.stack((across, sigma[..., 1] ** 2), -1)), -2
    )
    parts = MultivariateNormal(means.unflatten(-1, (3, 2)), covariance)
    theirs = MixtureSameFamily(Categorical(logits=weights), parts).log_prob(offset)
    assert (ours - theirs).abs().max() < 1e-10
    mine, other = (
        torch.autograd.grad(ours.sum(), given, retain_graph=True)[0],
        torch.autograd.grad(theirs.sum(), given)[0],
    )
    assert (mine - other).abs().max() < 1e-8
    lifted = torch.tensor([True, False]).repeat(4, 3)
    bit = torch.distributions.Bernoulli(logits=lift.squeeze(-1)).log_prob(lifted.double())
    assert (density.log_prob(offset, lifted) - ours - bit).abs().max() < 1e-12


@torch.no_grad()
def test_without_correlation_the_density_is_a_product():
    given = outputs(5, components=1)
    given[..., 5] = 0.0
    offset = torch.randn(5, 2, dtype=torch.float64)
    means, spreads = given[..., 1:3], given[..., 3:5]
    apart = torch.distributions.Normal(means, spreads.exp()).log_prob(offset).sum(-1)
    assert (StrokeDensity(given).log_offset(offset) - apart).abs().max() < 1e-12


def test_nearly_perfect_correlation_stays_finite_and_right_in_float32():
    given = torch.zeros(1, 7)
    given[..., 5] = 7.0  # 1 - rho is 2e-6
    given.requires_grad_()
    offset = torch.tensor([[0.3, 0.3 + 1e-3]])
    found = StrokeDensity(given).log_offset(offset)
    rho = math.tanh(7.0)
    x, y = offset[0].double().tolist()
    exact = (
        -math.log(2 * math.pi)
        - 0.5 * math.log1p(-rho * rho)
        - (x * x + y * y - 2 * rho * x * y) / (2 * (1 - rho) * (1 + rho))
    )
    assert abs(found.item() - exact) < 1e-2
    assert torch.isfinite(torch.autograd.grad(found.sum(), given)[0]).all()
    given = torch.full((1, 7), 1e4)  # and whatever comes out of the network
    assert torch.isfinite(StrokeDensity(given.clone()).correlations).all()


@torch.no_grad()
def test_far_points_do_not_underflow():
    given = outputs(2, components=2).float()
    far = torch.full((2, 2), 200.0)
    assert torch.isfinite(StrokeDensity(given).log_offset(far)).all()


@torch.no_grad()
def test_a_growing_bias_leaves_the_mean_of_the_heaviest_component():
    given = outputs(40)
    density = StrokeDensity(given, bias=1e5)
    offset, _ = density.sample(torch.Generator().manual_seed(1))
    assert (offset - StrokeDensity(given).mode()).abs().max() < 1e-12
    mild = StrokeDensity(given, bias=1.0)
    plain = StrokeDensity(given)
    assert torch.allclose(mild.log_spreads, plain.log_spreads - 1.0)
    assert torch.allclose(mild.log_weights, torch.log_softmax(2 * given[..., :3], -1))


@torch.no_grad()
def test_draws_have_the_moments_of_the_mixture():
    given = outputs(1).expand(200_000, -1)
    density = StrokeDensity(given)
    offset, lifted = density.sample(torch.Generator().manual_seed(2))
    weights = density.log_weights[0].exp()
    mean = (weights[:, None] * density.means[0]).sum(0)
    assert (offset.mean(0) - mean).abs().max() < 0.02  # of deviations of about 2, 200,000 draws
    sigma, rho = density.log_spreads[0].exp(), density.correlations[0]
    product = (weights * (density.means[0].prod(-1) + rho * sigma.prod(-1))).sum()
    assert abs(offset.prod(-1).mean() - product) < 0.05
    assert abs(lifted.double().mean() - torch.sigmoid(given[0, -1])) < 0.005


def test_what_is_no_density_is_refused():
    with pytest.raises(ValueError, match=r"6 K \+ 1 numbers for K components, got 12"):
        StrokeDensity(torch.zeros(3, 12))
    with pytest.raises(ValueError, match="bias must be at least 0"):
        StrokeDensity(torch.zeros(3, 13), bias=-1.0)
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        StrokeMixture(components=0)
