"""Mamba against transformers', its scan against a plain recurrence, and what the paper says its special cases are."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from paperworks import train
from paperworks.models import Block, Decoder
from paperworks.nn import Mamba, Placement, RMSNorm
from paperworks.nn.recurrent import mamba
from paperworks.nn.recurrent.mamba import selective_scan
from paperworks.nn.recurrent.recurrence import linear_recurrence
from paperworks.train.optim.parameter_groups import undecayed


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scan_arguments(batch=2, time=11, channels=3, state=4):
    sizes = (
        [(batch, time, channels)] * 2 + [(channels, state)] + [(batch, time, state)] * 2 + [(batch, channels, state)]
    )
    made = [draws(*size, seed=index) for index, size in enumerate(sizes)]
    made[1], made[2] = made[1].abs(), -made[2].abs()
    return [tensor.requires_grad_() for tensor in made]


def plain_scan(x, delta, decay, into, out, initial, begins=None):
    factors = torch.exp(delta[..., None] * decay)
    if begins is not None:
        factors = factors.masked_fill(begins[..., None, None], 0.0)
    states = linear_recurrence(factors, (delta * x)[..., None] * into[:, :, None, :], initial)
    return torch.einsum("btcn,btn->btc", states, out), states[:, -1]


@pytest.mark.parametrize("chunk", [1, 4, 11, 32])
@pytest.mark.parametrize("packed", [False, True])
def test_the_scan_in_pieces_equals_the_recurrence_with_all_gradients(monkeypatch, chunk, packed):
    monkeypatch.setattr(mamba, "CHUNK", chunk)
    begins = None
    if packed:
        begins = torch.zeros(2, 11, dtype=torch.bool)
        begins[0, 5] = begins[1, 0] = begins[1, 8] = True
    ours, theirs = scan_arguments(), scan_arguments()
    results = selective_scan(*ours, begins), plain_scan(*theirs, begins)
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() < 1e-13
    for scanned, last in results:
        ((scanned * draws(2, 11, 3, seed=9)).sum() + (last * draws(2, 3, 4, seed=8)).sum()).backward()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad - other.grad).abs().max() < 1e-12


def copied(ours, theirs):
    """Give transformers' mixer our weights."""
    for mine, name in (
        ("input", "in_proj"),
        ("select", "x_proj"),
        ("step", "dt_proj"),
        ("output", "out_proj"),
        ("convolution", "conv1d"),
    ):
        getattr(theirs, name).load_state_dict(getattr(ours, mine).state_dict())
    with torch.no_grad():
        theirs.A_log.copy_(ours.log_decay)
        theirs.D.copy_(ours.skip)


