"""Certificates against functions whose bounds are known."""

import math

import pytest
import torch
from torch import nn

from paperworks.papers.blocks.gelu_analysis.certificate import certify, derivatives


def test_the_gelu_has_the_bounds_of_the_paper():
    found = certify(nn.GELU())
    top = 0.5 * (1 + math.erf(1)) + math.sqrt(2) * math.exp(-1) / math.sqrt(2 * math.pi)
    assert found.highest_slope == pytest.approx(top, abs=1e-9)
    assert found.slope == found.highest_slope
    assert found.lowest_slope == pytest.approx(1 - top, abs=1e-9)  # GELU'(x) + GELU'(-x) = 1
    assert found.slope_at == pytest.approx(math.sqrt(2), abs=1e-4)  # flat there: 1e-9 in value is 1e-4.5 in place
    assert found.curvature == pytest.approx(2 / math.sqrt(2 * math.pi), abs=1e-9)
    assert found.stationary == pytest.approx((-0.7517915247,), abs=1e-8)
    assert found.smoothness == 2


@pytest.mark.parametrize(
    ("function", "kinks", "bends", "curvature"),
    [
        (nn.ReLU(), (0.0,), (), math.inf),
        (nn.LeakyReLU(0.3), (0.0,), (), math.inf),
        (nn.SELU(), (0.0,), (), math.inf),
        (nn.Hardswish(), (-3.0, 3.0), (), math.inf),
        (nn.Hardtanh(), (-1.0, 1.0), (), math.inf),
        (nn.ELU(), (), (0.0,), 1.0),
        (nn.CELU(2.0), (), (0.0,), 0.5),
        (nn.SiLU(), (), (), 0.5),
        (nn.Tanh(), (), (), 4 / (3 * math.sqrt(3))),
        (nn.Softplus(), (), (), 0.25),
        (torch.abs, (0.0,), (), math.inf),
        (lambda x: 3 * x, (), (), 0.0),
    ],
)
def test_breaks_are_found_where_they_are(function, kinks, bends, curvature):
    found = certify(function)
    assert found.kinks == pytest.approx(kinks, abs=1e-7)
    assert found.bends == pytest.approx(bends, abs=1e-7)
    assert found.curvature == pytest.approx(curvature, abs=1e-7)
    assert found.smoothness == (0 if kinks else 1 if bends else 2)


def test_stationary_points_are_changes_of_sign_not_flat_tails():
    assert certify(nn.ReLU()).stationary == ()
    assert certify(torch.sin, -8, 8).stationary == pytest.approx([(k + 0.5) * math.pi for k in range(-3, 3)], abs=1e-7)
    assert certify(nn.Hardswish()).stationary == pytest.approx((-1.5,), abs=1e-7)
    assert certify(lambda x: x**3, -1, 1).stationary == ()


def test_the_lipschitz_constant_counts_falling_too():
    found = certify(lambda x: -2 * torch.tanh(x))
    assert (found.slope, found.lowest_slope, found.slope_at) == pytest.approx((2, -2, 0), abs=1e-8)


def test_derivatives_are_autograds():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    first, second = derivatives(lambda x: x**3, x)
    assert torch.allclose(first, 3 * x**2, atol=1e-14)
    assert torch.allclose(second, 6 * x, atol=1e-14)
    assert not derivatives(torch.relu, x)[1].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "low < high"),
        ({"points": 5}, "at least 10 points"),
    ],
)
def test_bad_intervals_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        certify(torch.tanh, **arguments)


def test_a_function_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        certify(torch.log)
