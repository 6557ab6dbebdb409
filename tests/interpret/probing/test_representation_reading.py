import pytest
import torch
from torch.nn.functional import normalize

from paperworks import interpret
from paperworks.interpret.probing.probes import Probe, leading_component
from paperworks.interpret.probing.representation_reading import (
    concept_prompt,
    lat,
    mean_reading,
    ranked,
    scan,
    two_means_reading,
)


def stimuli(pairs=60, dim=16, apart=2.0, spread=0.5):
    """Pairs that share their content and differ along one direction, with some of it in each pair's own way."""
    direction = normalize(torch.randn(dim, dtype=torch.float64), dim=0)
    content = torch.randn(pairs, dim, dtype=torch.float64)
    amount = apart * (1 + 0.3 * torch.randn(pairs, 1, dtype=torch.float64))

    def noise():
        return spread * torch.randn(pairs, dim, dtype=torch.float64)

    return content + amount * direction + noise(), content - amount * direction + noise(), direction


def test_the_template_asks_for_the_concept_twice_and_ends_where_it_is_read():
    prompt = concept_prompt("happiness", "You find a coin.")
    assert prompt.count("happiness") == 2
    assert "You find a coin." in prompt
    assert prompt.endswith("The amount of happiness is")


@pytest.mark.parametrize("unit", [True, False])
def test_random_order_finds_the_planted_direction_with_its_sign(unit):
    positive, negative, direction = stimuli()
    for seed in range(5):
        assert lat(positive, negative, seed=seed, unit=unit).direction @ direction > 0.95
        assert lat(negative, positive, seed=seed, unit=unit).direction @ direction < -0.95


def test_it_is_the_principal_component_of_the_differences():
    positive, negative, _ = stimuli(30, 5)
    differences = positive - negative
    moment = torch.linalg.eigh(differences.T @ differences).eigenvectors[:, -1]
    found = lat(positive, negative, order="as given", center=False).direction
    assert abs(found @ moment) > 1 - 1e-10
    centred = differences - differences.mean(0)
    covariance = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    assert abs(lat(positive, negative, order="as given").direction @ covariance) > 1 - 1e-10


def test_without_centring_the_order_of_pairs_does_not_matter():
    positive, negative, _ = stimuli()
    one = lat(positive, negative, order="as given", center=False).direction
    for seed in range(3):
        assert one @ lat(positive, negative, seed=seed, center=False).direction > 1 - 1e-10


def test_centring_ordered_pairs_removes_the_mean_difference():
    # Every pair differs by exactly the same vector and a little noise: centred, only the noise is left.
    shift = torch.zeros(16, dtype=torch.float64)
    shift[0] = 5.0
    base, noise = torch.randn(2, 40, 16, dtype=torch.float64)
    positive, negative = base + shift + 0.3 * noise, base
    assert abs(lat(positive, negative, order="as given").direction[0]) < 0.7
    assert lat(positive, negative, order="as given", center=False).direction[0] > 0.99
    assert lat(positive, negative).direction[0] > 0.95


def test_a_constant_added_to_all_activations_changes_no_score():
    positive, negative, _ = stimuli()
    test, shift = torch.randn(7, 16, dtype=torch.float64), 10 * torch.randn(16, dtype=torch.float64)
    for fit in (lat, mean_reading):
        before = fit(positive, negative).score(test)
        assert torch.allclose(fit(positive + shift, negative + shift).score(test + shift), before, atol=1e-9)


def test_the_mean_reading_is_the_unit_difference_of_means():
    positive, negative, direction = stimuli()
    found = mean_reading(positive, negative)
    assert torch.allclose(found.direction, normalize(positive.mean(0) - negative.mean(0), dim=0), atol=1e-12)
    assert abs(found.score(positive.mean(0)) + found.score(negative.mean(0))) < 1e-9
    assert ranked(found, positive, negative).double().mean() > 0.95
    assert found.direction @ direction > 0.95


def test_two_means_separates_two_clouds_and_labels_fix_the_sign():
    labels = torch.rand(80) < 0.5
    activations = torch.randn(80, 6) + 6 * labels[:, None] * torch.eye(6)[0]
    for truth in (labels, ~labels):
        assert (two_means_reading(activations, truth).predict(activations) == truth).double().mean() > 0.95


def test_two_means_ends_at_a_fixed_point():
    activations, labels = torch.randn(50, 3, dtype=torch.float64), torch.rand(50) < 0.5
    inside = two_means_reading(activations, labels).predict(activations)
    first, second = activations[inside].mean(0), activations[~inside].mean(0)
    assert torch.equal((activations - first).norm(dim=1) < (activations - second).norm(dim=1), inside)


def test_a_scan_reads_every_token_where_it_stands():
    from tests.interpret.test_taps import model

    decoder = model.__wrapped__()
    dim = decoder.spec.dim
    probes = {"blocks.0": Probe(torch.randn(dim).double(), 0.5), "blocks.1": Probe(torch.randn(dim).double())}
    trace = scan(decoder, [1, 2, 3], probes)
    with interpret.record(decoder, "blocks.*") as seen:
        decoder(torch.tensor([[1, 2, 3]]))
    for path, probe in probes.items():
        assert torch.allclose(trace[path], seen[path][0].double() @ probe.direction + probe.bias)
        # A causal model's trace of a beginning is the beginning of its trace.
        assert torch.allclose(scan(decoder, [1, 2], probes)[path], trace[path][:2], atol=1e-5)


def test_bad_input_is_refused():
    positive, negative, _ = stimuli()
    with pytest.raises(ValueError, match="pair up"):
        lat(positive, negative[:-1])
    with pytest.raises(ValueError, match="unknown order"):
        lat(positive, negative, order="sorted")
    with pytest.raises(ValueError, match="one pair"):
        lat(positive[:1], negative[:1])
    with pytest.raises(ValueError, match="all alike"):
        lat(positive, positive)
    with pytest.raises(ValueError, match="same mean"):
        mean_reading(positive, positive)
    with pytest.raises(ValueError, match="one text"):
        scan(torch.nn.Linear(2, 2), [], {})
    assert leading_component(positive).shape == (16,)
