"""Codes from attributes, and what a dictionary is worth for approximation and control."""

import pytest
import torch
from torch import nn

from paperworks.interpret import sae
from paperworks.interpret.circuits.patching import Site
from paperworks.interpret.sae.evaluation.supervised import (
    Location,
    agreement,
    approximation,
    least_squares_codes,
    mean_codes,
    sparse_edit,
)
from paperworks.models.presets.families import llama


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def unbalanced(n=400, noise=0.3):
    """Two attributes that often go together, and a third that does not."""
    generator = draws(1)
    first = torch.randint(4, (n,), generator=generator)
    second = torch.where(
        torch.rand(n, generator=generator) < 0.6, first % 3, torch.randint(3, (n,), generator=generator)
    )
    attributes = torch.stack((first, second, torch.randint(2, (n,), generator=generator)), dim=1)
    codes = [torch.randn(size, 6, dtype=torch.float64, generator=generator) for size in (4, 3, 2)]
    x = sum(code[values] for code, values in zip(codes, attributes.T, strict=True))
    return x + noise * torch.randn(n, 6, dtype=torch.float64, generator=generator), attributes


def test_mean_codes_are_the_means_of_groups_less_the_mean():
    x, attributes = unbalanced()
    found = mean_codes(x, attributes)
    assert found.sizes == (4, 3, 2)
    for index, code in enumerate(found.codes):
        for value in range(len(code)):
            rows = [row for row, held in zip(x, attributes[:, index].tolist(), strict=True) if held == value]
            assert torch.allclose(code[value], sum(rows) / len(rows) - x.mean(0), atol=1e-12)
    expected = torch.stack([found.mean + sum(found.codes[i][v] for i, v in enumerate(row)) for row in attributes])
    assert torch.allclose(found.reconstruct(attributes), expected, atol=1e-12)


def test_least_squares_codes_fit_as_well_as_a_regression_without_redundant_columns():
    x, attributes = unbalanced()
    found = least_squares_codes(x, attributes)
    columns = [torch.ones(len(x), dtype=torch.float64)]
    columns += [(attributes[:, i] == v).double() for i, size in enumerate((4, 3, 2)) for v in range(1, size)]
    design = torch.stack(columns, dim=1)
    fitted = design @ torch.linalg.solve(design.T @ design, design.T @ x)
    assert torch.allclose(found.reconstruct(attributes), fitted, atol=1e-10)
    worse = mean_codes(x, attributes).reconstruct(attributes)
    assert (x - worse).square().sum() > 1.1 * (x - fitted).square().sum()


@pytest.mark.parametrize("make", [mean_codes, least_squares_codes])
def test_codes_weighted_by_frequency_add_up_to_zero_and_weights_to_one(make):
    x, attributes = unbalanced()
    found = make(x, attributes)
    for index, code in enumerate(found.codes):
        counts = torch.bincount(attributes[:, index], minlength=len(code)).double()
        assert (counts @ code).abs().max() < 1e-10
    assert torch.allclose(found.weights(attributes).sum(dim=1), torch.ones(len(x), dtype=torch.float64))
    assert make(x.float(), attributes).codes[0].dtype == torch.float32


def test_balanced_additive_activations_give_the_true_codes_and_exact_edits():
    generator = draws(2)
    codes = [torch.randn(size, 8, dtype=torch.float64, generator=generator) for size in (5, 4)]
    every = torch.cartesian_prod(torch.arange(5), torch.arange(4))
    x = codes[0][every[:, 0]] + codes[1][every[:, 1]]
    for make in (mean_codes, least_squares_codes):
        found = make(x, every)
        for code, true in zip(found.codes, codes, strict=True):
            assert (code - (true - true.mean(0))).abs().max() < 1e-12
        new = (every[:, 1] + 1) % 4
        counterfactual = codes[0][every[:, 0]] + codes[1][new]
        assert (found.edit(x, 1, every[:, 1], new) - counterfactual).abs().max() < 1e-12


def test_an_edit_keeps_what_the_dictionary_does_not_explain():
    x, attributes = unbalanced()
    found = mean_codes(x, attributes)
    new = (attributes[:, 0] + 1) % 4
    other = attributes.clone()
    other[:, 0] = new
    left = found.edit(x, 0, attributes[:, 0], new) - found.reconstruct(other)
    assert torch.allclose(left, x - found.reconstruct(attributes), atol=1e-12)


