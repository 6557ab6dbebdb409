"""The pyramid of the gated recursive convolution against the paper's equations, node by node."""

from itertools import pairwise

import pytest
import torch

from paperworks.interpret import record
from paperworks.nn import Placement
from paperworks.nn.convolution.gated_recursive import GRConv
from paperworks.nn.recurrent.classic import GRU


def module(dim=6, **options):
    torch.manual_seed(0)
    built = GRConv(**options).build(dim).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.7)
    return built


def vectors(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(built, x, **options):
    return built(x, Placement(**options).resolve(len(x), x.shape[1], x.device))


def root(built, words):
    """The equations literally: levels from left to right, one node after the other; returns the root and every gate."""
    width, gates = built.width, []
    row = [built.input.weight @ word + built.input.bias for word in words]
    while len(row) > 1:
        above = []
        for a, b in pairwise(row):
            candidate = built.left.weight[:width] @ a + built.right.weight[:width] @ b + built.right.bias[:width]
            scores = built.left.weight[width:] @ a + built.right.weight[width:] @ b + built.right.bias[width:]
            share = scores.exp() / scores.exp().sum()
            gates.append(share)
            above.append(share[0] * candidate.tanh() + share[1] * a + share[2] * b)
        row = above
    return row[0], gates


@torch.no_grad()
@pytest.mark.parametrize("hidden", [None, 4])
def test_each_token_gets_the_root_over_all_tokens_so_far(hidden):
    built, x = module(hidden=hidden), vectors(2, 7, 6)
    found = run(built, x)
    for row in range(2):
        for end in range(7):
            expected = root(built, x[row, : end + 1])[0]
            if built.output is not None:
                expected = built.output(expected)
            assert (found[row, end] - expected).abs().max() < 1e-13


@torch.no_grad()
@pytest.mark.parametrize("time", [1, 2, 9])
def test_a_sentence_takes_n_choose_two_merges_whose_gates_sum_to_one(time):
    built, x = module(), vectors(1, time, 6)
    seen = []
    handle = built.gates.register_forward_hook(lambda _, inputs, output: seen.append(output[0]))
    run(built, x)
    handle.remove()
    nodes = torch.cat(seen) if seen else torch.empty(0, 3, dtype=torch.float64)
    assert len(nodes) == time * (time - 1) // 2
    assert ((nodes.sum(-1) - 1).abs() < 1e-15).all()
    expected = root(built, x[0])[1]
    assert all((node - gates).abs().max() < 1e-13 for node, gates in zip(nodes, expected, strict=True))


@torch.no_grad()
def test_gates_that_only_copy_give_the_first_or_the_last_word():
    built, x = module(), vectors(2, 5, 6)
    leaves = built.input(x)
    for chosen, expected in ((1, leaves[:, 0]), (2, leaves[:, -1])):
        built.left.weight[-3:] = 0.0
        built.right.weight[-3:] = 0.0
        built.right.bias[-3:] = torch.tensor([200.0 if gate == chosen else 0.0 for gate in range(3)])
        assert (run(built, x)[:, -1] - expected).abs().max() < 1e-13


@torch.no_grad()
def test_the_last_gates_are_a_tap():
    built, x = module(), vectors(2, 5, 6)
    with record(built, ["gates"]) as seen:
        run(built, x)
    assert seen["gates"].shape == (2, 1, 3)  # the root's, of the last level


def test_gradients_reach_every_weight():
    built, x = module(hidden=3), vectors(1, 4, 6)

    def last(*parameters):
        with torch.nn.utils.stateless._reparametrize_module(built, dict(zip(names, parameters, strict=True))):
            return run(built, x)

    names = [name for name, _ in built.named_parameters()]
    torch.autograd.gradcheck(last, tuple(built.parameters()), atol=1e-6)


def test_a_cache_of_another_mixer_and_a_wrong_width_are_refused():
    built, x = module(), vectors(1, 3, 6)
    other = GRU().build(6).new_cache(1, 4, torch.float64, x.device)
    with pytest.raises(TypeError, match="GRConv was given a StateCache"):
        built(x, Placement().resolve(1, 3, x.device).at(other))
    with pytest.raises(ValueError, match=r"GRConv\.hidden must be at least 1, got 0"):
        GRConv(hidden=0)
