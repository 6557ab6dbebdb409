"""The hierarchical mixture against the paper's recursion, least squares, logistic regression and its own gradient."""

import itertools
import json
import math

import pytest
import torch

from paperworks.core.spec import Spec
from paperworks.models.classic.hierarchical_mixture import HME, SMALLEST_VARIANCE, fit_hme, fit_multinomial


def rows(batch=60, inputs=2, outputs=1, seed=0, family="gaussian"):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, dtype=torch.float64, generator=draws)
    y = x.abs() @ torch.randn(inputs, outputs, dtype=torch.float64, generator=draws)
    y = y + 0.1 * torch.randn(batch, outputs, dtype=torch.float64, generator=draws)
    return x, (y > y.mean(0)).double() if family == "bernoulli" else y


def tree(seed=0, **options):
    torch.manual_seed(seed)
    return HME(**{"inputs": 2, "outputs": 1} | options).build().double()


def gates_by_hand(model, x):
    """g_i and g_{j|i} of one input, for two levels."""

    def softmax(values):
        total = sum(math.exp(value) for value in values)
        return [math.exp(value) / total for value in values]

    wide = [*x.tolist(), 1.0]
    top, lower = model.gates[0][0].tolist(), model.gates[1].tolist()
    g = softmax([sum(v * w for v, w in zip(row, wide, strict=True)) for row in top])
    return g, [softmax([sum(v * w for v, w in zip(row, wide, strict=True)) for row in node]) for node in lower], wide


def test_density_and_posterior_are_the_papers_recursion():
    model = tree(branching=(2, 3), outputs=2)
    with torch.no_grad():
        model.log_variance.normal_()
    x, y = rows(5, outputs=2)
    for n in range(5):
        g, conditional, wide = gates_by_hand(model, x[n])
        density, mean = [], [0.0, 0.0]
        for i in range(2):
            for j in range(3):
                leaf, product = 3 * i + j, 1.0
                for k in range(2):
                    mu = sum(u * w for u, w in zip(model.experts[leaf, k].tolist(), wide, strict=True))
                    variance = math.exp(model.log_variance[leaf, k].item())
                    product *= math.exp(-((y[n, k].item() - mu) ** 2) / 2 / variance) / math.sqrt(
                        2 * math.pi * variance
                    )
                    mean[k] += g[i] * conditional[i][j] * mu
                density.append(product)
        joint = [[g[i] * conditional[i][j] * density[3 * i + j] for j in range(3)] for i in range(2)]
        total = sum(map(sum, joint))
        assert model.log_likelihood(x, y)[n].item() == pytest.approx(math.log(total), rel=1e-10)
        assert model(x)[n].tolist() == pytest.approx(mean, rel=1e-10)
        found = model.posterior(x, y)[n].view(2, 3)
        for i in range(2):
            h_i = sum(joint[i]) / total
            assert found[i].sum().item() == pytest.approx(h_i)  # siblings add up to their parent
            within = [each / sum(joint[i]) for each in joint[i]]
            assert found[i].tolist() == pytest.approx([h_i * share for share in within])


def test_one_level_is_a_flat_mixture_and_any_depth_sums_to_one():
    x, _ = rows()
    flat = tree(branching=(4,))
    wide = torch.cat((x, torch.ones(60, 1)), 1)
    assert (flat.log_gates(x) - (wide @ flat.gates[0][0].t()).log_softmax(-1)).abs().max() < 1e-14
    deep = tree(branching=(2, 3, 2))
    assert deep.log_gates(x).shape == (60, 12)
    assert (deep.log_gates(x).exp().sum(-1) - 1).abs().max() < 1e-14


def test_one_expert_is_ordinary_least_squares():
    x, y = rows(outputs=2)
    fitted = fit_hme(HME(inputs=2, outputs=2, branching=(), ridge=1e-10), x, y, iterations=2, starts=1).model
    wide = torch.cat((x, torch.ones(60, 1)), 1)
    solution = torch.linalg.lstsq(wide, y).solution
    assert (fitted.experts[0] - solution.t()).abs().max() < 1e-9
    residual = (y - wide @ solution).square().mean(0)
    assert (fitted.log_variance[0].exp() - residual).abs().max() < 1e-9


def test_each_expert_is_least_squares_weighted_by_its_posterior():
    model, (x, y) = tree(ridge=1e-10), rows()
    h = model.posterior(x, y).detach()
    model.em_step(x, y)
    root = h.sqrt()
    wide = torch.cat((x, torch.ones(60, 1)), 1)
    for leaf in range(4):
        solution = torch.linalg.lstsq(root[:, leaf, None] * wide, root[:, leaf, None] * y).solution
        assert (model.experts[leaf, 0] - solution[:, 0]).abs().max() < 1e-7
        residual = (h[:, leaf] * (y - wide @ solution)[:, 0].square()).sum() / h[:, leaf].sum()
        assert model.log_variance[leaf, 0].exp().item() == pytest.approx(residual.item(), rel=1e-6)


