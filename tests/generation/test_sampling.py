import pytest
import torch

from paperworks.generation import Sampling, penalize_repetition


def kept(sampling, logits):
    return torch.isfinite(sampling.filter(logits[None])[0]).nonzero().flatten().tolist()


def test_filters_keep_exactly_the_tokens_of_their_definitions():
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = probabilities.log()
    assert kept(Sampling(top_k=2), logits) == [0, 1]
    assert kept(Sampling(top_p=0.6), logits) == [0, 1]  # the smallest set that reaches 0.6
    assert kept(Sampling(top_p=0.71), logits) == [0, 1, 2]
    assert kept(Sampling(top_p=1e-6), logits) == [0]  # the likeliest always stays
    assert kept(Sampling(min_p=0.25), logits) == [0, 1, 2, 3]
    assert kept(Sampling(min_p=1.0), logits) == [0]
    assert kept(Sampling(top_k=3, top_p=0.7), logits) == [0, 1]  # top-p of what top-k left: 0.4 and 0.3 of 0.85


@pytest.mark.parity
def test_filters_equal_transformers():
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 50) * 3
    seen = torch.randint(0, 50, (4, 9))
    cases = [
        (Sampling(top_k=7), TopKLogitsWarper(7)),
        (Sampling(top_p=0.8), TopPLogitsWarper(0.8)),
        (Sampling(min_p=0.1), MinPLogitsWarper(0.1)),
    ]
    for ours, theirs in cases:
        assert torch.equal(torch.isfinite(ours.filter(logits)), torch.isfinite(theirs(seen, logits.clone())))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    assert torch.allclose(penalize_repetition(logits, seen, 1.3), expected)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    counts = Sampling().choose(logits, generator=generator).bincount(minlength=3) / 20_000
    assert (counts - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.015  # four standard errors
    sharper = Sampling(temperature=0.5).choose(logits, generator=generator).bincount(minlength=3) / 20_000
    assert (sharper - torch.tensor([0.25, 0.09, 0.04]) / 0.38).abs().max() < 0.015


def test_greedy_takes_the_likeliest_and_the_penalty_moves_it():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    assert Sampling(temperature=0.0).choose(logits).item() == 0
    penalized = Sampling(temperature=0.0, repetition_penalty=1.2)
    assert penalized.choose(logits, torch.tensor([[0, -1]])).item() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Sampling(**{name: value})
