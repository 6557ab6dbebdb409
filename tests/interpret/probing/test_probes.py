import pytest
import torch

from paperworks.interpret.probing.probes import (
    Probe,
    class_means,
    lda,
    leading_component,
    logistic,
    mass_mean,
    random_probe,
    within_covariance,
)


def cases(n=120, dim=8, apart=1.0):
    """Two overlapping clouds of unequal size, in float64."""
    labels = torch.rand(n) < 0.4
    center = torch.randn(dim, dtype=torch.float64)
    mixing = torch.randn(dim, dim, dtype=torch.float64)
    shift = apart * torch.randn(dim, dtype=torch.float64)
    return torch.randn(n, dim, dtype=torch.float64) @ mixing + center + labels[:, None] * shift, labels


def penalised_loss(weight, bias, activations, labels, penalty):
    sign = labels.double() * 2 - 1
    return torch.log1p(torch.exp(-sign * (activations @ weight + bias))).sum() + penalty / 2 * (weight @ weight)


@pytest.mark.parametrize(("n", "dim"), [(120, 8), (30, 50)])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_logistic_regression_stands_where_the_gradient_is_zero(n, dim, penalty):
    activations, labels = cases(n, dim)
    found = logistic(activations, labels, penalty=penalty)
    weight = found.direction.clone().requires_grad_()
    bias = torch.tensor(found.bias, dtype=torch.float64, requires_grad=True)
    slopes = torch.autograd.grad(penalised_loss(weight, bias, activations, labels, penalty), (weight, bias))
    start = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
    none = torch.zeros((), dtype=torch.float64)
    scale = torch.autograd.grad(penalised_loss(start, none, activations, labels, penalty), start)[0].abs().max()
    # The solver promises 1e-9 of the gradient at w = 0, or 1e-6 where rounding stops it.
    assert max(slope.abs().max() for slope in slopes) < 1e-6 * scale


@pytest.mark.parity
def test_logistic_regression_equals_a_minimisation_by_torch():
    activations, labels = cases(60, 5)
    parameters = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = penalised_loss(parameters[:5], parameters[5], activations, labels, 0.5)
        loss.backward()
        return loss

    solver.step(closure)
    found = logistic(activations, labels, penalty=0.5)
    assert torch.allclose(found.direction, parameters[:5].detach(), atol=1e-6)
    assert abs(found.bias - float(parameters[5].detach())) < 1e-6


def test_separable_classes_have_an_optimum_under_a_small_penalty_and_no_step_overshoots():
    activations = torch.randn(200, 4, dtype=torch.float64)
    labels = activations[:, 0] > 0
    found = logistic(50 * activations, labels, penalty=1e-6)
    assert ((found.score(50 * activations) > 0) == labels).all()
    assert found.unit[0] > 0.99


def test_without_intercept_a_probe_is_antisymmetric():
    activations, labels = cases()
    found = logistic(activations, labels, intercept=False)
    assert found.bias == 0
    assert torch.equal(found.score(-activations), -found.score(activations))


def test_a_flipped_label_flips_every_probe():
    activations, labels = cases()
    for fit in (logistic, mass_mean, lda):
        # Each fit solves linear systems in float64, whose condition costs a few digits.
        assert torch.allclose(fit(activations, ~labels).direction, -fit(activations, labels).direction, rtol=1e-7)


def test_mass_mean_is_the_difference_of_means_and_cuts_half_way():
    activations, labels = cases()
    found = mass_mean(activations, labels)
    inside = sum(activations[labels]) / labels.sum()
    outside = sum(activations[~labels]) / (~labels).sum()
    assert torch.allclose(found.direction, inside - outside, atol=1e-12)
    assert abs(found.score(inside) + found.score(outside)) < 1e-9
    assert found.score(inside) > 0


def test_covariance_within_classes_is_the_naive_sum():
    activations, labels = cases(20, 3)
    inside, outside = class_means(activations, labels)
    naive = torch.zeros(3, 3, dtype=torch.float64)
    for row, truth in zip(activations, labels, strict=True):
        apart = row - (inside if truth else outside)
        naive += torch.outer(apart, apart) / 20
    assert torch.allclose(within_covariance(activations, labels), naive, atol=1e-12)


def test_lda_is_the_inverse_covariance_times_the_difference_and_ignores_linear_maps():
    activations, labels = cases()
    inside, outside = class_means(activations, labels)
    found = lda(activations, labels, shrinkage=0.0)
    direction = torch.linalg.inv(within_covariance(activations, labels)) @ (inside - outside)
    assert torch.allclose(found.direction, direction, rtol=1e-8)
    mapped = activations @ torch.randn(8, 8, dtype=torch.float64) + 3
    assert torch.allclose(lda(mapped, labels, shrinkage=0.0).score(mapped), found.score(activations), atol=1e-6)


def test_lda_sees_through_correlated_noise_that_misleads_mass_mean():
    labels = torch.arange(2000) % 2 == 0
    noise = torch.randn(2000, 2, dtype=torch.float64) * torch.tensor([3.0, 0.1])
    shift = torch.tensor([1.0, 0.4])
    activations = noise + (labels.double() * 2 - 1)[:, None] * shift / 2
    right = [((fit(activations, labels).score(activations) > 0) == labels).double().mean() for fit in (lda, mass_mean)]
    assert right[0] > 0.95  # the second dimension alone separates by four standard deviations
    assert right[1] < 0.75


def test_the_leading_component_is_an_eigenvector_of_the_covariance():
    rows = cases(50, 6)[0]
    centred = rows - rows.mean(0)
    top = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    assert abs(leading_component(rows) @ top) > 1 - 1e-10
    moment = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    assert abs(leading_component(rows, center=False) @ moment) > 1 - 1e-10


def test_probes_score_any_leading_shape_and_negate():
    probe = Probe(torch.tensor([1.0, 2.0], dtype=torch.float64), 0.5)
    x = torch.randn(3, 4, 2)
    assert torch.allclose(probe.score(x), x.double() @ probe.direction + 0.5)
    assert torch.equal((-probe).score(x), -probe.score(x))
    assert torch.equal(probe.predict(x), probe.score(x) > 0)
    assert abs(probe.unit.norm() - 1) < 1e-12
    assert torch.equal(random_probe(9, 1).direction, random_probe(9, 1).direction)
    assert not torch.equal(random_probe(9, 1).direction, random_probe(9, 2).direction)


def test_impossible_fits_are_refused():
    activations, labels = cases(20, 4)
    for fit in (logistic, mass_mean, lda):
        with pytest.raises(ValueError, match="both classes"):
            fit(activations, torch.ones(20))
        with pytest.raises(ValueError, match="must have shape"):
            fit(activations, labels[:-1])
        with pytest.raises(ValueError, match="0 and 1"):
            fit(activations, labels.long() * 2 - 1)
        with pytest.raises(ValueError, match="one row a case"):
            fit(activations[0], labels)
        with pytest.raises(ValueError, match="not finite"):
            fit(activations / 0, labels)
    with pytest.raises(ValueError, match="above 0"):
        logistic(activations, labels, penalty=0.0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        lda(activations, labels, shrinkage=2.0)
    with pytest.raises(ValueError, match="no inverse"):
        lda(torch.randn(5, 40), torch.tensor([1, 0, 1, 0, 1]), shrinkage=0.0)
    with pytest.raises(ValueError, match="4 dimensions"):
        mass_mean(activations, labels).score(torch.randn(3, 5))
    with pytest.raises(ValueError, match="all alike"):
        leading_component(torch.ones(4, 3))
