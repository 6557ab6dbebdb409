"""Each kind against its equations, written out naively in float64, gradients included."""

import math

import pytest
import torch

from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation.directions import unit_rows

DIM, LATENTS, BATCH = 12, 30, 9
SPECS = {
    "standard": sae.Standard(latents=LATENTS, penalty=0.7, warmup=0.0),
    "weighted": sae.Standard(latents=LATENTS, penalty=0.7, decoder="weighted", warmup=0.0),
    "annealed": sae.Standard(latents=LATENTS, penalty=0.7, warmup=0.0, annealing=sae.Annealing()),
    "gated": sae.Gated(latents=LATENTS, penalty=0.7, warmup=0.0),
    "topk": sae.TopK(latents=LATENTS, k=4, aux=0.0),
    "multi-topk": sae.TopK(latents=LATENTS, k=4, aux=0.0, multi=True),
    "jumprelu": sae.JumpReLU(latents=LATENTS, penalty=0.7, threshold=0.3, bandwidth=0.5, warmup=0.0),
}


def made(kind, seed=0):
    """A model with every parameter away from its special starting value, in float64."""
    torch.manual_seed(seed)
    model = SPECS[kind].build(DIM).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "decoder" and name != "log_threshold":
                parameter.add_(0.2 * torch.randn_like(parameter))
        if kind == "weighted":
            model.decoder.mul_(1 + torch.rand(LATENTS, 1))
    return model


def inputs(seed=1):
    return torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(kind, p, x):
    """The loss, straight from the equations; every line a formula of the paper."""
    decoder = p["decoder"]
    if kind in ("standard", "annealed"):
        f = torch.relu((x - p["decoder_bias"]) @ p["encoder"].T + p["encoder_bias"])
        return ((x - f @ decoder - p["decoder_bias"]) ** 2).sum(1).mean() + 0.7 * f.sum(1).mean()
    if kind == "weighted":
        f = torch.relu(x @ p["encoder"].T + p["encoder_bias"])
        norms = (decoder**2).sum(1).sqrt()
        return ((x - f @ decoder - p["decoder_bias"]) ** 2).sum(1).mean() + 0.7 * (f * norms).sum(1).mean()
    if kind == "gated":
        centred = x - p["decoder_bias"]
        pi = centred @ p["encoder"].T + p["gate_bias"]
        magnitude = torch.relu(centred @ (p["log_magnitude"].exp()[:, None] * p["encoder"]).T + p["magnitude_bias"])
        f = (pi > 0).double() * magnitude
        fixed = torch.relu(pi) @ decoder.detach() + p["decoder_bias"].detach()
        return (
            ((x - f @ decoder - p["decoder_bias"]) ** 2).sum(1).mean()
            + 0.7 * torch.relu(pi).sum(1).mean()
            + ((x - fixed) ** 2).sum(1).mean()
        )
    pre = (x - p["decoder_bias"]) @ p["encoder"].T + p["encoder_bias"]

    def nmse(k):
        kept = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
        z = torch.relu(pre * kept)
        return ((x - z @ decoder - p["decoder_bias"]) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()

    return nmse(4) + nmse(16) / 8 if kind == "multi-topk" else nmse(4)


@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind != "jumprelu"])
def test_loss_and_gradients_are_those_of_the_equations(kind):
    model, x = made(kind), inputs()
    loss, _ = model.loss(x, progress=0.0)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    copies = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    expected = naive(kind, copies, x)
    theirs = torch.autograd.grad(expected, list(copies.values()))
    assert torch.allclose(loss, expected, rtol=1e-12)  # float64
    for name, mine, other in zip(copies, ours, theirs, strict=True):
        if name == "decoder" and model.unit_norm:
            other = other - (other * model.decoder).sum(1, keepdim=True) * model.decoder
        assert torch.allclose(mine, other, atol=1e-12, rtol=1e-10), name


