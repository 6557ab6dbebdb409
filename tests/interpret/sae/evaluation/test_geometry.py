"""Neighbourhoods, attribution and ablation."""

import pytest
import torch
from torch import nn

from paperworks import interpret
from paperworks.interpret import sae
from paperworks.models.presets.families import llama


def test_neighbours_are_by_cosine_whatever_the_lengths_and_never_oneself():
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    found = sae.neighbours(rows, k=2)
    assert found.indices[0].tolist() == [1, 2]
    assert found.indices[2, 0].item() == 1
    assert found.cosines[0, 0].item() == pytest.approx(0.9 / (0.82**0.5))
    scaled = sae.neighbours(rows * torch.tensor([[0.01], [100.0], [3.0], [7.0]]), k=2)
    assert torch.equal(scaled.indices, found.indices)
    assert torch.allclose(scaled.cosines, found.cosines, atol=1e-6)


def test_dead_features_are_nobodys_neighbours():
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    alive = torch.tensor([True, False, True])
    assert sae.neighbours(rows, k=1, alive=alive).indices[0].item() == 2
    assert sae.neighbours(rows[:1], rows, k=1, alive=alive).indices[0].item() == 0  # another dictionary's own twin
    with pytest.raises(ValueError, match="k is 2, but only 1 rows"):
        sae.neighbours(rows, k=2, alive=alive)
    with pytest.raises(ValueError, match="rows of size 2 have no neighbours among rows of size 3"):
        sae.neighbours(rows, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"alive has shape \(2,\)"):
        sae.neighbours(rows, k=1, alive=alive[:2])


def test_the_map_keeps_what_two_dimensions_can():
    angles = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 6.28
    flat = torch.stack([angles.cos(), angles.sin()], dim=1)
    rotated = torch.nn.functional.pad(flat, (0, 3)) @ torch.linalg.qr(torch.randn(5, 5)).Q
    on_map = sae.project(rotated)
    assert torch.allclose(torch.cdist(on_map, on_map), torch.cdist(flat, flat), atol=1e-5)
    with pytest.raises(ValueError, match="no 6 principal components"):
        sae.project(rotated, 6)


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = llama(16, 2, 4, 44, kv_heads=2, vocab_size=50).build().double().eval()
    autoencoder = sae.Standard(latents=40, penalty=1.0).build(16).double().eval()
    with torch.no_grad():
        autoencoder.decoder_bias.normal_(std=0.3)
        autoencoder.encoder_bias.normal_(std=0.1)
    return model, autoencoder, torch.arange(7).view(1, 7)


def difference(output):
    return output[0, -1, 3] - output[0, -1, 9]


@pytest.mark.parametrize("frozen", [False, True])
def test_attributions_add_up_to_the_gradient_times_the_activations(setting, frozen):
    model, autoencoder, tokens = setting
    model.requires_grad_(not frozen)
    parts = sae.attribute(model, "blocks.0", autoencoder, tokens, difference)
    model.requires_grad_(True)
    with interpret.record(model, "blocks.0", detach=False) as seen:
        metric = difference(model(tokens))
    (gradient,) = torch.autograd.grad(metric, seen["blocks.0"])
    whole = (seen["blocks.0"] * gradient).sum(dim=-1)
    assert torch.allclose(parts.latents.sum(dim=-1) + parts.error + parts.bias, whole, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_for_a_linear_metric_attribution_is_ablation(setting):
    _, autoencoder, _ = setting
    model = nn.Sequential(nn.Identity(), nn.Linear(16, 3)).double()
    x = torch.randn(1, 4, 16, dtype=torch.float64)

    def metric(output):
        return output[0, :, 1].sum() - output[0, 2, 0]

    parts = sae.attribute(model, "0", autoencoder, x, metric)
    for latent, position in ((0, 1), (7, 2), (20, 3)):
        effect = sae.ablate(model, "0", autoencoder, x, metric, latent, position)
        assert effect == pytest.approx(parts.latents[0, position, latent].item(), abs=1e-12)


def test_ablation_is_the_change_of_the_edited_run(setting):
    model, autoencoder, tokens = setting
    with interpret.record(model, "blocks.0") as seen, torch.no_grad():
        clean = difference(model(tokens))
    x = seen["blocks.0"].clone()
    latents = autoencoder.encode(x)
    latent = int(latents[0, 4].argmax())
    x[0, 4] -= latents[0, 4, latent].detach() * autoencoder.decoder[latent].detach()
    with interpret.edit(model, {"blocks.0": lambda _: x}), torch.no_grad():
        changed = difference(model(tokens))
    effect = sae.ablate(model, "blocks.0", autoencoder, tokens, difference, latent, 4)
    assert effect == pytest.approx((clean - changed).item(), abs=1e-12)
    assert effect != 0


def test_metrics_that_cannot_be_attributed_are_refused(setting):
    model, autoencoder, tokens = setting
    with pytest.raises(ValueError, match=r"the metric has shape \(50,\)"):
        sae.attribute(model, "blocks.0", autoencoder, tokens, lambda output: output[0, -1])
    with pytest.raises(ValueError, match=r"does not depend on blocks\.0"):
        sae.attribute(model, "blocks.0", autoencoder, tokens, lambda output: torch.zeros((), requires_grad=True) * 2)
    with pytest.raises(ValueError, match="latent 40 is not one of the 40"):
        sae.ablate(model, "blocks.0", autoencoder, tokens, difference, 40, 0)


def test_families_turn_on_one_child_at_a_time():
    data = sae.Families()
    coefficients = data.coefficients(20_000, torch.Generator().manual_seed(0)).view(-1, 32, 4)
    on = (coefficients > 0).sum(dim=2)
    assert on.max() == 1
    assert on.sum(dim=1).float().mean().item() == pytest.approx(3.0, abs=0.06)  # five standard errors of 20,000
    assert data.draw(8).shape == (8, 64)
    near = (data.directions.view(32, 4, 64) @ data.parents[:, :, None]).squeeze(-1)
    assert near.min() > 0.5  # 1/sqrt(2), and a little less where the noise points back
    closer = sae.Families(spread=0.4)
    near = (closer.directions.view(32, 4, 64) @ closer.parents[:, :, None]).squeeze(-1)
    assert near.min() > 0.85
