"""Elman networks, LSTM and GRU against torch's and against their equations, one token at a time."""

from dataclasses import replace

import pytest
import torch

from paperworks.interpret import record
from paperworks.models import Block, Decoder, NoResidual
from paperworks.nn import GRU, LSTM, Elman, Placement
from paperworks.nn.identity_norm import NoNorm


def vectors(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def module(spec, dim=6):
    torch.manual_seed(0)
    built = spec.build(dim).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return built


def run(built, x):
    return built(x, Placement().resolve(len(x), x.shape[1], x.device))


@pytest.mark.parity
@pytest.mark.parametrize("loop", [False, True], ids=["kernel", "loop"])
@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (LSTM(), torch.nn.LSTM),
        (GRU(reset="after"), torch.nn.GRU),
        (Elman(), torch.nn.RNN),
        (Elman(activation="relu"), lambda *a, **k: torch.nn.RNN(*a, nonlinearity="relu", **k)),
    ],
    ids=["lstm", "gru", "tanh", "relu"],
)
def test_it_is_torchs_layer_with_its_gradients(spec, kind, loop, monkeypatch):
    ours, theirs = module(spec), kind(6, 6, batch_first=True, dtype=torch.float64)
    if loop:
        monkeypatch.setattr(ours, "fused", lambda x, state: None)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input.weight)
        theirs.weight_hh_l0.copy_(ours.recurrent.weight)
        theirs.bias_ih_l0.copy_(ours.input.bias)
        theirs.bias_hh_l0.copy_(0 if ours.recurrent.bias is None else ours.recurrent.bias)
    x, y = vectors(2, 7, 6).requires_grad_(), vectors(2, 7, 6).requires_grad_()
    found, expected = run(ours, x), theirs(y)[0]
    assert (found - expected).abs().max() < 1e-14
    found.square().sum().backward()
    expected.square().sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-13
    assert (ours.recurrent.weight.grad - theirs.weight_hh_l0.grad).abs().max() < 1e-13


def gates(ours, x, h, count):
    return (ours.input(x) + ours.recurrent(h)).chunk(count, -1)


@torch.no_grad()
def test_peepholes_let_gates_see_the_cell():
    """Graves 2013, equations 7 to 11: the output gate sees the new cell, the others the old one."""
    ours, x = module(LSTM(peepholes=True)), vectors(2, 7, 6)
    h = c = torch.zeros(2, 6, dtype=torch.float64)
    expected = []
    for step in range(7):
        i, f, g, o = gates(ours, x[:, step], h, 4)
        enter, forget = torch.sigmoid(i + ours.peephole[0] * c), torch.sigmoid(f + ours.peephole[1] * c)
        c = forget * c + enter * torch.tanh(g)
        h = torch.sigmoid(o + ours.peephole[2] * c) * torch.tanh(c)
        expected.append(h)
    assert (run(ours, x) - torch.stack(expected, 1)).abs().max() < 1e-14