@pytest.mark.parity
@pytest.mark.parametrize("time", [1, 9, 70])
def test_the_mixer_is_transformers(time):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    ours = Mamba(state=5, rank=3).build(16)
    theirs = MambaMixer(MambaConfig(hidden_size=16, state_size=5, time_step_rank=3, num_hidden_layers=1), 0)
    copied(ours, theirs)
    x = torch.randn(2, time, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, expected = ours(x, Placement().resolve(2, time, x.device)), theirs.eval()(y)
    assert (found - expected).abs().max() < 1e-6
    upstream = torch.randn_like(found)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-5
    assert (ours.log_decay.grad - theirs.A_log.grad).abs().max() < 1e-5
    assert (ours.step.bias.grad - theirs.dt_proj.bias.grad).abs().max() < 1e-5


def test_theorem_1_one_state_is_a_gated_rnn():
    """N = 1, A = -1, B = 1 and exact zero-order hold: h = (1 - g) h + g x with g = sigmoid(Linear x).

    exp(-softplus(z)) = 1 - sigmoid(z), and the hold's drive is 1 - exp(-Delta) = g; our drive is the Euler step Delta,
    so x is scaled by g / Delta here.
    """
    z, x = draws(2, 9, 3), draws(2, 9, 3, seed=1)
    delta, gate = functional.softplus(z), torch.sigmoid(z)
    ones = torch.ones(2, 9, 1, dtype=torch.float64)
    scanned, _ = selective_scan(x * gate / delta, delta, -ones[0, :3], ones, ones)
    state, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for step in range(9):
        state = (1 - gate[:, step]) * state + gate[:, step] * x[:, step]
        expected.append(state)
    assert (scanned - torch.stack(expected, 1)).abs().max() < 1e-14


def test_constant_parameters_make_a_convolution():
    delta = draws(3).abs().expand(1, 9, 3)
    decay, into, out, x = -draws(3, 4, seed=1).abs(), draws(4, seed=2), draws(4, seed=3), draws(1, 9, 3, seed=4)
    scanned, _ = selective_scan(x, delta, decay, into.expand(1, 9, 4), out.expand(1, 9, 4))
    powers = torch.arange(9.0, dtype=torch.float64)[:, None, None]
    kernel = (torch.exp(powers * delta[0, 0, :, None] * decay) * delta[0, 0, :, None] * into * out).sum(-1)  # (9, 3)
    expected = [sum(kernel[back] * x[0, step - back] for back in range(step + 1)) for step in range(9)]
    assert (scanned[0] - torch.stack(expected)).abs().max() < 1e-14


@torch.no_grad()
def test_it_begins_as_the_reference_does():
    torch.manual_seed(0)
    norm = RMSNorm()
    model = Decoder(vocab_size=9, dim=64, depth=4, norm=norm, block=Block(norm=norm, mixer=Mamba())).build()
    mixer = model.blocks[0].mixer
    assert torch.allclose(mixer.log_decay.exp(), torch.arange(1.0, 17.0).expand(128, 16))
    assert torch.equal(mixer.skip, torch.ones(128))
    steps = functional.softplus(mixer.step.bias)
    assert 1e-3 <= float(steps.min()) <= float(steps.max()) <= 0.1
    assert float(mixer.step.weight.abs().max()) <= mixer.rank**-0.5
    bound = 128**-0.5 / 4**0.5  # Kaiming uniform with a = sqrt(5) is uniform on +- fan_in^-0.5; divided by sqrt(depth)
    assert 0.9 * bound < float(mixer.output.weight.abs().max()) <= bound


def test_weight_decay_leaves_the_decays_alone():
    mixer = Mamba().build(16)
    left = undecayed(mixer)
    assert {id(mixer.log_decay), id(mixer.skip), id(mixer.step.bias), id(mixer.convolution.bias)} <= left
    assert id(mixer.input.weight) not in left


@torch.no_grad()
def test_the_state_does_not_grow_and_is_kept_in_float32():
    mixer = Mamba().build(16).bfloat16()
    short, long = (mixer.new_cache(2, capacity, torch.bfloat16, torch.device("cpu")) for capacity in (8, 100_000))
    assert short.bytes() == long.bytes()
    x = torch.randn(2, 5, 16).bfloat16()
    assert mixer(x, Placement().resolve(2, 5, x.device).at(long)).dtype == torch.bfloat16
    assert long["state"].dtype == torch.float32


def test_it_learns_to_copy_and_the_loop_trains_it():
    norm = RMSNorm()
    spec = Decoder(vocab_size=7, dim=16, depth=1, norm=norm, block=Block(norm=norm, mixer=Mamba(state=4)))
    torch.manual_seed(0)
    model = spec.build()
    tokens = torch.randint(0, 7, (8, 6)).repeat(1, 2)
    settings = train.Settings(steps=40, lr=1e-2, progress=False, log_every=40)
    report = train.fit(model, train.next_token_loss, [tokens], settings)
    assert report.losses[-1] < 0.5 * report.losses[0]


def test_sizes_that_cannot_be_are_named():
    for field in ("state", "expand", "width", "rank"):
        with pytest.raises(ValueError, match=rf"Mamba\.{field} must be at least 1, got 0"):
            replace(Mamba(), **{field: 0})