def test_jumprelu_loss_and_gradients_follow_the_papers_pseudo_derivatives():
    model, x = made("jumprelu"), inputs()
    loss, _ = model.loss(x, progress=0.0)
    ours = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    encoder, decoder = model.encoder.detach(), model.decoder.detach()
    theta, eps = model.threshold.detach(), 0.5
    linear = x @ encoder.T + model.encoder_bias.detach()
    pre = linear.clamp_min(0)
    on = (pre > theta).double()
    residual = (pre * on) @ decoder + model.decoder_bias.detach() - x
    expected = (residual**2).sum(1).mean() + 0.7 * on.sum(1).mean()
    assert torch.allclose(loss, expected, rtol=1e-12)
    # by hand: d/df of the error, then through the step by the straight-through estimates
    df = 2 * residual @ decoder.T / BATCH
    window = ((pre - theta).abs() < eps / 2).double()
    dtheta = (-(theta / eps) * window * df - 0.7 / BATCH / eps * window).sum(0)
    dpre = df * on * (linear > 0)
    assert torch.allclose(ours["log_threshold"], dtheta * theta, atol=1e-12)
    assert torch.allclose(ours["encoder"], dpre.T @ x, atol=1e-12)
    assert torch.allclose(ours["encoder_bias"], dpre.sum(0), atol=1e-12)
    assert torch.allclose(ours["decoder_bias"], 2 * residual.sum(0) / BATCH, atol=1e-12)
    ddecoder = 2 * (pre * on).T @ residual / BATCH
    ddecoder -= (ddecoder * decoder).sum(1, keepdim=True) * decoder
    assert torch.allclose(ours["decoder"], ddecoder, atol=1e-12)


@pytest.mark.parametrize("kind", SPECS)
def test_forward_is_decode_of_encode_over_any_leading_dimensions(kind):
    model = made(kind)
    x = torch.randn(2, 3, DIM, dtype=torch.float64)
    latents = model.encode(x)
    assert latents.shape == (2, 3, LATENTS)
    assert (latents >= 0).all()
    assert 0 < (latents > 0).double().mean() < 1
    assert torch.allclose(model(x), model.decode(latents), atol=1e-13)
    assert torch.allclose(model(x)[1, 2], model(x[1, 2].unsqueeze(0))[0], atol=1e-13)


@pytest.mark.parametrize("kind", SPECS)
def test_rescaling_commutes_with_the_data(kind):
    model, x = made(kind), inputs()
    expected, latents = 2.5 * model(x), 2.5 * model.encode(x)
    model.rescale(2.5)
    assert torch.allclose(model(2.5 * x), expected, atol=1e-12)
    assert torch.allclose(model.encode(2.5 * x), latents, atol=1e-12)
    with pytest.raises(ValueError, match="factor is 0"):
        model.rescale(0)


@pytest.mark.parametrize("kind", SPECS)
def test_recentring_moves_the_decoders_bias_and_no_latent(kind):
    model, x = made(kind), inputs()
    before, latents = model(x), model.encode(x)
    bias = torch.randn(DIM, dtype=torch.float64)
    moved = bias - model.decoder_bias.detach()
    model.recentre(bias)
    assert torch.allclose(model.encode(x), latents, atol=1e-12)
    assert torch.allclose(model(x), before + moved, atol=1e-12)


@pytest.mark.parametrize("kind", SPECS)
def test_specs_round_trip_and_models_start_as_stated(kind):
    spec = SPECS[kind]
    assert sae.SparseAutoencoderSpec.from_dict(spec.to_dict()) == spec
    model = spec.build(DIM)
    length = 0.1 if kind == "weighted" else 1.0
    assert torch.allclose(model.decoder.norm(dim=1), torch.full((LATENTS,), length), atol=1e-6)
    assert torch.equal(model.encoder, model.decoder)
    assert not model.decoder_bias.any()


def test_parameter_counts_are_the_papers():
    d, m = DIM, LATENTS
    count = {kind: sum(p.numel() for p in spec.build(d).parameters()) for kind, spec in SPECS.items()}
    assert count["standard"] == count["weighted"] == count["topk"] == 2 * m * d + m + d
    assert count["gated"] == 2 * m * d + 3 * m + d
    assert count["jumprelu"] == 2 * m * d + 2 * m + d


# --- the standard kind


def test_the_weighted_loss_is_invariant_to_moving_length_between_encoder_and_decoder():
    model, x = made("weighted"), inputs()
    before, strength = model.loss(x, 1.0)[0], model.strength(model.encode(x))
    lengths = 0.2 + 3 * torch.rand(LATENTS, dtype=torch.float64)
    with torch.no_grad():
        model.encoder.mul_(lengths[:, None])
        model.encoder_bias.mul_(lengths)
        model.decoder.div_(lengths[:, None])
    assert torch.allclose(model.loss(x, 1.0)[0], before, rtol=1e-12)
    assert torch.allclose(model.strength(model.encode(x)), strength, atol=1e-12)
    plain = model(x)
    model.fold_norms()
    assert torch.allclose(model.decoder.norm(dim=1), torch.ones(LATENTS, dtype=torch.float64))
    assert torch.allclose(model(x), plain, atol=1e-12)
    assert torch.allclose(model.encode(x), strength, atol=1e-12)  # f is what f ||W_dec|| was


