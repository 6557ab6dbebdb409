import pytest
import torch

from paperworks.interpret.probing.probes import Probe, random_probe
from paperworks.papers.probing.defection_probes.defection import (
    area,
    blind_areas,
    blind_layered_areas,
    choose_layer,
    component_probe,
)

DRAWS = torch.Generator().manual_seed(3)
INSIDE, OUTSIDE = torch.randn(4, 30, 6, generator=DRAWS), torch.randn(4, 40, 6, generator=DRAWS)


def test_the_area_is_the_share_of_pairs_in_order_ties_counting_half():
    probe = random_probe(6, 1)
    inside, outside = INSIDE[0], OUTSIDE[0]
    outside = torch.cat([outside, inside[:5]])  # five ties
    one, other = inside.double() @ probe.direction, outside.double() @ probe.direction
    above = (one[:, None] > other).double() + 0.5 * (one[:, None] == other).double()
    assert area(probe, inside, outside) == pytest.approx(float(above.mean()), abs=1e-12)


def test_scale_and_shift_change_no_area_and_reversal_turns_it_over():
    probe = random_probe(6, 3)
    before = area(probe, INSIDE[0], OUTSIDE[0])
    assert area(Probe(3 * probe.direction, 7.0), INSIDE[0], OUTSIDE[0]) == before
    assert area(-probe, INSIDE[0], OUTSIDE[0]) == pytest.approx(1 - before, abs=1e-12)


def test_the_component_is_numpys_and_points_to_the_class():
    inside, outside = INSIDE[0].clone(), OUTSIDE[0]
    inside[:, 2] -= 9.0  # what varies most separates the classes, downwards
    probe = component_probe(inside, outside)
    states = torch.cat([inside, outside]).double()
    values, vectors = torch.linalg.eigh(torch.cov(states.T))
    assert float((probe.direction @ vectors[:, values.argmax()]).abs()) == pytest.approx(1.0, abs=1e-9)
    assert probe.direction[2] < -0.9
    assert area(probe, inside, outside) > 0.99
    assert float(probe.score(states).mean()) == pytest.approx(0.0, abs=1e-9)


def test_the_component_scores_whichever_class_is_named_higher():
    inside, outside = INSIDE[0].clone(), OUTSIDE[0]
    inside[:, 2] += 9.0
    one, other = component_probe(inside, outside), component_probe(outside, inside)
    assert area(one, inside, outside) > 0.99
    assert area(other, outside, inside) > 0.99
    assert torch.allclose(one.direction, -other.direction, atol=1e-9)


def test_labels_give_the_component_its_sign_and_nothing_else():
    inside, outside = INSIDE[0].clone(), OUTSIDE[0].clone()
    inside[:, 2] += 9.0
    mixed = torch.cat([inside, outside])[torch.randperm(70, generator=torch.Generator().manual_seed(0))]
    one, other = component_probe(inside, outside), component_probe(mixed[:30], mixed[30:])
    assert torch.allclose(one.direction.abs(), other.direction.abs(), atol=1e-9)


def test_the_layer_is_chosen_on_the_cases_given_and_tested_on_others():
    inside, outside = INSIDE.clone(), OUTSIDE.clone()
    inside[2, :, 0] += 9.0
    inside[3, :, 0] += 4.0
    probes = [Probe(torch.eye(6, dtype=torch.float64)[0])] * 4
    found = choose_layer(probes, inside, outside)
    assert found.layer == 2
    assert found.chosen_on[2] == pytest.approx(1.0)
    assert choose_layer(probes, inside, outside, {0, 1, 3}).layer == 3
    assert found.area(INSIDE, OUTSIDE) == area(probes[0], INSIDE[2], OUTSIDE[2])  # there layer 2 is no better
    assert found.areas(INSIDE, OUTSIDE)[3] == area(probes[0], INSIDE[3], OUTSIDE[3])
    assert torch.equal(found.scores(INSIDE), INSIDE[2, :, 0].double())


def test_random_directions_are_right_half_of_the_time():
    inside = INSIDE[0] + 3.0
    found = blind_areas(inside, OUTSIDE[0], draws=400)
    # AUROCs near 0 and 1 have a standard deviation of at most 0.5: 0.025 for the mean of 400, so 0.1 is 4 of them.
    assert abs(float(found.mean()) - 0.5) < 0.1
    assert float(found.std()) > 0.3  # the class is what varies most
    assert float(blind_areas(INSIDE[0], OUTSIDE[0], draws=400).std()) < 0.15


def test_random_directions_with_a_chosen_layer_do_better():
    inside = INSIDE + 1.0
    plain = blind_areas(inside[0], OUTSIDE[0], draws=100)
    chosen = blind_layered_areas((inside, OUTSIDE), (inside, OUTSIDE), draws=100)
    assert float(chosen.mean()) > float(plain.mean()) + 0.2
    one = blind_layered_areas((inside, OUTSIDE), (inside, OUTSIDE), [1], draws=3, seed=5)
    expected = [area(random_probe(6, 5 + 4 * draw + 1), inside[1], OUTSIDE[1]) for draw in range(3)]
    assert one.tolist() == pytest.approx(expected, abs=1e-6)


def test_wrong_input_is_refused_with_what_would_be_right():
    probes = [random_probe(6, seed) for seed in range(4)]
    with pytest.raises(ValueError, match="got 3 for states of 4 and 4 layers"):
        choose_layer(probes[:3], INSIDE, OUTSIDE)
    for layers in ([], [4], [-1]):
        with pytest.raises(ValueError, match="layers 0 to 3"):
            choose_layer(probes, INSIDE, OUTSIDE, layers)
    for call in (
        lambda: blind_areas(INSIDE[0], OUTSIDE[0], draws=0),
        lambda: blind_layered_areas((INSIDE, OUTSIDE), (INSIDE, OUTSIDE), draws=0),
    ):
        with pytest.raises(ValueError, match="at least 1; got 0"):
            call()
    with pytest.raises(ValueError, match="reads activations of 6 dimensions"):
        area(probes[0], INSIDE[0, :, :5], OUTSIDE[0, :, :5])
