"""Dynamic evaluation against the loop written out: score a token, then learn from it."""

import copy

import pytest
import torch

from paperworks.models import Block, Decoder, NoResidual
from paperworks.nn import Elman
from paperworks.nn.identity_norm import NoNorm
from paperworks.train.dynamic_evaluation import dynamic_log_probabilities, stream_log_probabilities

from .small import same_bits, weights


def model(dropout=0.0):
    torch.manual_seed(0)
    block = Block(norm=NoNorm(), arrangement=NoResidual(), mixer=Elman(activation="sigmoid"), dropout=dropout)
    return Decoder(vocab_size=7, dim=6, depth=1, block=block, norm=None, init_std=0.4).build().double()


def text(length=23):
    return torch.randint(0, 7, (length,), generator=torch.Generator().manual_seed(3))


def by_hand(net, tokens, lr, length):
    """The same with torch alone: a state handed on without its gradient, weights moved after each chunk."""
    net, mixer = copy.deepcopy(net), None
    (block,) = net.blocks
    mixer, state, found = block.mixer, torch.zeros(6, dtype=torch.float64), []
    for start in range(0, len(tokens) - 1, length):
        loss = 0.0
        for at in range(start, min(start + length, len(tokens) - 1)):
            state = torch.sigmoid(mixer.input(net.embedding.weight[tokens[at]]) + mixer.recurrent(state))
            log = (net.unembedding(state)).log_softmax(-1)[tokens[at + 1]]
            found.append(log.item())
            loss = loss - log
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient
        state = state.detach()
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 4, 50])
def test_a_chunk_is_scored_before_it_is_learned_from(length):
    net, tokens = model(), text()
    before = weights(net)
    found = dynamic_log_probabilities(net, tokens, lr=0.3, length=length)
    assert (found - by_hand(net, tokens, 0.3, length)).abs().max() < 1e-12
    assert same_bits(weights(net), before)


def test_the_first_chunk_is_scored_by_the_model_as_it_came_and_rate_zero_is_the_static_model():
    net, tokens = model(dropout=0.5), text()
    static = stream_log_probabilities(net, tokens, length=5)
    assert (static - stream_log_probabilities(net, tokens)).abs().max() < 1e-12
    dynamic = dynamic_log_probabilities(net, tokens, lr=0.3, length=4)
    assert (dynamic[:4] - static[:4]).abs().max() < 1e-12
    assert (dynamic[4:] - static[4:]).abs().max() > 1e-3
    assert (dynamic_log_probabilities(net, tokens, lr=1e-12, length=4) - static).abs().max() < 1e-9  # no dropout here
    other = tokens.clone()
    other[12:] = (other[12:] + 1) % 7  # what comes later changes no score
    assert torch.equal(
        dynamic_log_probabilities(net, other, lr=0.3)[:11], dynamic_log_probabilities(net, tokens, lr=0.3)[:11]
    )


def test_a_text_that_repeats_is_learned():
    net, tokens = model(), text(6).repeat(12)
    static = stream_log_probabilities(net, tokens)
    assert dynamic_log_probabilities(net, tokens, lr=0.3)[-12:].mean() > static[-12:].mean() + 0.5


def test_one_token_is_no_text():
    with pytest.raises(ValueError, match="tokens has 1; at least 2"):
        dynamic_log_probabilities(model(), text(1))