def test_attributes_that_cannot_be_told_apart_are_refused():
    x = torch.randn(6, 3, generator=draws())
    same = torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match="values span 3 dimensions, 5 are needed"):
        least_squares_codes(x, torch.stack((same, same), dim=1))
    with pytest.raises(ValueError, match="attribute 0 never has value 3"):
        mean_codes(x, same[:, None], (5,))
    with pytest.raises(ValueError, match="attribute 0 has 2 values, counted from 0; found 2"):
        mean_codes(x, same[:, None], (2,))
    with pytest.raises(ValueError, match="there are 6 activations, but attributes of 5"):
        mean_codes(x, same[:5, None])
    with pytest.raises(ValueError, match="must be integers"):
        mean_codes(x, same[:, None].float())
    with pytest.raises(ValueError, match="sizes name 2 attributes, each row has 1"):
        mean_codes(x, same[:, None], (3, 2))
    with pytest.raises(ValueError, match=r"must have shape \(n, dim\)"):
        mean_codes(x[0], same[:, None])
    found = mean_codes(x, same[:, None])
    with pytest.raises(ValueError, match="attribute 1 is not one of the 1"):
        found.edit(x, 1, same, same)
    with pytest.raises(ValueError, match="new must hold one of 3 values"):
        found.edit(x, 0, same, same + 1)


def model_and_tokens():
    torch.manual_seed(0)
    model = llama(vocab_size=11, dim=16, depth=2, heads=2, hidden=24).build().eval()
    return model, torch.randint(11, (5, 7), generator=draws(3))


@pytest.mark.parametrize(
    ("site", "dim"),
    [
        (Site("blocks.0", -1), 16),
        (Site("blocks.0", torch.tensor([0, 3, 2, 6, 1])), 16),
        (Site("blocks.1.mixer.heads", 4, 1), 8),
    ],
)
def test_a_location_reads_and_writes_one_vector_a_prompt(site, dim):
    from paperworks.interpret import record

    model, tokens = model_and_tokens()
    place = Location(model, tokens, site)
    x = place.read()
    assert x.shape == (5, dim)
    with torch.no_grad(), record(model, site.path) as seen:
        clean = model(tokens)
    at = torch.as_tensor(site.position).expand(5)
    expected = seen[site.path][torch.arange(5), at]
    assert torch.equal(x, expected if site.head is None else expected[:, site.head])
    assert torch.equal(place.run(x), clean)
    other = Location(model, tokens.flip(0), site).read()
    with torch.no_grad():
        changed = place.run(other)
    assert (changed - clean).abs().max() > 1e-4
    # Nothing before the position changes: the model is causal.
    first = int((at % 7).min())
    assert torch.equal(changed[:, :first], clean[:, :first])


def test_a_location_of_several_vectors_is_refused():
    model, tokens = model_and_tokens()
    with pytest.raises(ValueError, match="several vectors a prompt"):
        Location(model, tokens, Site("blocks.0")).read()
    with pytest.raises(ValueError, match="several vectors a prompt"):
        Location(model, tokens, Site("blocks.0.mixer.heads", 2)).read()