def test_without_a_penalty_twice_the_dimensions_reconstruct_exactly():
    model = sae.Standard(latents=2 * DIM, penalty=0.0).build(DIM).double()
    with torch.no_grad():
        both = torch.cat([torch.eye(DIM), -torch.eye(DIM)])
        model.encoder.copy_(both)
        model.decoder.copy_(both)
    x = inputs()
    assert model.loss(x, 1.0)[0] < 1e-24


def test_penalties_warm_up_linearly_from_nothing():
    spec = sae.Standard(latents=LATENTS, penalty=5.0, decoder="weighted", warmup=0.05)
    model, x = spec.build(DIM).double(), inputs()

    def weight(progress):
        loss, metrics = model.loss(x, progress)
        return ((loss - metrics["error"]) / metrics["sparsity"]).item()

    for progress, expected in ((0.0, 0.0), (0.025, 2.5), (0.05, 5.0), (0.8, 5.0), (1.0, 5.0)):
        assert weight(progress) == pytest.approx(expected, abs=1e-9)


# --- the gated kind


def test_gated_latents_are_jumprelu_of_the_magnitudes_where_thresholds_are_not_negative():
    model, x = made("gated"), inputs()
    with torch.no_grad():
        model.gate_bias.sub_(1.0)
        model.magnitude_bias.add_(0.5)
    theta = model.thresholds()
    assert (theta >= 0).all()
    weight = model.log_magnitude.exp()[:, None] * model.encoder
    pre = (x - model.decoder_bias) @ weight.T + model.magnitude_bias
    assert torch.allclose(model.encode(x), torch.where(pre > theta, pre, 0), atol=1e-12)
    assert (model.encode(x) > 0).any()


def test_gated_with_one_map_is_a_plain_relu():
    model, x = made("gated"), inputs()
    with torch.no_grad():
        model.log_magnitude.zero_()
        model.magnitude_bias.copy_(model.gate_bias)
    plain = torch.relu((x - model.decoder_bias) @ model.encoder.T + model.gate_bias)
    assert torch.allclose(model.encode(x), plain, atol=1e-13)


def test_the_gates_own_reconstruction_teaches_no_decoder():
    model, x = made("gated"), inputs()
    with torch.no_grad():
        model.magnitude_bias.fill_(-1e3)  # nothing is on: only the auxiliary term reconstructs
        model.decoder_bias.zero_()
    loss, metrics = model.loss(x, 1.0)
    assert metrics["l0"] == 0
    gradients = torch.autograd.grad(loss, [model.decoder, model.encoder])
    assert not gradients[0].any()
    assert gradients[1].any()


# --- JumpReLU


def test_jumprelu_pseudo_derivatives_inside_and_outside_the_window():
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    for value, on, near in ((0.5, 0, 0), (0.85, 0, 1), (1.0, 0, 1), (1.15, 1, 1), (1.5, 1, 0)):
        pre = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
        z = sae.jump_relu(pre, theta, 0.4)
        assert z.item() == value * on
        dpre, dtheta = torch.autograd.grad(z.sum(), [pre, theta])
        assert dpre.item() == on
        assert dtheta.item() == pytest.approx(-near * 1.0 / 0.4)
        (dtheta,) = torch.autograd.grad(sae.step(pre, theta, 0.4).sum(), theta)
        assert dtheta.item() == pytest.approx(-near / 0.4)
        assert torch.autograd.grad(sae.step(pre, theta, 0.4).sum(), pre, allow_unused=True)[0] is None


def test_the_count_moves_no_encoder():
    model, x = made("jumprelu"), inputs()
    pre = torch.relu(x @ model.encoder.T + model.encoder_bias)
    count = sae.step(pre, model.threshold, 0.5).sum()
    gradients = torch.autograd.grad(count, [model.encoder, model.encoder_bias, model.log_threshold], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1] is None
    assert gradients[2].any()


