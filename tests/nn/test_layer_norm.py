"""Layer normalization against its equation, and what it does and does not ignore."""

import pytest
import torch
from torch import nn

from paperworks.nn import LayerNorm

WIDTH, UNITS = 6, 10


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def layer(**options):
    built = LayerNorm(**options).build(UNITS).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    return built


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize(("gain", "bias"), [(True, True), (True, False), (False, False)])
def test_it_is_its_equation_with_the_biased_variance_and_epsilon_inside_the_root(eps, gain, bias):
    norm, x = layer(eps=eps, gain=gain, bias=bias), drawn(4, 3, UNITS).requires_grad_()
    mean = x.sum(-1, keepdim=True) / UNITS
    expected = (x - mean) / ((x - mean).pow(2).sum(-1, keepdim=True) / UNITS + eps).sqrt()
    if gain:
        expected = expected * norm.weight
    if bias:
        expected = expected + norm.bias
    assert (norm(x) - expected).abs().max() < 1e-13
    torch.autograd.gradcheck(norm, (x,))


def test_gain_starts_at_one_and_bias_at_zero():
    norm = LayerNorm().build(UNITS)
    assert torch.equal(norm.weight, torch.ones(UNITS))
    assert torch.equal(norm.bias, torch.zeros(UNITS))


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        (lambda x, w: (x, 7 * w), True),
        (lambda x, w: (x, w + drawn(WIDTH)), True),  # one vector, added to every row
        (lambda x, w: (x * drawn(5, 1).abs(), w), True),  # each case by its own factor
        (lambda x, w: (x, w * drawn(UNITS, 1).abs()), False),  # each row by its own factor
        (lambda x, w: (x, w + drawn(UNITS, 1)), False),  # one number added to all weights of a unit, each its own
        (lambda x, w: (x + drawn(WIDTH), w), False),  # all inputs shifted
    ],
)
def test_table_1_of_the_paper(change, invariant):
    norm, x, weight = layer(eps=0.0), drawn(5, WIDTH), drawn(UNITS, WIDTH)
    changed_x, changed_weight = change(x, weight)
    gap = (norm(changed_x @ changed_weight.t()) - norm(x @ weight.t())).abs().max()
    assert gap < 1e-12 if invariant else gap > 0.05


def test_gradients_sum_to_zero_and_are_orthogonal_to_the_normalized_sums():
    norm, x = layer(eps=0.0), drawn(4, UNITS).requires_grad_()
    (slope,) = torch.autograd.grad((norm(x) * drawn(4, UNITS)).sum(), x)
    assert slope.sum(-1).abs().max() < 1e-13
    assert (slope * (x - x.mean(-1, keepdim=True))).sum(-1).abs().max() < 1e-13


def test_an_example_does_not_see_its_batch_nor_the_mode():
    norm, x = layer(), drawn(4, UNITS)
    assert torch.equal(norm(x)[:1], norm(x[:1]))
    assert torch.equal(norm.train()(x), norm.eval()(x))