def test_each_gate_is_a_logit_of_soft_targets_weighted_by_the_nodes_posterior():
    model, (x, y) = tree(ridge=0.1), rows()
    h = model.posterior(x, y).detach().view(60, 2, 2)
    model.em_step(x, y, newton_steps=30)
    wide = torch.cat((x, torch.ones(60, 1)), 1)
    for node in range(2):
        inner = h[:, node].sum(-1)
        targets = h[:, node] / inner[:, None]
        gate = model.gates[1][node].detach()
        # the condition of the maximum, with weight h_i on h_{j|i} - g_{j|i}
        slope = (inner[:, None] * (targets - (wide @ gate.t()).softmax(-1))).t() @ wide - 0.1 * gate
        assert slope.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("branching", "family", "noise"),
    [((2, 2), "gaussian", None), ((3,), "gaussian", 0.2), ((2, 2, 2), "gaussian", None), ((2, 2), "bernoulli", None)],
)
@pytest.mark.parametrize("newton_steps", [1, 4])
def test_the_objective_never_falls(branching, family, noise, newton_steps):
    x, y = rows(family=family, outputs=2)
    spec = HME(inputs=2, outputs=2, branching=branching, family=family, noise=noise)
    fit = fit_hme(spec, x, y, iterations=12, starts=2, newton_steps=newton_steps)
    for trace in fit.objective:
        assert len(trace) == 13
        assert min(after - before for before, after in itertools.pairwise(trace)) > -1e-9
        assert trace[-1] > trace[0] + 1
    assert fit.log_likelihood.index(max(fit.log_likelihood)) == [m is fit.model for m in fit.models].index(True)
    if noise is not None:
        assert (fit.model.log_variance - 2 * math.log(noise)).abs().max() < 1e-6  # built in float32


@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_where_em_stops_the_gradient_of_likelihood_and_prior_is_zero(family):
    """An independent check of every M-step at once, by autograd through the whole tree."""
    x, y = rows(80, family=family)
    spec = HME(inputs=2, outputs=1, family=family, ridge=0.5)
    model = fit_hme(spec, x, y, iterations=400, starts=1, newton_steps=1).model
    (model.log_likelihood(x, y).sum() + model.log_prior()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() < 1e-4, name
    start = spec.build().double()
    (start.log_likelihood(x, y).sum() + start.log_prior()).backward()
    assert start.experts.grad.abs().max() > 1  # such as a start has


def test_the_multinomial_fit_is_where_another_optimizer_ends():
    x, _ = rows(40)
    mass = torch.rand(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = fit_multinomial(x, mass, torch.zeros(3, 2, dtype=torch.float64), ridge=0.7, steps=30)
    theirs = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theirs], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, history_size=20)

    def objective():
        optimizer.zero_grad()
        value = 0.35 * theirs.square().sum()
        for label in range(3):  # soft targets as rows of each class, weighted
            cost = torch.nn.functional.cross_entropy(x @ theirs.t(), torch.full((40,), label), reduction="none")
            value = value + (mass[:, label] * cost).sum()
        value.backward()
        return value

    optimizer.step(objective)
    assert (ours - theirs).abs().max() < 1e-7


def test_separable_data_leave_gates_finite():
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    sides = torch.cat((x < 0, x >= 0), 1).double()
    wide = torch.cat((x, torch.ones_like(x)), 1)
    gate = fit_multinomial(wide, sides, torch.zeros(2, 2, dtype=torch.float64), ridge=1e-3, steps=100)
    assert torch.isfinite(gate).all()
    assert ((wide @ gate.t()).argmax(1) == sides.argmax(1)).all()


def test_an_expert_that_meets_its_points_exactly_keeps_a_variance():
    x, _ = rows(30)
    model = fit_hme(HME(inputs=2, outputs=1, branching=(), ridge=1e-12), x, x[:, :1] * 2 + 1, starts=1).model
    assert model.log_variance.exp().item() == pytest.approx(SMALLEST_VARIANCE)


@torch.no_grad()
def test_two_experts_share_out_an_absolute_value_that_one_line_cannot_fit():
    x = torch.linspace(-1, 1, 100, dtype=torch.float64)[:, None]
    errors = []
    for branching in ((2,), ()):
        model = fit_hme(HME(inputs=1, outputs=1, branching=branching), x, x.abs(), starts=2).model
        errors.append(float((model(x) - x.abs()).square().mean()))
    assert errors[0] < 0.01 * errors[1]


def test_a_tree_is_a_value_and_the_global_generator_is_left_alone():
    spec = HME(inputs=2, outputs=1, branching=(2, 3))
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit_hme(spec, *rows(), iterations=1, starts=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": 0}, "inputs must be at least 1"),
        ({"branching": (2, 1)}, "at least 2 children a node"),
        ({"noise": 0.0}, "noise must be positive"),
        ({"noise": 0.1, "family": "bernoulli"}, "noise is of Gaussian experts"),
        ({"ridge": 0.0}, "ridge must be positive"),
    ],
)
def test_trees_that_cannot_be_say_why(options, message):
    with pytest.raises(ValueError, match=message):
        HME(**{"inputs": 2, "outputs": 1} | options)


def test_data_that_do_not_fit_say_why():
    x, y = rows()
    spec = HME(inputs=2, outputs=1)
    for bad, message in (
        ((x[:, :1], y), r"x must be \(batch, 2\)"),
        ((x[:5], y), "do not fit"),
        ((x, (y > 0).long()), "must be floating point"),
        ((x, y * math.inf), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_hme(spec, *bad)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit_hme(HME(inputs=2, outputs=1, family="bernoulli"), x, y + 5)
    with pytest.raises(ValueError, match="starts must be at least 1"):
        fit_hme(spec, x, y, starts=0)
