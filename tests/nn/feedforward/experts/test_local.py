"""Jacobs' three errors against their formulas, torch's mixtures, and the paper's gradients."""

import json
import math

import pytest
import torch
from torch import distributions

from paperworks.core.spec import Spec
from paperworks.nn.feedforward.experts.local import (
    ERRORS,
    LocalExperts,
    Opinions,
    blended_error,
    competitive_error,
    expected_error,
    posterior,
)


def drawn(batch=7, count=4, outputs=3, scale=1.0):
    draws = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draws)

    outputs_, logits = scale * normal(batch, count, outputs), normal(batch, count)
    return normal(batch, outputs), Opinions(outputs_.requires_grad_(), logits.requires_grad_())


def test_each_error_is_its_formula_pattern_by_pattern():
    target, opinions = drawn()
    for row in range(len(target)):
        weights = [math.exp(logit) for logit in opinions.logits[row].tolist()]
        p = [weight / sum(weights) for weight in weights]
        d, o = target[row].tolist(), opinions.outputs[row].tolist()
        blend = [sum(p[i] * o[i][k] for i in range(4)) for k in range(3)]
        squares = [sum((d[k] - o[i][k]) ** 2 for k in range(3)) for i in range(4)]
        assert blended_error(target, opinions)[row].item() == pytest.approx(
            sum((d[k] - blend[k]) ** 2 for k in range(3)), rel=1e-12
        )
        assert expected_error(target, opinions)[row].item() == pytest.approx(
            sum(p[i] * squares[i] for i in range(4)), rel=1e-12
        )
        evidence = [p[i] * math.exp(-squares[i] / 2) for i in range(4)]
        assert competitive_error(target, opinions)[row].item() == pytest.approx(-math.log(sum(evidence)), rel=1e-12)
        assert posterior(target, opinions)[row].tolist() == pytest.approx([e / sum(evidence) for e in evidence])


def test_the_competitive_gradients_are_the_papers():
    target, opinions = drawn()
    competitive_error(target, opinions).sum().backward()
    h = posterior(target, opinions).detach()
    assert (h.sum(-1) - 1).abs().max() < 1e-15
    by_output = -h[..., None] * (target[:, None] - opinions.outputs)
    assert (opinions.outputs.grad - by_output).abs().max() < 1e-15
    assert (opinions.logits.grad - (opinions.logits.softmax(-1) - h)).abs().max() < 1e-15


@pytest.mark.parity
def test_the_competitive_error_is_the_likelihood_of_torchs_gaussian_mixture():
    target, opinions = drawn()
    each = distributions.Independent(distributions.Normal(opinions.outputs, 1.0), 1)
    mixture = distributions.MixtureSameFamily(distributions.Categorical(logits=opinions.logits), each)
    constant = 1.5 * math.log(2 * math.pi)
    assert (competitive_error(target, opinions) + constant + mixture.log_prob(target)).abs().max() < 1e-13


def test_one_expert_has_half_the_squared_error():
    target, opinions = drawn(count=1)
    half = (target - opinions.outputs[:, 0]).square().sum(-1) / 2
    assert (competitive_error(target, opinions) - half).abs().max() < 1e-14
    assert (blended_error(target, opinions) - 2 * half).abs().max() < 1e-14
    assert torch.equal(posterior(target, opinions), torch.ones(7, 1, dtype=torch.float64))


def test_targets_far_from_every_expert_give_finite_errors_and_gradients():
    target, opinions = drawn(scale=1e3)
    competitive_error(target, opinions).sum().backward()
    assert torch.isfinite(opinions.outputs.grad).all()
    assert torch.isfinite(posterior(target, opinions)).all()


@pytest.mark.parametrize("error", list(ERRORS))
@pytest.mark.parametrize("hidden", [None, 5])
def test_the_module_blends_its_experts_and_learns_by_the_error_it_names(error, hidden):
    torch.manual_seed(0)
    spec = LocalExperts(count=3, hidden=hidden, error=error)
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    module = spec.build(2, 4).double()
    x, target = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    p = module.gate(x).softmax(-1)
    blend = sum(p[:, i, None] * expert(x) for i, expert in enumerate(module.experts))
    assert (module(x) - blend).abs().max() < 1e-14
    found = module.error(x, target)
    assert torch.equal(found, ERRORS[error](target, module.opinions(x)))
    found.mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())
    assert not torch.equal(*[next(expert.parameters()) for expert in module.experts[:2]])


def test_the_gates_entropy_is_between_a_choice_and_a_share():
    module = LocalExperts(count=4).build(2, 1).double()
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.bias.zero_()
        x = torch.randn(5, 2, dtype=torch.float64)
        assert module.gate_entropy(x).item() == pytest.approx(math.log(4))
        module.gate.bias[1] = 1000.0
        assert module.gate_entropy(x).item() == 0.0


def test_what_cannot_be_says_why():
    for options, message in (
        ({"count": 0}, "count must be at least 1"),
        ({"count": 2, "hidden": 0}, "hidden must be at least 1, or None"),
        ({"count": 2, "error": "competitve"}, "error must be one of blended, expected, competitive"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalExperts(**options)
    with pytest.raises(ValueError, match="inputs must be at least 1"):
        LocalExperts(count=2).build(0, 1)
    target, opinions = drawn()
    for error in ERRORS.values():
        with pytest.raises(ValueError, match=r"need \(7, 3\)"):
            error(target[:, :1], opinions)
