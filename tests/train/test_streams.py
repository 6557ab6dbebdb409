"""Carried states: chunks give what one long pass gives, gradients stop at a chunk, a run resumes bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from paperworks import train
from paperworks.models import Block, Decoder, NoResidual
from paperworks.nn import GRU, LSTM, Attention, Elman, Mamba
from paperworks.nn.identity_norm import NoNorm
from paperworks.train.streams import Streams

from .small import same_bits, weights


def model(mixer=None, seed=0):
    torch.manual_seed(seed)
    block = Block(norm=NoNorm(), arrangement=NoResidual(), mixer=mixer or LSTM())
    return Decoder(vocab_size=7, dim=6, depth=2, block=block, norm=None, init_std=0.4).build().double()


def text(length=43):
    return torch.randint(0, 7, (length,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "mixer", [LSTM(peepholes=True), GRU(), Elman(), Mamba(state=3, rank=2)], ids=lambda m: type(m).__name__
)
def test_a_chunked_reading_is_one_long_reading(mixer):
    net, tokens = model(mixer), text()
    streams = Streams(tokens, batch=2, length=5)
    rows = torch.stack((tokens[:22], tokens[21:43]))
    whole = functional.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert len(streams) == 5
    for _ in range(2):  # and the second epoch begins from nothing again
        assert abs(train.evaluate(net, streams.loss, streams)["loss"] - whole.item()) < 1e-12


def test_every_token_is_a_target_once_and_streams_go_on_where_they_were():
    tokens = torch.arange(43)
    batches = list(Streams(tokens, batch=2, length=5))
    assert [batch["tokens"].shape[1] for batch in batches] == [5, 5, 5, 5, 1]
    for row, first in enumerate((0, 21)):
        assert torch.cat([batch["tokens"][row] for batch in batches]).tolist() == list(range(first, first + 21))
        assert torch.cat([batch["targets"][row] for batch in batches]).tolist() == list(range(first + 1, first + 22))


def test_gradients_stop_where_a_chunk_begins_and_values_do_not():
    net, streams = model(), Streams(text(), batch=2, length=5)
    first, second = list(streams)[:2]
    vectors = []
    handle = net.embedding.register_forward_hook(lambda _, inputs, output: vectors.append(output))
    streams.cache = None
    streams.loss(net, first)
    loss, count = streams.loss(net, second)
    handle.remove()
    early, late = torch.autograd.grad(loss, vectors, allow_unused=True)
    assert early is None
    assert late.abs().amax(-1).min() > 0
    assert count == 10
    streams.cache = None
    assert streams.loss(net, second)[0] != loss  # without the first chunk's state it is another loss


@pytest.mark.parametrize("stops", [[3], [2, 8], [5, 10]])
def test_a_run_resumes_bit_for_bit_with_its_state(tmp_path: Path, stops):
    settings = train.Settings(steps=13, lr=0.02, save_every=4, log_every=1)

    def run(folder, seed, stop=None):
        net, streams = model(seed=seed), Streams(text(), batch=2, length=5)
        report = train.fit(
            net, streams.loss, streams, settings, run_dir=tmp_path / folder, on_step=lambda step: step == stop
        )
        return net, report

    straight, _ = run("straight", 0)
    for seed, stop in enumerate(stops):
        run("broken", seed, stop)
    resumed, report = run("broken", 9)
    assert report.resumed_from == stops[-1]
    assert same_bits(weights(straight), weights(resumed))


def test_a_second_run_goes_on_where_the_first_one_stopped():
    for steps in (5, 3):  # a whole epoch, and a part of one
        settings = train.Settings(steps=steps, lr=0.02, schedule="constant", warmup=0, optimizer=train.SGD(), clip=None)
        both, twice = model(), model()
        streams = Streams(text(), batch=2, length=5)

        for _ in range(2):
            train.fit(twice, streams.loss, streams, settings)
        streams = Streams(text(), batch=2, length=5)
        train.fit(both, streams.loss, streams, replace(settings, steps=2 * steps))
        assert same_bits(weights(both), weights(twice))


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(ValueError, match=r"one text of integer ids, got torch.int64 \(2, 3\)"):
        Streams(torch.zeros(2, 3, dtype=torch.int64), batch=1, length=2)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Streams(text(), batch=2, length=0)
    with pytest.raises(ValueError, match="a text of 43 tokens gives no 43 streams"):
        Streams(text(), batch=43, length=2)
    streams = Streams(text(), batch=2, length=5)
    with pytest.raises(ValueError, match=r"block 0 remembers in a \w+, which grows with the text"):
        streams.loss(model(Attention(heads=2)), next(iter(streams)))
