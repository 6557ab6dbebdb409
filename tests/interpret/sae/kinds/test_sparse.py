"""The sparse path against the dense one, and what TopK adds to it."""

import pytest
import torch

from paperworks.interpret import sae
from paperworks.interpret.sae.kinds import sparse

DIM, LATENTS, BATCH, K = 10, 40, 16, 5


def parts(dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(BATCH, DIM, dtype=dtype, requires_grad=True)
    encoder = torch.randn(LATENTS, DIM, dtype=dtype, requires_grad=True)
    bias = torch.randn(LATENTS, dtype=dtype).sub(5.0).requires_grad_()  # so that some of the k are negative
    decoder = torch.randn(LATENTS, DIM, dtype=dtype, requires_grad=True)
    return x, encoder, bias, decoder


def dense(x, encoder, bias, decoder, k, among=None):
    pre = x @ encoder.T + bias
    allowed = pre if among is None else torch.full_like(pre, -torch.inf).index_copy(1, among, pre[:, among])
    kept = torch.zeros_like(pre).scatter(1, allowed.topk(k, dim=1).indices, 1.0)
    return torch.relu(pre * kept) @ decoder


@pytest.mark.parametrize("among", [None, torch.tensor([1, 3, 4, 8, 13, 21, 34])], ids=["all", "some"])
@pytest.mark.parametrize("k", [1, K, 7])
def test_values_and_all_gradients_equal_the_dense_ones(k, among):
    tensors = parts()
    ours = sparse.decode(sparse.largest(*tensors[:3], k, among), tensors[3])
    theirs = dense(*tensors, k, among)
    weight = torch.randn_like(theirs)
    assert torch.allclose(ours, theirs, atol=1e-13)
    mine = torch.autograd.grad((ours * weight).sum(), tensors)
    other = torch.autograd.grad((theirs * weight).sum(), tensors)
    for one, two in zip(mine, other, strict=True):
        assert torch.allclose(one, two, atol=1e-12)  # float64 sums in another order


def test_the_gradient_along_the_sphere_is_the_projected_one():
    x, encoder, bias, decoder = parts()
    rows = torch.nn.functional.normalize(decoder.detach(), dim=1).requires_grad_()
    latents = sparse.largest(x, encoder, bias, K)
    weight = torch.randn(BATCH, DIM, dtype=torch.float64)
    (mine,) = torch.autograd.grad((sparse.decode(latents, rows, along_sphere=True) * weight).sum(), rows)
    (whole,) = torch.autograd.grad((sparse.decode(sparse.largest(x, encoder, bias, K), rows) * weight).sum(), rows)
    assert torch.allclose(mine, whole - (whole * rows).sum(dim=1, keepdim=True) * rows, atol=1e-12)
    assert (mine * rows).sum(dim=1).abs().max() < 1e-12


def test_gradients_equal_finite_differences():
    x, encoder, bias, decoder = parts()
    # away from ties: the smallest gap between the k-th and the next pre-activation must exceed the step
    pre = (x @ encoder.T + bias).sort(dim=1, descending=True).values
    assert (pre[:, K - 1] - pre[:, K]).min() > 1e-4
    assert torch.autograd.gradcheck(
        lambda *p: sparse.decode(sparse.largest(p[0], p[1], p[2], K), p[3]),
        (x, encoder, bias, decoder),
        eps=1e-7,
        atol=1e-5,
    )


def test_gradients_in_float32_are_the_same_every_time():
    tensors = parts(torch.float32)

    def once():
        return torch.autograd.grad(sparse.decode(sparse.largest(*tensors[:3], K), tensors[3]).square().sum(), tensors)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_with_all_latents_kept_it_is_a_relu():
    x, encoder, bias, _ = parts()
    assert torch.allclose(sparse.largest(x, encoder, bias, LATENTS).dense(LATENTS), torch.relu(x @ encoder.T + bias))


def test_at_most_k_are_on_and_exactly_k_where_enough_are_positive():
    x, encoder, bias, _ = parts()
    on = (sparse.largest(x, encoder, bias, K).values > 0).sum(dim=1)
    positive = (x @ encoder.T + bias > 0).sum(dim=1)
    assert torch.equal(on, positive.clamp_max(K))
    assert (positive < K).any()
    assert (positive >= K).any()


def test_only_selected_latents_get_gradients():
    x, encoder, bias, decoder = parts()
    latents = sparse.largest(x[:2], encoder, bias, K)
    gradients = torch.autograd.grad(sparse.decode(latents, decoder).square().sum(), (encoder, bias, decoder))
    chosen = set(latents.indices[latents.values > 0].tolist())
    for gradient in gradients:
        touched = gradient.reshape(LATENTS, -1).abs().sum(dim=1).nonzero().flatten().tolist()
        assert set(touched) == chosen


def test_the_mean_predictor_has_an_error_of_one():
    x = torch.randn(64, DIM, dtype=torch.float64) + 3
    assert sae.normalized_error(x, x.mean(dim=0).expand_as(x)).item() == pytest.approx(1.0, abs=1e-12)


def topk(**options):
    torch.manual_seed(0)
    return sae.TopK(latents=LATENTS, k=K, **options).build(DIM).double().train()


def test_the_auxiliary_loss_teaches_dead_latents_only_and_moves_no_error():
    model, x = topk(aux=1.0, aux_k=4, dead_after=100), torch.randn(BATCH, DIM, dtype=torch.float64)
    names = ("encoder", "encoder_bias", "decoder")
    without = torch.autograd.grad(model.loss(x, 0.0)[0], [model.get_parameter(name) for name in names])
    dead = torch.tensor([2, 7, 11, 30, 31, 32])
    model.idle.zero_()
    model.idle[dead] = 100
    loss, metrics = model.loss(x, 0.0)
    with_it = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    assert metrics["dead"] == pytest.approx(len(dead) / LATENTS)
    assert loss > metrics["error"]
    alive = torch.ones(LATENTS, dtype=torch.bool)
    alive[dead] = False
    for one, two in zip(with_it, without, strict=True):
        assert torch.equal(one[alive], two[alive])  # bit for bit: nothing was added to them
        assert (one[dead] != two[dead]).any()


def test_the_auxiliary_loss_is_its_formula():
    model, x = topk(aux=0.5, aux_k=3, dead_after=100), torch.randn(BATCH, DIM, dtype=torch.float64)
    dead = torch.tensor([2, 7, 11, 30, 31, 32])
    model.idle[dead] = 100
    loss, metrics = model.loss(x, 0.0)
    missing = (x - model(x)).detach()
    guess = dense(x - model.decoder_bias, model.encoder, model.encoder_bias, model.decoder, 3, dead)
    expected = ((missing - guess) ** 2).sum() / ((missing - missing.mean(0)) ** 2).sum()
    assert torch.allclose(loss - metrics["error"], 0.5 * expected, rtol=1e-10)


def test_a_perfect_reconstruction_makes_no_nan():
    model = topk(dead_after=1)
    x = torch.zeros(4, DIM, dtype=torch.float64)
    x[1] = model.decoder[3].detach() * 2
    with torch.no_grad():
        model.encoder_bias.fill_(-0.5)
    model.idle[:] = 5
    loss, _ = model.loss(x, 0.0)
    assert torch.isfinite(loss)


def test_a_fixed_threshold_keeps_as_many_on_average_and_computes_the_same_where_it_agrees():
    torch.manual_seed(0)
    model = sae.TopK(latents=LATENTS, k=K).build(DIM).double().eval()
    with torch.no_grad():
        model.decoder_bias.normal_()
    x = torch.randn(2000, DIM, dtype=torch.float64)
    fixed = sae.with_fixed_threshold(model, x)
    ranked, jumped = model.encode(x), fixed.encode(x)
    on = (jumped > 0).sum(dim=1)
    assert abs(on.double().mean().item() - K) < 1
    assert len(on.unique()) > 3
    same = ((ranked > 0) == (jumped > 0)).all(dim=1)
    assert same.any()
    assert torch.allclose(fixed(x)[same], model(x)[same], atol=1e-12)
    with torch.no_grad():
        model.encoder_bias.fill_(-1e3)
    with pytest.raises(ValueError, match="no latent is on for any input"):
        sae.with_fixed_threshold(model, x)


def test_latents_die_by_inputs_not_by_steps():
    model = topk(dead_after=3 * BATCH)
    x = torch.randn(BATCH, DIM, dtype=torch.float64)
    for _ in range(3):
        model.loss(x, 0.0)
    on = (model.encode(x) > 0).any(dim=0)
    assert torch.equal(model.dead(), (~on).nonzero().flatten())
    assert (model.idle[~on] == 3 * BATCH).all()
    model.eval()
    model.loss(x, 0.0)
    assert (model.idle[~on] == 3 * BATCH).all()  # evaluation counts for nothing


@pytest.mark.parametrize("k", [0, LATENTS + 1])
def test_impossible_k_is_refused(k):
    x, encoder, bias, _ = parts()
    with pytest.raises(ValueError, match=f"k is {k}, but there are 40 latents"):
        sparse.largest(x, encoder, bias, k)
