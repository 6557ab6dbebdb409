"""TTT layers against gradient descent written out, one token at a time, with autograd for the inner gradient."""

import pytest
import torch
from torch.nn import functional

from paperworks.nn import Placement
from paperworks.nn.recurrent.ttt import TTT
from paperworks.nn.recurrent.ttt_inner import InnerNorm, fresh_state, gelu_slope, inner_step, inner_weights


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def module_of(dim=8, **options):
    torch.manual_seed(0)
    module = TTT(**{"heads": 2, "mini_batch": 4, **options}).build(dim).double()
    with torch.no_grad():
        for parameter in (*module.inner.values(), module.place_rate, *module.parameters()):
            if parameter.std(correction=0) < 0.05:  # what begins as nothing would hide what is wrong with it
                parameter.add_(draws(*parameter.shape, seed=parameter.numel()), alpha=0.3)
    return module


def answer(weights, x, gain, shift):
    """f(x; W): the layers, the norm, the residual."""
    z = x @ weights["w1"] + weights["b1"]
    if "w2" in weights:
        z = functional.gelu(z, approximate="tanh") @ weights["w2"] + weights["b2"]
    return x + functional.layer_norm(z, z.shape[-1:], gain, shift, 1e-6)


def rotated(x, place):
    """RoPE on pairs (2i, 2i + 1) of one vector."""
    angle = place * 10_000.0 ** (-torch.arange(0, len(x), 2, dtype=torch.float64) / len(x))
    pairs = torch.view_as_complex(x.contiguous().view(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pairs).flatten()


def primal(module, x):
    """The primal form: each W_t is made, from the gradients that autograd gives at the mini-batch's first W."""
    spec, size = module.spec, module.size
    query = module.query(x)
    if spec.backbone == "mamba":
        query, key = module.query_convolution(query)[0], module.key_convolution(query)[0]
    else:
        key = module.key(x)
    value = module.value(x)
    base = {"linear": 1.0, "mlp": 0.1}[spec.inner]
    rates = base * torch.sigmoid(module.rate_of(x)) / size
    rows = []
    for row in range(len(x)):
        heads = []
        for head in range(spec.heads):
            part = slice(head * size, (head + 1) * size)
            weights = {name: weight[head] for name, weight in module.inner.items()}
            gain, shift = module.inner_norm.gain[head, 0], module.inner_norm.shift[head, 0]
            outputs, summed = [], dict.fromkeys(weights, 0.0)
            for t in range(x.shape[1]):
                place = t % spec.mini_batch
                q, k = (rotated(tensor[row, t, part], place) for tensor in (query, key))
                loss = 0.5 * (answer(weights, k[None], gain, shift) - value[row, t, part]).square().sum()
                grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                for name, grad in zip(weights, grads, strict=True):
                    summed[name] = summed[name] + rates[row, t, head] * grad
                at = torch.clamp(1 / (place + 1) + module.place_rate[place], min=0)
                present = {name: weights[name] - at * summed[name] for name in weights}
                outputs.append(answer(present, q[None], gain, shift)[0])
                if place == spec.mini_batch - 1:
                    weights, summed = present, dict.fromkeys(weights, 0.0)
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, -1))
    mixed = module.norm(torch.stack(rows))
    if spec.backbone == "mamba":
        mixed = functional.gelu(module.gate(x), approximate="tanh") * mixed
    return module.output(mixed)


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
@pytest.mark.parametrize(("inner", "mini_batch"), [("linear", 4), ("mlp", 4), ("linear", 1), ("mlp", 16)])
def test_the_dual_form_is_the_primal_with_autograd_gradients(inner, mini_batch, backbone):
    """A mini-batch of one is online gradient descent."""
    module = module_of(inner=inner, mini_batch=mini_batch, backbone=backbone)
    x, y = draws(2, 10, 8).requires_grad_(), draws(2, 10, 8).requires_grad_()
    found, expected = module(x, Placement().resolve(2, 10, x.device)), primal(module, y)
    assert (found - expected).abs().max() < 5e-7  # our rotation's angles are float32
    upstream = draws(2, 10, 8, seed=5)
    ours = torch.autograd.grad((found * upstream).sum(), [x, *module.parameters()])
    theirs = torch.autograd.grad((expected * upstream).sum(), [y, *module.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-6 * max(1.0, other.abs().max())


def inner_of(inner, heads=2, size=6, rows=3):
    torch.manual_seed(1)
    state = fresh_state(
        {name: torch.randn_like(w).double() / 2 for name, w in inner_weights(inner, heads, size).items()}, rows
    )
    norm = InnerNorm(heads, size).double()
    with torch.no_grad():
        norm.gain.add_(draws(heads, 1, size), alpha=0.3)
        norm.shift.add_(draws(heads, 1, size, seed=1), alpha=0.3)
    return state, norm


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_a_mini_batch_in_two_parts_is_the_whole(inner):
    state, norm = inner_of(inner)
    query, key, value = (draws(3, 2, 7, 6, seed=seed) for seed in range(3))
    rate, places = draws(3, 2, 7, seed=3).abs(), draws(7, seed=4).abs()
    whole, end = inner_step(query, key, value, rate, places, state, norm)
    never, always = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    parts = [t[:, :, :3] for t in (query, key, value, rate)], [t[:, :, 3:] for t in (query, key, value, rate)]
    one, middle = inner_step(*parts[0], places[:3], state, norm, never)
    assert torch.equal(middle["w1"], state["w1"])  # in the middle of a mini-batch W stands still
    two, last = inner_step(*parts[1], places[3:], middle, norm, always)
    assert (torch.cat((one, two), 2) - whole).abs().max() < 1e-12
    for name in end:
        assert (end[name] - last[name]).abs().max() < 1e-12
        assert not (name.endswith(".sum") and end[name].any())


@torch.no_grad()
def test_theorem_1_one_mini_batch_from_zero_is_linear_attention():
    """f = W x, W_0 = 0, every gradient at W_0, a step of 1 on half the squared error."""
    first = {name: torch.zeros_like(w).double() for name, w in inner_weights("linear", 2, 6).items()}
    query, key, value = (draws(3, 2, 9, 6, seed=seed) for seed in range(3))
    ones = torch.ones(9, dtype=torch.float64)
    out, end = inner_step(query, key, value, ones.expand(3, 2, 9), ones, fresh_state(first, 3), None)
    attention = (query @ key.transpose(-1, -2)).tril() @ value
    assert (out - attention - value.cumsum(2)).abs().max() < 1e-12  # the bias learns too: a key that is always 1
    assert (end["w1"] - key.transpose(-1, -2) @ value).abs().max() < 1e-12


def test_the_gradient_through_the_norm_is_autograds_and_has_a_derivative():
    _, norm = inner_of("linear")
    z, target = draws(3, 2, 4, 6).requires_grad_(), draws(3, 2, 4, 6, seed=1).requires_grad_()
    loss = 0.5 * (norm(z) - target).square().sum()
    expected = torch.autograd.grad(loss, z)[0]
    assert (norm.loss_gradient(z, target) - expected).abs().max() < 1e-12
    torch.autograd.gradcheck(norm.loss_gradient, (z, target))


def test_the_slope_of_gelu_is_autograds():
    x = draws(200, seed=2).mul(3).requires_grad_()
    expected = torch.autograd.grad(functional.gelu(x, approximate="tanh").sum(), x)[0]
    assert (gelu_slope(x) - expected).abs().max() < 1e-14


@torch.no_grad()
def test_the_target_has_its_key_taken_away_once():
    """A value equal to the key and a norm that says nothing leave no error: W stays."""
    module = module_of(backbone="transformer")
    module.inner_norm.gain.zero_()
    module.inner_norm.shift.zero_()
    state = fresh_state(module._first(torch.float64), 1)
    key = draws(1, 2, 4, 4)
    ones = torch.ones(4, dtype=torch.float64)
    _, end = inner_step(key, key, key, ones.expand(1, 2, 4), ones, state, module.inner_norm)
    assert torch.equal(end["w1"], state["w1"])


@torch.no_grad()
def test_rows_of_a_cache_may_stand_at_different_places_of_their_mini_batch():
    module = module_of(mini_batch=5)
    x = draws(3, 23, 8)
    segments = torch.tensor([[0] * pad + [1] * (23 - pad) for pad in (0, 3, 11)])
    cache = module.new_cache(3, 23, torch.float64, x.device)
    from paperworks.nn import Cache

    streams = Cache([cache], 23)
    parts = []
    for start, end in ((0, 13), (13, 14), (14, 23)):
        placement = Placement(segments=segments[:, start:end], cache=streams).resolve(3, end - start, x.device)
        parts.append(module(x[:, start:end], placement.at(cache)))
    found = torch.cat(parts, 1)
    assert cache["place"].tolist() == [23 % 5, 20 % 5, 12 % 5]
    for row, pad in enumerate((0, 3, 11)):
        alone = module(x[row : row + 1, pad:], Placement().resolve(1, 23 - pad, x.device))
        assert (found[row : row + 1, pad:] - alone).abs().max() < 1e-12


@torch.no_grad()
def test_states_do_not_grow_and_are_float32():
    for spec in (TTT(heads=2), TTT(heads=2, inner="mlp", norm=False)):
        module = spec.build(8).bfloat16()
        short, long = (module.new_cache(2, size, torch.bfloat16, torch.device("cpu")) for size in (8, 100_000))
        assert short.bytes() == long.bytes()
        x = torch.randn(2, 5, 8).bfloat16()
        assert module(x, Placement().resolve(2, 5, x.device).at(long)).dtype == torch.bfloat16
        assert long["w1"].dtype == torch.float32


@torch.no_grad()
def test_it_begins_as_the_reference_does():
    torch.manual_seed(0)
    module = TTT(heads=2).build(64)
    assert abs(module.inner["w1"].std().item() - 0.02) < 0.002
    assert not module.inner["b1"].any()
    x = torch.randn(1, 6, 64)
    rates = []
    module.rate.register_forward_hook(lambda _, __, out: rates.append(out))
    module(x, Placement().resolve(1, 6, x.device))
    assert abs(rates[0].mean().item() - 0.5 / 32) < 0.003  # base 1, sigmoid near 1/2, over the head's size


def test_inner_biases_and_gains_are_not_decayed():
    from paperworks.train.optim.parameter_groups import undecayed

    module = TTT(heads=2, inner="mlp").build(8)
    left = undecayed(module)
    names = {name for name, p in module.named_parameters() if id(p) in left and p.dim() > 1}
    assert {"inner.b1", "inner.b2", "inner_norm.gain", "inner_norm.shift"} <= names
    assert id(module.inner["w1"]) not in left


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TTT(heads=3).build(16), r"TTT\.heads \(3\) must divide dim \(16\) into an even number"),
        (lambda: TTT(heads=8).build(24), r"TTT\.heads \(8\) must divide dim \(24\)"),
        (lambda: TTT(mini_batch=0), r"TTT\.mini_batch must be at least 1, got 0"),
        (lambda: TTT(base_rate=0.0), r"TTT\.base_rate must be above 0, got 0\.0"),
        (lambda: TTT(inner="cnn"), r"TTT\.inner must be"),
    ],
)
def test_wrong_sizes_say_what_would_be_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()