def test_scores_have_their_ends_and_follow_their_formula():
    x = torch.randn(30, 4, dtype=torch.float64, generator=draws(4)) + 1
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    def run(y):
        return (y @ weight).tanh()

    def score(reconstruction):
        return approximation(x, reconstruction, run, lambda output: output)

    whole, nothing = score(x), score(x.mean(0).expand_as(x))
    assert (whole.sufficiency, whole.necessity) == pytest.approx((1, 1))
    assert (nothing.sufficiency, nothing.necessity) == pytest.approx((0, 0))
    half = 0.3 * x + 0.2
    clean, ablated = run(x).mean(), run(x.mean(0)).mean()
    found = score(half)
    assert found.sufficiency == pytest.approx(1 - float((clean - run(half).mean()).abs() / (clean - ablated).abs()))
    left = run(x.mean(0) + x - half).mean()
    assert found.necessity == pytest.approx(1 - float((ablated - left).abs() / (clean - ablated).abs()))
    with pytest.raises(ValueError, match="alike: nothing here"):
        approximation(x, x, lambda y: y * 0, lambda output: output[:, 0])
    with pytest.raises(ValueError, match="differ"):
        approximation(x, x[:3], run, lambda output: output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_approximation_refuses_a_metric_that_the_activations_change_by_rounding_only(dtype):
    # A linear metric has the same mean with x and with the mean of x in its place, but for rounding.
    x = torch.randn(57, 64, dtype=dtype, generator=draws(5)) + 1
    weight = torch.randn(64, dtype=dtype, generator=draws(6))
    assert float((x @ weight).double().mean() - (x.mean(0) @ weight).double()) != 0
    with pytest.raises(ValueError, match="alike: nothing here"):
        approximation(x, x, lambda y: y, lambda output: output @ weight)
    # The rounding of a float32 model stays what it is when the metric is computed in float64.
    with pytest.raises(ValueError, match="alike: nothing here"):
        approximation(x, x, lambda y: y @ weight, lambda output: output.double())
    # A small effect that is no rounding is scored.
    small = approximation(x, x, lambda y: y @ weight, lambda output: 1 + 1e-3 * output.square())
    assert small.sufficiency == 1
    assert abs(small.clean - small.ablated) < 0.2


def autoencoder(latents=10, dim=6):
    torch.manual_seed(3)
    model = sae.Standard(latents=latents, penalty=1.0, decoder="weighted").build(dim).double().eval()
    with torch.no_grad():
        model.decoder.mul_(torch.rand(latents, 1) * 8 + 4)
        model.encoder_bias.normal_(std=0.2)
        model.decoder_bias.normal_()
    return model


def greedy(model, x, target, k, toward):
    """Choose changes for one row by trying each."""
    before, after = model.encode(x), model.encode(target)
    wanted = target - x if toward == "activation" else model(target) - model(x)
    done, chosen = torch.zeros_like(x), []
    for _ in range(k):
        distances = {
            index: float((wanted - done - (after[index] - before[index]) * model.decoder[index]).norm())
            for index in range(model.latents)
            if index not in chosen
        }
        best = min(distances, key=distances.get)
        if distances[best] >= float((wanted - done).norm()):
            break
        chosen.append(best)
        done = done + (after[best] - before[best]) * model.decoder[best]
    written = before @ model.decoder
    moved = sum(
        max(float(before[i] - after[i]), 0) * float(model.decoder[i] @ written / written.square().sum()) for i in chosen
    )
    return x + done, set(chosen), moved


@pytest.mark.parametrize("toward", ["activation", "reconstruction"])
@pytest.mark.parametrize("k", [0, 1, 3, 10])
@torch.no_grad()
def test_a_sparse_edit_is_the_greedy_one(toward, k):
    model = autoencoder()
    x, target = torch.randn(2, 20, 6, dtype=torch.float64, generator=draws(5))
    found = sparse_edit(model, x, target, k, toward)
    for row in range(20):
        edited, chosen, moved = greedy(model, x[row], target[row], k, toward)
        assert torch.allclose(found.x[row], edited, atol=1e-12)
        assert set(found.changed[row].nonzero().flatten().tolist()) == chosen
        assert float(found.moved[row]) == pytest.approx(moved, abs=1e-12)


@torch.no_grad()
def test_all_changes_lead_to_the_targets_reconstruction_and_keep_the_error():
    model = autoencoder()
    with torch.no_grad():  # orthogonal rows: no change hinders another
        model.decoder.zero_()
        model.decoder[:6] = 3 * torch.eye(6)
    x, target = torch.randn(2, 20, 6, dtype=torch.float64, generator=draws(6))
    found = sparse_edit(model, x, target, 10, "reconstruction")
    assert torch.allclose(found.x - model(target), x - model(x), atol=1e-12)


def test_agreement_wants_every_part_of_the_answer():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]])
    target = torch.tensor([[1.0, -2.0], [3.0, -1.0], [-2.0, 5.0]])

    def signs(output):
        return (output > 0).long()

    assert agreement(lambda y: y, x, target, signs) == pytest.approx(2 / 3)
    assert agreement(lambda y: y, x, target, lambda y: signs(y)[:, 0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="discrete answers"):
        agreement(lambda y: y, x, target, lambda y: y)
    with pytest.raises(ValueError, match="k must be 0 or more"):
        sparse_edit(autoencoder(), torch.zeros(2, 6), torch.zeros(3, 6), 1)
    with pytest.raises(ValueError, match="unknown toward"):
        sparse_edit(autoencoder(), torch.zeros(2, 6), torch.zeros(2, 6), 1, "error")


def test_a_location_of_a_plain_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    place = Location(model, torch.randn(5, 4), Site("0"))
    assert place.read().shape == (5, 3)
    assert torch.allclose(place.run(torch.zeros(5, 3)), model[1].bias.detach().expand(5, 2))
