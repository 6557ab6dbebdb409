"""The GELU's general and stochastic forms."""

import math

import pytest
import torch
from torch.nn import functional as F

from paperworks.nn.feedforward.activations import GELU, gelu, keep_probability, stochastic_gelu
from paperworks.nn.feedforward.mlp import ACTIVATIONS

X = torch.linspace(-6, 6, 241, dtype=torch.float64)


def naive(x, mean=0.0, std=1.0):
    values = [value * 0.5 * (1 + math.erf((value - mean) / std / math.sqrt(2))) for value in x.tolist()]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 1.0), (-1.0, 0.3), (0.5, 4.0)])
def test_gelu_is_x_times_the_normal_distribution_function(mean, std):
    assert (gelu(X, mean, std) - naive(X, mean, std)).abs().max() < 1e-14
    torch.autograd.gradcheck(lambda x: gelu(x, mean, std), (X[::20].clone().requires_grad_(),))


def test_both_roads_to_the_standard_form_agree():
    assert (X * keep_probability(X) - gelu(X)).abs().max() < 1e-14


def test_the_tail_does_not_cancel():
    """Phi(-10) is 7.6e-24; 1 + erf would give 0."""
    assert keep_probability(torch.tensor(-10.0, dtype=torch.float64)).item() == pytest.approx(7.6199e-24, rel=1e-4)


def test_a_narrow_gaussian_is_the_relu():
    assert (gelu(X, std=1e-9) - F.relu(X)).abs().max() < 1e-9


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ours", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("gelu_sigmoid", "quick_gelu")]
)
def test_the_forms_of_checkpoints_equal_transformers(ours, theirs):
    from transformers.activations import ACT2FN

    assert (ACTIVATIONS[ours](X) - ACT2FN[theirs](X)).abs().max() < 1e-14


def test_approximation_errors_are_those_published():
    for name, error in (("gelu_tanh", 4.732e-4), ("gelu_sigmoid", 2.034e-2)):
        fine = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
        assert (ACTIVATIONS[name](fine) - gelu(fine)).abs().max().item() == pytest.approx(error, rel=1e-3)


def test_the_stochastic_map_keeps_or_drops_and_its_gradient_is_the_mask():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    out = stochastic_gelu(x, generator=torch.Generator().manual_seed(1))
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert ((out == 0) | (out == x)).all()
    assert torch.equal(slope, (out != 0).double())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5)])
def test_the_stochastic_map_has_the_gelu_as_its_mean(mean, std):
    points, times = torch.tensor([-1.5, -0.3, 0.4, 1.2], dtype=torch.float64), 40_000
    drawn = stochastic_gelu(points.repeat(times, 1), mean, std, generator=torch.Generator().manual_seed(0))
    # five standard errors of a mean of masked inputs, |x| / 2 at most each
    assert ((drawn.mean(0) - gelu(points, mean, std)).abs() < 5 * points.abs() / 2 / times**0.5).all()


def test_the_module_draws_in_training_only():
    module = GELU(stochastic=True)
    torch.manual_seed(0)
    assert ((module(X) == 0) | (module(X) == X)).any()
    assert not torch.equal(module(X), module(X))
    assert torch.equal(module.eval()(X), gelu(X))
    assert torch.equal(GELU()(X), gelu(X))
    assert "stochastic" in repr(module)


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_a_width_that_is_none_is_refused(std):
    for call in (lambda: gelu(X, std=std), lambda: stochastic_gelu(X, std=std), lambda: GELU(std=std)):
        with pytest.raises(ValueError, match="std must be a positive number"):
            call()
