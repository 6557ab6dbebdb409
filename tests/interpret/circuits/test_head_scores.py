import pytest
import torch

from paperworks import interpret
from paperworks.interpret.circuits import head_scores
from tests.interpret.circuits.test_acdc import TOKENS, planted
from tests.interpret.circuits.test_circuits import attention_only


def test_the_hand_set_model_gets_full_marks():
    model = planted(noise=0.0)
    with interpret.record(model, "*.pattern") as seen, torch.no_grad():
        logits = model(TOKENS)
    induction = head_scores.prefix_matching(seen["blocks.1.mixer.pattern"], 8, start=1)
    before = head_scores.previous_token(seen["blocks.0.mixer.pattern"])
    assert induction[0] > 0.99
    assert before[0] > 0.99
    assert max(induction[1], before[1]) < 0.2  # heads without weights attend uniformly
    losses = head_scores.token_losses(logits, TOKENS)
    assert losses[9:].max() < 0.01  # the second copy
    assert head_scores.in_context_score(losses, 3, 12) < -2


def test_uniform_attention_gives_the_harmonic_mean():
    time, period = 12, 4
    uniform = torch.ones(time, time).tril() / torch.arange(1, time + 1)[:, None]
    expected = sum(1 / (t + 1) for t in range(4, 12)) / 8
    assert head_scores.prefix_matching(uniform[None, None], period).item() == pytest.approx(expected, rel=1e-6)
    assert head_scores.duplicate_token(uniform[None, None], period).item() == pytest.approx(expected, rel=1e-6)
    assert head_scores.previous_token(uniform[None, None]).item() == pytest.approx(
        sum(1 / (t + 1) for t in range(1, 12)) / 11, rel=1e-6
    )


def test_the_token_after_the_previous_occurrence_is_not_the_occurrence():
    pattern = torch.zeros(1, 1, 8, 8)
    for t in range(4, 8):
        pattern[0, 0, t, t - 3] = 1.0
    assert head_scores.prefix_matching(pattern, 4).item() == 1.0
    assert head_scores.duplicate_token(pattern, 4).item() == 0.0
    pattern[0, 0, 2, 1] = 1.0  # in the first copy: not counted
    assert head_scores.prefix_matching(pattern, 4).item() == 1.0


def test_losses_are_those_of_cross_entropy():
    logits, tokens = torch.randn(3, 6, 10), torch.randint(10, (3, 6))
    losses = head_scores.token_losses(logits, tokens)
    for t in range(5):
        expected = torch.nn.functional.cross_entropy(logits[:, t], tokens[:, t + 1])
        assert losses[t].item() == pytest.approx(expected.item(), rel=1e-5)


def test_frozen_patterns_stay_whatever_else_is_edited():
    model = attention_only()
    tokens = torch.randint(31, (2, 6))
    with interpret.record(model, "*.pattern") as plain, torch.no_grad():
        before = model(tokens)
    ablate = {"blocks.0.mixer.heads": lambda heads: heads * 0}
    with (
        head_scores.frozen_patterns(model, tokens),
        interpret.edit(model, ablate),
        interpret.record(model, "*.pattern") as seen,
        torch.no_grad(),
    ):
        model(tokens)
    assert torch.equal(seen["blocks.1.mixer.pattern"], plain["blocks.1.mixer.pattern"])
    with interpret.edit(model, ablate), interpret.record(model, "*.pattern") as moved, torch.no_grad():
        model(tokens)
    assert not torch.allclose(moved["blocks.1.mixer.pattern"], plain["blocks.1.mixer.pattern"])
    with head_scores.frozen_patterns(model, tokens), torch.no_grad():
        assert (model(tokens) - before).abs().max() < 1e-10


def test_wrong_input_is_refused_with_what_would_be_right():
    with pytest.raises(ValueError, match="whole sequences"):
        head_scores.attention_to(torch.zeros(1, 2, 1, 6), 1)
    with pytest.raises(ValueError, match="has one 7 before it in a sequence of 6"):
        head_scores.attention_to(torch.zeros(1, 2, 6, 6), 7)
    with pytest.raises(ValueError, match="must come before late"):
        head_scores.in_context_score(torch.zeros(5), 3, 3)
    with pytest.raises(ValueError, match="must agree"):
        head_scores.token_losses(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