def test_the_counts_gradient_estimates_minus_the_density_at_the_threshold():
    draws = torch.randn(1_000_000, 1, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor([0.8], requires_grad=True)
    sae.step(draws, theta, 0.1).mean().backward()
    density = math.exp(-(0.8**2) / 2) / math.sqrt(2 * math.pi)
    assert theta.grad.item() == pytest.approx(-density, rel=0.05)  # 29,000 draws in the window: 0.6% noise


def test_a_vanishing_threshold_is_a_relu():
    model, x = made("jumprelu"), inputs()
    with torch.no_grad():
        model.log_threshold.fill_(-60.0)
    assert torch.allclose(model.encode(x), torch.relu(x @ model.encoder.T + model.encoder_bias), atol=1e-20)


# --- p-annealing


def test_annealing_starts_as_l1_and_ends_at_p_end():
    plan = sae.Annealing(start=0.5, end=0.2, updates=10)
    assert [plan.updates_at(p) for p in (0.0, 0.49, 0.5, 0.55, 0.7, 0.95, 1.0)] == [0, 0, 1, 2, 5, 10, 10]
    assert plan.power(0) == 1.0
    assert plan.power(10) == pytest.approx(0.2)
    assert plan.power(5) == pytest.approx(0.6)
    x = inputs()
    assert torch.equal(made("annealed").loss(x, 0.2)[0], made("standard").loss(x, 0.2)[0])


def test_every_change_of_p_leaves_the_penalty_of_the_remembered_batches_as_it_was():
    model = made("annealed").train()
    batches = [inputs(seed) for seed in range(10)]

    def penalty():
        model.eval()
        total = sum(model.annealed(model.encode(x), 0.99) for x in batches).item()
        model.train()
        return total

    powers = [model.annealed.power]
    for update in range(10):
        before = penalty()
        for x in batches:
            model.loss(x, 0.5 + 0.05 * update)
            model.annealed.after_step()
        powers.append(model.annealed.power)
        assert penalty() == pytest.approx(before, rel=1e-12)
    assert powers == pytest.approx([1 - 0.08 * n for n in range(11)])
    model.loss(batches[0], 1.0)
    model.annealed.after_step()
    assert model.annealed.power == pytest.approx(0.2)  # and not below


def test_powers_have_the_formulas_gradient_and_none_where_a_latent_is_off():
    from paperworks.interpret.sae.kinds.annealing import power_sum

    f = torch.tensor([[0.0, 0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    total = power_sum(f, 0.3)
    (gradient,) = torch.autograd.grad(total, f)
    assert total.item() == pytest.approx(0.5**0.3 + 2**0.3)
    assert torch.allclose(gradient, torch.tensor([[0.0, 0.3 * 0.5**-0.7, 0.3 * 2**-0.7]], dtype=torch.float64))


# --- errors


@pytest.mark.parametrize("kind", SPECS)
def test_activations_of_another_model_are_refused(kind):
    model = SPECS[kind].build(DIM)
    for call in (model.encode, model, lambda x: model.loss(x, 0.0), model.centre):
        with pytest.raises(
            ValueError, match=r"reads activations of size 12, got shape \(4, 8\): they come from another"
        ):
            call(torch.zeros(4, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sae.TopK(latents=8, k=9), "no more than the 8 latents, got 9"),
        (lambda: sae.TopK(latents=8, k=4, multi=True), "no more than the 8 latents, got 4"),
        (lambda: sae.TopK(latents=8, k=4, aux_k=0), "TopK.aux_k must be 1 or more"),
        (lambda: sae.Standard(latents=0, penalty=1.0), "Standard.latents must be 1 or more, got 0"),
        (lambda: sae.Standard(latents=8, penalty=-1.0), "Standard.penalty must be 0 or more and finite, got -1.0"),
        (lambda: sae.Standard(latents=8, penalty=1.0, decoder="free"), "one of 'unit', 'weighted', got 'free'"),
        (lambda: sae.Standard(latents=8, penalty=1.0, decoder="weighted", annealing=sae.Annealing()), "needs decoder="),
        (lambda: sae.Gated(latents=8, penalty=1.0, warmup=2.0), r"Gated.warmup must be a share .* got 2.0"),
        (lambda: sae.JumpReLU(latents=8, penalty=1.0, threshold=0.0), "JumpReLU.threshold must be positive"),
        (lambda: sae.JumpReLU(latents=8, penalty=1.0, bandwidth=-0.1), "JumpReLU.bandwidth must be positive"),
        (lambda: sae.Annealing(end=0.0), r"Annealing.end must be in \(0, 1\), got 0.0"),
        (lambda: sae.Annealing(start=1.0), "Annealing.start must be a share"),
        (lambda: sae.TopK(latents=8, k=2).build(0), "dim is 0"),
    ],
)
def test_impossible_specs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_folding_needs_directions():
    model = made("weighted")
    with torch.no_grad():
        model.decoder[3] = 0
    with pytest.raises(ValueError, match="1 decoder rows are zero"):
        model.fold_norms()
    assert torch.equal(unit_rows(model.decoder)[3], torch.zeros(DIM, dtype=torch.float64))
