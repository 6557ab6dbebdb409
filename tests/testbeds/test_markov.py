import itertools

import pytest
import torch

from paperworks.testbeds.markov import MarkovChain


def test_rows_are_chances_with_so_many_successors() -> None:
    chances = MarkovChain(alphabet=7, successors=3, seed=4).transitions()
    assert torch.allclose(chances.sum(1), torch.ones(7, dtype=torch.float64))
    assert ((chances > 0).sum(1) == 3).all()


def test_drawn_strings_follow_the_chain() -> None:
    chain = MarkovChain(alphabet=5, successors=2)
    strings = chain.draw(4000, 6, torch.Generator().manual_seed(1))
    assert chain.valid(strings).all()
    counts = torch.zeros(5, 5)
    counts.index_put_((strings[:, :-1].flatten(), strings[:, 1:].flatten()), torch.ones(20_000), accumulate=True)
    assert (counts / counts.sum(1, keepdim=True) - chain.transitions()).abs().max() < 0.03  # 4,000 draws a row
    forbidden = torch.tensor([[0, int(chain.transitions()[0].argmin())]])
    assert not chain.valid(forbidden).any()


def test_the_posterior_is_the_sum_over_all_strings() -> None:
    chain = MarkovChain(alphabet=4, successors=2, seed=3)
    known = torch.tensor([-1, 2, -1, -1, 1])
    chances = chain.transitions()
    total = torch.zeros(5, 4, dtype=torch.float64)
    for string in itertools.product(range(4), repeat=5):
        if any(k >= 0 and k != s for k, s in zip(known.tolist(), string, strict=True)):
            continue
        weight = 1.0
        for a, b in itertools.pairwise(string):
            weight *= float(chances[a, b])
        for place, letter in enumerate(string):
            total[place, letter] += weight
    expected = total / total.sum(1, keepdim=True)
    assert torch.allclose(chain.posterior(known), expected, atol=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="successors must be in"):
        MarkovChain(alphabet=3, successors=4)
    chain = MarkovChain(alphabet=5, successors=1)  # a cycle: only the next letter follows
    with pytest.raises(ValueError, match="cannot write"):
        chain.posterior(torch.tensor([0, 3]))
