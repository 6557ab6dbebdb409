"""What char-rnn's claims lean on: a backward pass by hand, and a text whose quotes are known."""

import pytest
import torch

from paperworks import train
from paperworks.nn import Elman
from paperworks.papers.recurrent import char_rnn


def model():
    torch.manual_seed(1)
    return char_rnn.network(Elman(), 9, 6, layers=1).build().double()


@pytest.mark.parity
def test_the_backward_pass_by_hand_is_autograds_and_the_numerical_one():
    net, tokens = model(), torch.randint(9, (21,), generator=torch.Generator().manual_seed(2))
    weights = char_rnn._by_name(net)
    loss, gradients = char_rnn._hand(weights, tokens)
    batch = {"tokens": tokens[None, :-1], "targets": tokens[None, 1:]}
    expected = train.next_token_loss(net, batch)[0]
    assert abs(loss - expected.item()) < 1e-12
    expected.backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() < 1e-12
    assert max(char_rnn._relative_errors(weights, tokens, gradients)) < 1e-6
    wrong = {name: 1.01 * gradient for name, gradient in gradients.items()}
    assert max(char_rnn._relative_errors(weights, tokens, wrong)) > 1e-3


def test_quotes_open_and_close_in_turn_and_only_the_memory_tells_which():
    text, inside = char_rnn._quoted(4000, 3)
    assert len(text) == len(inside) == 4000
    state, since = False, 0
    for at in range(3999):
        if text[at] == char_rnn.QUOTE:
            assert char_rnn.SHORTEST <= since <= char_rnn.LONGEST
            assert (text[at + 1] == char_rnn.END) == state
            state, since = not state, 0
        elif text[at] != char_rnn.END:
            assert bool(inside[at]) == state
            since += 1
    shares = [torch.bincount(text[(text >= 2) & (inside == where)] - 2) for where in (True, False)]
    assert (shares[0] / shares[0].sum() - shares[1] / shares[1].sum()).abs().max() < 0.05
