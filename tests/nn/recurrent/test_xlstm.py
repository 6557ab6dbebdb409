"""xLSTM's memories against their recurrences written out, without the stabiliser where it is not needed."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from paperworks.nn import MLSTM, SLSTM, Placement
from paperworks.nn.recurrent import xlstm
from paperworks.nn.recurrent.xlstm import matrix_memory


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arguments(time=9, size=5):
    made = [draws(2, 3, time, size, seed=index) for index in range(3)]
    made += [draws(2, 3, time, seed=3), 2 + draws(2, 3, time, seed=4)]
    return [tensor.requires_grad_() for tensor in made]


def by_recurrence(query, key, value, enter, forget):
    """The paper's equations 19 to 27, unstabilised: fine for small gates."""
    batch, heads, time, size = query.shape
    matrix, norm, outputs = query.new_zeros(batch, heads, size, size), query.new_zeros(batch, heads, size), []
    for t in range(time):
        i, f = torch.exp(enter[:, :, t, None]), torch.sigmoid(forget[:, :, t, None])
        k = key[:, :, t] / size**0.5
        matrix = f[..., None] * matrix + i[..., None] * value[:, :, t, :, None] * k[..., None, :]
        norm = f * norm + i * k
        q = query[:, :, t]
        top = (matrix @ q[..., None]).squeeze(-1)
        outputs.append(top / torch.clamp((norm * q).sum(-1, keepdim=True).abs(), min=1.0))
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("piece", [1, 4, 64])
def test_the_parallel_form_is_the_recurrence_with_its_gradients(monkeypatch, piece):
    monkeypatch.setattr(xlstm, "PIECE", piece)
    ours, theirs = arguments(), arguments()
    found, expected = matrix_memory(*ours)[0], by_recurrence(*theirs)
    assert (found - expected).abs().max() < 1e-13
    upstream = draws(*found.shape, seed=9)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad - other.grad).abs().max() < 1e-12


@pytest.mark.parity
@torch.no_grad()
def test_the_memory_is_transformers_recurrent_kernel():
    """transformers' xLSTM is the later 7B block; its cell is the paper's."""
    from transformers.models.xlstm import modeling_xlstm

    query, key, value, enter, forget = (tensor.detach() for tensor in arguments())
    found, (matrix, norm, stabiliser) = matrix_memory(query, key, value, enter, forget)
    out, (theirs, their_norm, their_stabiliser) = modeling_xlstm.mlstm_recurrent_sequence_native(
        query, key, value, enter, forget, return_last_states=True, eps=0.0
    )
    assert (found - out).abs().max() < 3e-6  # theirs keeps its states in float32
    # they scale the query by size^-0.5, we the key, so memories differ by it
    scale = query.shape[-1] ** -0.5
    assert (matrix - theirs * scale).abs().max() < 1e-5
    assert (norm - their_norm * scale).abs().max() < 1e-5
    assert (stabiliser - their_stabiliser.squeeze(-1)).abs().max() < 1e-5


@torch.no_grad()
def test_open_gates_without_a_normalizer_are_linear_attention():
    """i = f = 1: the numerator is sum over s <= t of v_s (k_s . q_t); the denominator is undone here."""
    query, key, value, enter, forget = (tensor.detach() for tensor in arguments())
    found = matrix_memory(query, key, value, torch.zeros_like(enter), torch.full_like(forget, 1e3))[0]
    scores = (query @ key.transpose(-1, -2)).tril() / 5**0.5
    expected = scores @ value / scores.sum(-1, keepdim=True).abs().clamp(min=1.0)
    assert (found - expected).abs().max() < 1e-13


@torch.no_grad()
def test_large_gates_neither_overflow_nor_lose_the_past():
    query, key, value, enter, forget = (tensor.detach().float() for tensor in arguments())
    found = matrix_memory(query, key, value, 200 * enter, forget)[0]
    assert torch.isfinite(found).all()
    wide = matrix_memory(*(t.double() for t in (query, key, value, 200 * enter, forget)))[0]
    assert (found - wide).abs().max() < 1e-3 * wide.abs().max()


