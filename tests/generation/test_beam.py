import pytest
import torch

from paperworks.generation import beam_search

from .small import build, reference


def exhaustive(model, prompt, length, penalty, stop):
    """Every continuation scored: what beam search finds when it has beams for all of them."""
    best = (-float("inf"), [])

    def extend(tokens, score, new):
        nonlocal best
        if new and (new[-1] == stop or len(new) == length):
            value = score / len(new) ** penalty
            if value > best[0]:
                best = (value, new[:-1] if new[-1] == stop else new)
            return
        logp = torch.log_softmax(model(torch.tensor([tokens]))[0, -1], -1)
        for token in range(len(logp)):
            extend([*tokens, token], score + float(logp[token]), [*new, token])

    extend(prompt, 0.0, [])
    return best[1]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@torch.no_grad()
def test_wide_beam_search_finds_the_best_of_all_sequences(penalty):
    model = build(vocab_size=5).eval()
    found = beam_search(model, [[1, 2]], beams=125, max_new_tokens=3, length_penalty=penalty, stop_tokens=[4], pad=-1)
    expected = exhaustive(model, [1, 2], 3, penalty, 4)
    assert [token for token in found[0].tolist() if token >= 0] == expected


@torch.no_grad()
def test_one_beam_is_greedy_and_batches_do_not_mix():
    model = build()
    greedy = reference(model, [3, 4], 6)
    assert beam_search(model, [[3, 4]], beams=1, max_new_tokens=6)[0].tolist() == greedy
    apart = [beam_search(model, [prompt], beams=3, max_new_tokens=6)[0].tolist() for prompt in ([3, 4], [9, 8, 7])]
    assert beam_search(model, [[3, 4], [9, 8, 7]], beams=3, max_new_tokens=6).tolist() == apart