@torch.no_grad()
def test_the_normed_lstm_norms_both_maps_and_the_cell():
    """Ba et al. 2016, supplementary equations 20 to 22."""
    ours, x = module(LSTM(layer_norm=True)), vectors(2, 7, 6)

    def norm(a, gain, bias=0.0):
        return (a - a.mean(-1, keepdim=True)) / (a.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * gain + bias

    h = c = torch.zeros(2, 6, dtype=torch.float64)
    expected = []
    for step in range(7):
        a = norm(h @ ours.recurrent.weight.t(), ours.recurrent_norm.weight)
        a = a + norm(x[:, step] @ ours.input.weight.t(), ours.input_norm.weight) + ours.gate_bias
        i, f, g, o = a.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(norm(c, ours.cell_norm.weight, ours.cell_norm.bias))
        expected.append(h)
    assert (run(ours, x) - torch.stack(expected, 1)).abs().max() < 1e-14


@torch.no_grad()
def test_the_papers_gru_resets_before_the_product():
    ours, x = module(GRU()), vectors(2, 7, 6)
    weights = ours.recurrent.weight.chunk(3)
    h, expected = torch.zeros(2, 6, dtype=torch.float64), []
    for step in range(7):
        r, z, n = ours.input(x[:, step]).chunk(3, -1)
        r, z = torch.sigmoid(r + h @ weights[0].t()), torch.sigmoid(z + h @ weights[1].t())
        h = z * h + (1 - z) * torch.tanh(n + (r * h) @ weights[2].t())
        expected.append(h)
    assert (run(ours, x) - torch.stack(expected, 1)).abs().max() < 1e-14


@torch.no_grad()
def test_a_gru_that_keeps_everything_copies_and_one_that_keeps_nothing_is_elmans():
    x = vectors(2, 7, 6)
    for reset in ("before", "after"):
        ours = module(GRU(reset=reset))
        ours.input.bias[6:12] = 1e3  # z = 1
        assert run(ours, x).abs().max() == 0.0  # the state before the first token
        ours.input.bias[6:12], ours.input.bias[:6] = -1e3, 1e3  # z = 0, r = 1
        elman = module(Elman())
        elman.input.weight.copy_(ours.input.weight[12:])
        elman.recurrent.weight.copy_(ours.recurrent.weight[12:])
        extra = 0 if ours.recurrent.bias is None else ours.recurrent.bias[12:]
        elman.input.bias.copy_(ours.input.bias[12:] + extra)
        assert (run(ours, x) - run(elman, x)).abs().max() < 1e-14


@torch.no_grad()
def test_cells_can_be_recorded_and_recording_changes_nothing_but_the_order_of_sums():
    ours, x = module(LSTM()), vectors(2, 7, 6)
    plain = run(ours, x)
    with record(ours, ["cell", "state"]) as seen:
        recorded = run(ours, x)
    assert (recorded - plain).abs().max() < 1e-14
    assert torch.equal(seen["state"], recorded)
    assert seen["cell"].shape == (2, 7, 6)
    assert (seen["cell"].tanh().abs() >= recorded.abs()).all()  # the output gate only shrinks


@torch.no_grad()
def test_stacked_layers_are_torchs_stack():
    """A plain block adds nothing, so two of them are a network of two layers."""
    block = Block(norm=NoNorm(), mixer=LSTM(), arrangement=NoResidual())
    model = Decoder(vocab_size=9, dim=6, depth=2, block=block, norm=None).build().double()
    theirs = torch.nn.LSTM(6, 6, 2, batch_first=True, bias=True, dtype=torch.float64)
    for layer, part in enumerate(model.blocks):
        getattr(theirs, f"weight_ih_l{layer}").copy_(part.mixer.input.weight)
        getattr(theirs, f"weight_hh_l{layer}").copy_(part.mixer.recurrent.weight)
        getattr(theirs, f"bias_ih_l{layer}").copy_(part.mixer.input.bias)
        getattr(theirs, f"bias_hh_l{layer}").zero_()
    tokens = torch.randint(0, 9, (2, 7))
    assert (model.hidden(tokens) - theirs(model.embedding(tokens))[0]).abs().max() < 1e-14


@torch.no_grad()
def test_the_forget_gate_begins_open():
    block = Block(norm=NoNorm(), mixer=LSTM(forget_bias=2.0), arrangement=NoResidual())
    mixer = Decoder(vocab_size=9, dim=6, depth=1, block=block, norm=None).build().blocks[0].mixer
    assert mixer.input.bias.tolist() == [0.0] * 6 + [2.0] * 6 + [0.0] * 12
    assert 0 < float(mixer.recurrent.weight.abs().max()) <= 6**-0.5


def test_options_that_cannot_be_say_why():
    with pytest.raises(ValueError, match="nobody has said where the norms stand"):
        LSTM(peepholes=True, layer_norm=True)
    for spec in (LSTM(), GRU(), Elman()):
        with pytest.raises(ValueError, match=r"hidden must be at least 1, got 0"):
            replace(spec, hidden=0)
    with pytest.raises(ValueError, match=r"Elman\.activation must be one of 'tanh', 'sigmoid', 'relu'"):
        Elman(activation="gelu")