def naive_slstm(module, x):
    """Equations 8 to 17 of the paper, unstabilised, one token and one head at a time."""
    spec = module.spec
    convolved = functional.silu(module.convolution(x)[0])
    inputs = [module.enter(convolved), module.forget(convolved), module.candidate(x), module.leave(x)]
    size = module.size
    rows = []
    for head in range(spec.heads):
        part = slice(head * size, (head + 1) * size)
        h = c = n = torch.zeros(len(x), size, dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            raw = torch.cat([gate[:, t, part] for gate in inputs], -1) + module.bias[head]
            i, f, z, o = (raw + h @ module.recurrent[head]).chunk(4, -1)
            f = torch.sigmoid(f) if spec.forget == "sigmoid" else torch.exp(f)
            c = f * c + torch.exp(i) * torch.tanh(z)
            n = f * n + torch.exp(i)
            h = torch.sigmoid(o) * c / n
            outputs.append(h)
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("forget", ["sigmoid", "exponential"])
def test_the_scalar_memory_is_its_recurrence_with_its_gradients(forget):
    torch.manual_seed(0)
    module = SLSTM(heads=2, forget=forget).build(8).double()
    with torch.no_grad():
        module.recurrent.normal_(0, 0.5)
        module.bias.normal_(0, 0.5)
    x, y = draws(2, 7, 8).requires_grad_(), draws(2, 7, 8).requires_grad_()
    found = module(x, Placement().resolve(2, 7, x.device))
    expected = module.norm(naive_slstm(module, y))
    assert (found - expected).abs().max() < 1e-11
    (found * draws(2, 7, 8, seed=3)).sum().backward()
    (expected * draws(2, 7, 8, seed=3)).sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-9


@torch.no_grad()
def test_with_a_sigmoid_input_gate_the_scalar_memory_would_be_an_lstm():
    """n stays 1 when i = 1 - f: then c is the LSTM's cell with coupled gates, and only the output tanh is missing."""
    torch.manual_seed(0)
    module = SLSTM(heads=1, width=1).build(4).double()
    module.bias[:, 4:8] = 3.0
    f = torch.sigmoid(torch.tensor(3.0, dtype=torch.float64))
    module.enter.weight.zero_()
    module.forget.weight.zero_()
    module.bias[:, :4] = torch.log(1 - f)
    x = draws(1, 200, 4)
    hidden = naive_slstm(module, x)[0, 0]
    cell, n = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    z, o = torch.tanh(module.candidate(x))[0], torch.sigmoid(module.leave(x))[0]
    for t in range(200):
        cell, n = f * cell + (1 - f) * z[t], f * n + (1 - f)
        assert (hidden[t] - o[t] * cell / n).abs().max() < 1e-12
    assert (n - 1).abs().max() < 1e-4  # after 200 tokens: what an LSTM with i = 1 - f would divide by


@torch.no_grad()
def test_memories_do_not_grow_and_are_float32():
    for spec in (MLSTM(heads=2), SLSTM(heads=2)):
        module = spec.build(8).bfloat16()
        short, long = (module.new_cache(2, size, torch.bfloat16, torch.device("cpu")) for size in (8, 100_000))
        assert short.bytes() == long.bytes()
        x = torch.randn(2, 5, 8).bfloat16()
        assert module(x, Placement().resolve(2, 5, x.device).at(long)).dtype == torch.bfloat16
        assert long["stabiliser"].dtype == torch.float32


@torch.no_grad()
def test_gates_begin_as_the_reference_has_them():
    module = MLSTM(heads=4).build(16)
    assert torch.allclose(module.forget.bias, torch.tensor([3.0, 4.0, 5.0, 6.0]))
    assert not module.enter.weight.any()
    assert not SLSTM(heads=4).build(16).recurrent.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLSTM(heads=3).build(16), r"MLSTM\.heads \(3\) must divide expand x dim \(2 x 16\)"),
        (lambda: MLSTM(block=3, heads=2).build(16), r"MLSTM\.block \(3\) must divide"),
        (lambda: SLSTM(heads=3).build(16), r"SLSTM\.heads \(3\) must divide dim \(16\)"),
        (lambda: SLSTM(forget="tanh"), r"SLSTM\.forget must be 'sigmoid' or 'exponential'"),
        (lambda: replace(MLSTM(), width=0), r"MLSTM\.width must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
