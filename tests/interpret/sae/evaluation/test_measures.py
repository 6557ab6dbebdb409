"""Measures against their definitions, and splicing into models."""

import pytest
import torch

from paperworks import interpret
from paperworks.interpret import sae
from paperworks.models.presets.families import llama


def trained_like(dim=6, latents=20):
    torch.manual_seed(0)
    model = sae.Standard(latents=latents, penalty=1.0).build(dim).eval()
    with torch.no_grad():
        model.encoder_bias.sub_(0.3)
        model.encoder_bias[0] = -1e3  # dead
        model.encoder_bias[1] = 10.0  # always on
    return model


def test_measures_are_their_definitions_whatever_the_batches():
    model, x = trained_like(), torch.randn(90, 6)
    with torch.no_grad():
        latents, back = model.encode(x), model(x)
    quality = sae.measure(model, x.split([10, 50, 30]))
    assert quality.inputs == 90
    assert quality.l0 == pytest.approx((latents > 0).sum(dim=1).float().mean().item())
    error = (x - back).square().sum()
    assert quality.mse == pytest.approx((error / 90).item(), rel=1e-5)
    assert quality.fvu == pytest.approx((error / (x - x.mean(dim=0)).square().sum()).item(), rel=1e-5)
    assert quality.explained_variance == pytest.approx(1 - quality.fvu)
    factor = torch.linspace(0.1, 100, 200_000)
    energy, along = back.square().sum(), (back * x).sum()
    best = factor[(energy / factor**2 - 2 * along / factor).argmin()]
    assert quality.bias == pytest.approx(best.item(), rel=1e-3)  # argmin over g of ||x' / g - x||^2, on the grid
    assert quality.dead == pytest.approx(1 / 20)
    assert quality.density[1] == 1.0
    assert quality.dense() == pytest.approx(((latents > 0).float().mean(dim=0) > 0.1).float().mean().item())


def test_the_histogram_counts_every_living_latent_once():
    quality = sae.Quality(
        l0=1, mse=1, fvu=1, bias=1, density=torch.tensor([0.0, 1e-9, 1e-3, 0.05, 1.0, 1.0]).double(), inputs=1000
    )
    counts, edges, dead = quality.histogram(bins=6, lowest=-6.0)
    assert counts.tolist() == [1, 0, 0, 1, 1, 2]
    assert edges.tolist() == pytest.approx([-6, -5, -4, -3, -2, -1, 0])
    assert dead == 1


def test_recovery_knows_directions_up_to_length():
    model = trained_like()
    directions = torch.eye(6)[:4]
    with torch.no_grad():
        model.decoder.copy_(torch.nn.functional.pad(torch.eye(6)[:3] * 5, (0, 0, 0, 17)))
        model.decoder[3:] = torch.tensor([0, 0, 0, 1.0, 1.0, 0])
    found = sae.recovery(directions, model)
    assert found.share == pytest.approx(3 / 4)
    assert found.mmcs == pytest.approx((3 + 0.5**0.5) / 4)
    with pytest.raises(ValueError, match="size 7 cannot be found among decoder rows of size 6"):
        sae.recovery(torch.eye(7), model)


def test_quality_needs_something_to_explain():
    model = trained_like()
    with pytest.raises(ValueError, match="two inputs or more, got 0"):
        sae.measure(model, [])
    with pytest.raises(ValueError, match="all inputs are equal"):
        sae.measure(model, [torch.ones(4, 6)])


def test_the_geometric_median_ignores_a_few_far_points():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1000, 3, generator=generator) + torch.tensor([1.0, 2.0, 3.0])
    points[:20] += 1e4
    median = sae.geometric_median(points)
    assert (median - torch.tensor([1.0, 2.0, 3.0])).abs().max() < 0.15
    wide = points.double()
    gradient = torch.nn.functional.normalize(wide - sae.geometric_median(wide), dim=1).sum(dim=0)
    assert gradient.norm() < 1e-2  # of 1000 unit vectors: the sum of distances is stationary
    with pytest.raises(ValueError, match="not empty"):
        sae.geometric_median(torch.zeros(0, 3))


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    return llama(16, 3, 4, 44, kv_heads=2, vocab_size=50).build().eval()


def loss(model, tokens):
    logits = model(tokens)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), 10


def identity():
    model = sae.Standard(latents=32, penalty=0.0).build(16)
    with torch.no_grad():
        both = torch.cat([torch.eye(16), -torch.eye(16)])
        model.encoder.copy_(both)
        model.decoder.copy_(both)
    return model


def test_splicing_the_identity_recovers_everything_and_zeros_nothing(language_model):
    tokens = torch.arange(12).view(2, 6)
    whole = sae.loss_recovered(language_model, "blocks.1", identity(), [tokens], loss)
    assert whole.spliced == pytest.approx(whole.clean, abs=1e-6)
    assert whole.recovered == pytest.approx(1.0, abs=1e-4)
    nothing = identity()
    with torch.no_grad():
        nothing.decoder.zero_()
    none = sae.loss_recovered(language_model, "blocks.1", nothing, [tokens], loss, baseline=(whole.clean, whole.zero))
    assert none.recovered == pytest.approx(0.0, abs=1e-4)
    with interpret.edit(language_model, {"blocks.1": torch.zeros_like}), torch.no_grad():
        assert whole.zero == pytest.approx((loss(language_model, tokens)[0] / 10).item())


def test_first_positions_can_pass_unchanged(language_model):
    tokens = torch.arange(6).view(1, 6)
    nothing = identity()
    with torch.no_grad():
        nothing.decoder.zero_()
    with interpret.record(language_model, "blocks.0") as plain:
        language_model(tokens)
    with (
        sae.splice(language_model, "blocks.0", nothing, leave_out_first=2),
        interpret.record(language_model, "blocks.0") as seen,
    ):
        language_model(tokens)
    assert torch.equal(seen["blocks.0"][:, :2], plain["blocks.0"][:, :2])
    assert not seen["blocks.0"][:, 2:].any()


def test_activations_that_are_too_long_pass_unchanged(language_model):
    tokens = torch.arange(6).view(1, 6)
    nothing = identity()
    with torch.no_grad():
        nothing.decoder.zero_()
    with interpret.record(language_model, "blocks.0") as plain:
        language_model(tokens)
    lengths = plain["blocks.0"].norm(dim=-1)
    limit = lengths.median().item()
    with (
        sae.splice(language_model, "blocks.0", nothing, longest=limit),
        interpret.record(language_model, "blocks.0") as seen,
    ):
        language_model(tokens)
    long = lengths > limit
    assert long.any()
    assert torch.equal(seen["blocks.0"][long], plain["blocks.0"][long])
    assert not seen["blocks.0"][~long].any()


def test_an_autoencoder_of_another_size_is_refused_with_the_taps_name(language_model):
    with pytest.raises(ValueError, match=r"blocks.1 gives activations of size 16, the autoencoder reads size 6"):
        sae.loss_recovered(language_model, "blocks.1", trained_like(), [torch.arange(6).view(1, 6)], loss)
    with pytest.raises(ValueError, match="no batches"):
        sae.loss_recovered(language_model, "blocks.1", identity(), [], loss)
