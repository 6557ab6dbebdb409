"""Coverage and board reconstruction against loops over every feature, threshold and property."""

import pytest
import torch

from paperworks.papers.autoencoders.board_game_sae_metrics.board_metrics import (
    THRESHOLDS,
    board_f1,
    count,
    fit_classifiers,
)


def cases(n=300, features=7, properties=5, seed=0):
    draws = torch.Generator().manual_seed(seed)
    true = torch.rand(n, properties, generator=draws) < 0.3
    noise = torch.rand(n, features, generator=draws)
    on = torch.rand(n, features, generator=draws) < 0.2
    on[:, :properties] |= true & (torch.rand(n, properties, generator=draws) < 0.7)
    values = noise * on
    values[:, -1] = 0  # dead
    return values, true


def plain_f1(fires, true):
    hits = sum(1 for a, b in zip(fires, true, strict=True) if a and b)
    said, holds = sum(fires), sum(true)
    if hits == 0:
        return 0.0
    precision, recall = hits / said, hits / holds
    return 2 * precision * recall / (precision + recall)


def test_every_f1_is_the_brute_force_one():
    features, true = cases(n=80)
    highest = features.amax(0)
    found = count(features, true, highest).f1
    for t, threshold in enumerate(THRESHOLDS):
        for i in range(7):
            fires = [value > threshold * highest[i].item() for value in features[:, i].tolist()]
            for g in range(5):
                assert found[t, i, g].item() == pytest.approx(plain_f1(fires, true[:, g].tolist()), abs=1e-12)


def test_coverage_judges_on_new_positions_what_was_chosen_on_the_first():
    (features, true), (new, new_true) = cases(seed=0), cases(seed=1)
    classifiers = fit_classifiers(features, true)
    highest, total = features.amax(0), 0.0
    for g in range(5):
        best, choice = -1.0, None
        for threshold in THRESHOLDS:
            for i in range(7):
                score = plain_f1((features[:, i] > threshold * highest[i]).tolist(), true[:, g].tolist())
                if score > best + 1e-12:
                    best, choice = score, (threshold, i)
        threshold, i = choice
        total += plain_f1((new[:, i] > threshold * highest[i]).tolist(), new_true[:, g].tolist())
    assert classifiers.coverage(new, new_true) == pytest.approx(total / 5, abs=1e-12)


@pytest.mark.parametrize(("precision", "fewest"), [(0.95, 10), (0.6, 3)])
def test_a_board_is_what_any_high_precision_classifier_says(precision, fewest):
    (features, true), (new, new_true) = cases(seed=0), cases(seed=1)
    classifiers = fit_classifiers(features, true, precision=precision, fewest=fewest)
    highest = features.amax(0)
    expected = torch.zeros_like(new_true)
    chosen = 0
    for threshold in THRESHOLDS:
        for i in range(7):
            fires = features[:, i] > threshold * highest[i]
            for g in range(5):
                if fires.sum() >= fewest and true[fires, g].double().mean() >= precision:
                    chosen += 1
                    expected[:, g] |= new[:, i] > threshold * highest[i]
    assert torch.equal(classifiers.reconstruct(new), expected)
    assert chosen > 0 or precision == 0.95
    boards = zip(expected.tolist(), new_true.tolist(), strict=True)
    scores = [plain_f1(said, holds) if sum(said) + sum(holds) else 1.0 for said, holds in boards]
    assert classifiers.reconstruction(new, new_true) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_a_classifier_of_few_firings_is_not_believed():
    true = torch.zeros(100, 1, dtype=torch.bool)
    true[:40] = True
    features = torch.zeros(100, 2)
    features[:9, 0] = 1.0  # always right, nine times
    features[:10, 1] = 1.0  # always right, ten times
    classifiers = fit_classifiers(features, true)
    assert (classifiers.lowest[:, 0] == torch.tensor([len(THRESHOLDS), 0])).all()


def test_high_thresholds_are_used_where_only_they_are_precise():
    true = torch.zeros(100, 1, dtype=torch.bool)
    true[:20] = True
    features = torch.full((100, 1), 0.35)
    features[:20] = 1.0
    classifiers = fit_classifiers(features, true)
    assert classifiers.lowest.item() == 4  # the first threshold above 0.35
    assert torch.equal(classifiers.reconstruct(features), true)
    assert classifiers.coverage(features, true) == 1.0


def test_true_properties_as_features_give_one_and_one():
    _, true = cases(n=400)
    classifiers = fit_classifiers(true.float(), true)
    _, new = cases(n=400, seed=9)
    assert classifiers.coverage(new.float(), new) == 1.0
    assert classifiers.reconstruction(new.float(), new) == 1.0


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_an_independent_feature_has_the_f1_of_its_density(density):
    draws = torch.Generator().manual_seed(0)
    n, base = 200_000, 0.3
    true = torch.rand(n, 1, generator=draws) < base
    features = (torch.rand(n, 1, generator=draws) < density).float()
    found = count(features, true, features.amax(0)).f1
    # Relative standard deviation of the true positives: below 1 / sqrt(0.03 n) = 1.3%.
    assert found.flatten().tolist() == pytest.approx([2 * base * density / (base + density)] * 10, rel=0.04)


def test_dead_and_negative_features_never_fire():
    true = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    features = torch.stack([torch.zeros(50), -torch.rand(50)], dim=1)
    classifiers = fit_classifiers(features, true)
    assert classifiers.coverage(features, true) == 0.0
    assert not classifiers.reconstruct(features).any()


def test_a_board_without_properties_is_right_when_nothing_is_said():
    empty = torch.zeros(1, 3, dtype=torch.bool)
    one = torch.tensor([[True, False, False]])
    assert board_f1(empty, empty) == 1.0
    assert board_f1(empty, one) == 0.0
    assert board_f1(one, empty) == 0.0
    assert board_f1(torch.cat([one, one]), torch.cat([one, torch.tensor([[True, True, False]])])) == pytest.approx(
        5 / 6
    )


def test_bad_input_is_refused():
    features, true = cases()
    with pytest.raises(ValueError, match="the same positions"):
        fit_classifiers(features[:5], true)
    with pytest.raises(ValueError, match=r"must be bool, got torch\.float32"):
        fit_classifiers(features, true.float())
    with pytest.raises(ValueError, match="not finite"):
        fit_classifiers(features / 0, true)
    with pytest.raises(ValueError, match="thresholds must rise"):
        fit_classifiers(features, true, thresholds=(0.5, 0.1))
    with pytest.raises(ValueError, match=r"precision must lie in \(0, 1\]"):
        fit_classifiers(features, true, precision=1.5)
    with pytest.raises(ValueError, match="chosen for 7 features and 5 properties, got 6 and 5"):
        fit_classifiers(features, true).coverage(features[:, :6], true)
    with pytest.raises(ValueError, match="bool"):
        board_f1(true.float(), true)
