"""Handwriting synthesis against the equations of Graves 2013, step by step."""

import pytest
import torch

from paperworks.models.classic.clipped_backward import clipped_backward
from paperworks.models.classic.handwriting import Handwriting, StrokeDensity, handwriting_loss, stroke_nats, synthesize
from paperworks.nn.mixture_density import StrokeMixture


def model(**options):
    torch.manual_seed(0)
    sizes = {"characters": 5, "hidden": 6, "layers": 3, "window": 2, "mixture": StrokeMixture(components=2)}
    net = Handwriting(**sizes | options).build().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.4)
    return net


def rows(time=7, seed=1):
    draws = torch.Generator().manual_seed(seed)
    strokes = torch.randn(2, time, 3, dtype=torch.float64, generator=draws)
    strokes[..., 2] = (strokes[..., 2] > 0.5).double()
    return strokes, torch.tensor([[4, 0, 2, 2], [1, 3, 0, 0]]), torch.tensor([4, 2])


def by_hand(net, strokes, letters):
    """One row, equations 7 to 11 and 46 to 52: plain vectors, every sum written out."""
    hidden = net.spec.hidden
    h = [torch.zeros(hidden, dtype=torch.float64) for _ in net.layers]
    c = [torch.zeros(hidden, dtype=torch.float64) for _ in net.layers]
    kappa, w, out, trail = torch.zeros(2, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), [], []

    def lstm(layer, index, x):
        a = layer.input.weight @ x + layer.input.bias + layer.recurrent.weight @ h[index]
        i, f, g, o = a.chunk(4)
        i, f = torch.sigmoid(i + layer.peephole[0] * c[index]), torch.sigmoid(f + layer.peephole[1] * c[index])
        c[index] = f * c[index] + i * torch.tanh(g)
        h[index] = torch.sigmoid(o + layer.peephole[2] * c[index]) * torch.tanh(c[index])

    for x in strokes:
        lstm(net.layers[0], 0, torch.cat((x, w)))
        alpha, beta, step = (net.move.weight @ h[0] + net.move.bias).exp().chunk(3)
        kappa = kappa + step
        phi = [
            sum(alpha[k] * torch.exp(-beta[k] * (kappa[k] - u) ** 2) for k in range(2))
            for u in range(1, len(letters) + 2)
        ]
        w = torch.zeros(5, dtype=torch.float64)
        for u, letter in enumerate(letters):
            w[letter] = w[letter] + phi[u]
        for index in (1, 2):
            lstm(net.layers[index], index, torch.cat((x, w, h[index - 1])))
        out.append(net.density.weight @ torch.cat(h) + net.density.bias)
        trail.append((torch.stack(phi), kappa))
    return torch.stack(out), trail


@torch.no_grad()
def test_outputs_windows_and_positions_are_those_of_the_equations():
    net, (strokes, text, lengths) = model(), rows()
    seen = {}
    for name in ("phi", "kappa"):
        getattr(net, name).register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    found = net(strokes, text, lengths)
    for row in range(2):
        letters = text[row, : lengths[row]].tolist()
        expected, trail = by_hand(net, strokes[row], letters)
        assert (found[row] - expected).abs().max() < 1e-13
        for step, (phi, kappa) in enumerate(trail):
            assert (seen["phi"][row, step, : len(phi)] - phi).abs().max() < 1e-13
            assert (seen["kappa"][row, step] - kappa).abs().max() < 1e-13
    assert (seen["kappa"].diff(dim=1) > 0).all()  # strictly increasing
    assert (seen["kappa"][:, 0] > 0).all()


@torch.no_grad()
def test_writing_in_pieces_is_writing_at_once():
    net, (strokes, text, lengths) = model(), rows()
    whole, pen, pieces = net(strokes, text, lengths), net.begin(2), []
    for part in strokes.split((3, 1, 3), 1):
        out, pen = net.write(part, net.characters(text, lengths), pen)
        pieces.append(out)
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-13


@torch.no_grad()
def test_the_loss_is_of_the_next_offset_and_padding_costs_nothing():
    net, (strokes, text, lengths) = model(), rows()
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 5:] = False
    nats = stroke_nats(net, (strokes, real, text, lengths))
    outputs = net(strokes, text, lengths)
    for row, last in ((0, 7), (1, 5)):
        for at in range(1, last):
            density = StrokeDensity(outputs[row, at - 1])
            expected = -density.log_prob(strokes[row, at, :2], strokes[row, at, 2] > 0.5)
            assert abs(nats[row, at - 1] - expected) < 1e-12
    assert not nats[1, 4:].any()
    loss, metrics = handwriting_loss(net, (strokes, real, text, lengths))
    assert torch.isclose(loss, nats.sum() / 2)
    assert metrics["nats a step"][1] == 6 + 4


def test_gradients_are_the_derivatives_where_none_is_clipped():
    net, (strokes, text, lengths) = model(layers=2, hidden=2, window=1), rows(3)
    names = [name for name, _ in net.named_parameters()]

    def nats(*parameters):
        state = dict(zip(names, parameters, strict=True))
        out = torch.func.functional_call(net, state, (strokes, text, lengths))
        return -0.01 * StrokeDensity(out).log_prob(strokes[..., :2], strokes[..., 2] > 0.5).sum()

    torch.autograd.gradcheck(nats, tuple(net.parameters()), atol=1e-6)


def test_derivatives_are_clipped_on_their_way_back():
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    y = clipped_backward(x, 10.0)
    assert torch.equal(y, x)
    (y * torch.tensor([5.0, 50.0, -500.0])).sum().backward()
    assert x.grad.tolist() == [5.0, 10.0, -10.0]


@torch.no_grad()
def test_writing_ends_when_the_window_leaves_the_text_and_the_seed_decides():
    net, text = model(), torch.tensor([1, 3])

    def draws(seed):
        return torch.Generator().manual_seed(seed)

    one = synthesize(net, text, most=30, generator=draws(0))
    again = synthesize(net, text, most=30, generator=draws(0))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    written, phi, ended = one
    assert written.shape == (len(phi), 3)
    assert phi.shape[1] == 3
    assert bool(ended)
    over = phi[:, -1] > phi[:, :-1].amax(1)
    assert over.tolist() == [False] * (len(phi) - 1) + [True]
    assert set(written[:, 2].tolist()) <= {0.0, 1.0}
    net.move.bias[4:] = -40.0  # a window that does not move never ends
    net.move.weight[4:] = 0.0
    written, _, ended = synthesize(net, text, most=9, generator=draws(0))
    assert len(written) == 9
    assert not ended
    # without noise the strokes are the modes, given those before them
    neat = synthesize(net, text, most=4, bias=80.0, generator=draws(1))[0]
    shown = torch.cat((torch.zeros(1, 3, dtype=torch.float64), neat[:-1]))[None]
    assert (StrokeDensity(net(shown, text[None])[0]).mode() - neat[:, :2]).abs().max() < 1e-12


def test_shapes_and_ids_that_do_not_fit_are_refused():
    net, (strokes, text, lengths) = model(), rows()
    with pytest.raises(ValueError, match=r"strokes must be \(batch, time, 3\) and text \(batch, characters\)"):
        net(strokes[..., :2], text, lengths)
    with pytest.raises(ValueError, match="outside the 5 characters there are"):
        net(strokes, text + 1, lengths)
    with pytest.raises(ValueError, match=r"Handwriting\.window must be at least 1, got 0"):
        Handwriting(characters=5, window=0)
