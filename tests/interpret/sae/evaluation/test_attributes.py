"""Features against attributes, and activations made of attributes."""

from itertools import combinations

import pytest
import torch

from paperworks.interpret.sae.evaluation.attributes import AdditiveAttributes, attribute_scores, best_meanings

SIZES = (4, 3, 2)


def case(n=120, features=5):
    generator = torch.Generator().manual_seed(0)
    # Small values are more frequent: which union is best then depends on more than how often a feature is on.
    attributes = torch.stack([(size * torch.rand(n, generator=generator) ** 2).long() for size in SIZES], dim=1)
    latents = (torch.randn(n, features, generator=generator) + 0.8 * (attributes[:, :1] == 2)).relu()
    latents[:, 0] = 1 + torch.rand(n, generator=generator)  # always on
    latents[:, 1] = 0  # dead
    latents[:, 2] = (attributes[:, 1] == 1) * 2.0 + (attributes[:, 1] == 2) * 0.5  # a value, and weakly another
    return latents, attributes


def f1(on, truth):
    both = int((on & truth).sum())
    return 2 * both / max(1, int(on.sum()) + int(truth.sum()))


def balanced(on, truth):
    return (float((on & truth).sum() / truth.sum()) + float((~on & ~truth).sum() / (~truth).sum())) / 2


def detections(latents, feature, thresholds):
    largest = latents[:, feature].max()
    return [latents[:, feature] > largest * step / thresholds for step in range(thresholds)]


@pytest.mark.parametrize("thresholds", [1, 10])
def test_scores_are_those_of_counting(thresholds):
    latents, attributes = case()
    found = attribute_scores(latents, attributes, SIZES, thresholds)
    column = 0
    for index, size in enumerate(SIZES):
        for value in range(size):
            truth = attributes[:, index] == value
            for feature in range(latents.shape[1]):
                every = detections(latents, feature, thresholds)
                assert float(found.f1[feature, column]) == pytest.approx(max(f1(on, truth) for on in every))
                expected = max(balanced(on, truth) for on in every)
                assert float(found.balanced_accuracy[feature, column]) == pytest.approx(expected, abs=1e-6)
            column += 1
    best = found.f1.amax(dim=0)
    assert found.mean_best() == pytest.approx([float(best[:4].mean()), float(best[4:7].mean()), float(best[7:].mean())])
    assert len(found.mean_best_balanced()) == 3


def test_always_on_has_the_floor_and_a_threshold_tells_strong_from_weak():
    latents, attributes = case()
    found = attribute_scores(latents[:, :3], attributes, SIZES, thresholds=1)
    share = float((attributes[:, 2] == 1).double().mean())
    assert float(found.f1[0, 8]) == pytest.approx(2 * share / (1 + share))
    assert float(found.balanced_accuracy[0, 8]) == 0.5
    assert float(found.f1[1].max()) == 0.0
    assert float(found.f1[2, 5]) < 1.0
    assert float(attribute_scores(latents[:, :3], attributes, SIZES, thresholds=10).f1[2, 5]) == 1.0


def test_the_best_meaning_is_the_best_of_all_unions():
    latents, attributes = case()
    found = best_meanings(latents, attributes, SIZES, thresholds=4, most=3)
    for feature, meaning in enumerate(found):
        best = max(
            f1(on, torch.isin(attributes[:, index], torch.tensor(values)))
            for index, size in enumerate(SIZES)
            for count in range(1, min(3, size) + 1)
            for values in combinations(range(size), count)
            for on in detections(latents, feature, 4)
        )
        assert meaning.f1 == pytest.approx(best, abs=1e-9)
        assert meaning.feature == feature
        truth = torch.isin(attributes[:, meaning.attribute], torch.tensor(meaning.values))
        assert max(f1(on, truth) for on in detections(latents, feature, 4)) == pytest.approx(best)
    assert (found[2].attribute, found[2].values, found[2].f1) == (1, (1, 2), 1.0)
    short = best_meanings(latents, attributes, SIZES)
    assert all(len(meaning.values) <= SIZES[meaning.attribute] // 2 for meaning in short)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_unions_of_values_of_unequal_frequency_are_the_best_ones(most):
    generator = torch.Generator().manual_seed(2)
    values = (5 * torch.rand(300, generator=generator) ** 3).long()
    chance = torch.rand(30, 5, generator=generator) ** 3
    latents = (torch.rand(300, 30, generator=generator) < chance.T[values]).float()
    for feature, meaning in enumerate(best_meanings(latents, values[:, None], (5,), thresholds=1, most=most)):
        scores = {
            union: f1(latents[:, feature] > 0, torch.isin(values, torch.tensor(union)))
            for count in range(1, most + 1)
            for union in combinations(range(5), count)
        }
        assert meaning.f1 == pytest.approx(max(scores.values()))
        assert scores[meaning.values] == pytest.approx(max(scores.values()))


def test_additive_activations_are_sums_of_codes_at_the_wanted_scale():
    data = AdditiveAttributes((6, 5, 2), (1.0, 0.8, 0.3), dim=16, noise=0.05, mean_square=16.0, seed=3)
    x, attributes = data.draw(200_000, torch.Generator().manual_seed(1))
    assert float(x.square().sum(dim=1).mean()) == pytest.approx(16.0, rel=0.01)  # standard error 0.1%
    lengths = [float(code.norm(dim=1)[0]) / data.factor for code in data.codes]
    assert lengths == pytest.approx([1.0, 0.8, 0.3])
    noise = x[:100] - torch.stack([sum(data.codes[i][v] for i, v in enumerate(row)) for row in attributes[:100]])
    assert float(noise.std()) == pytest.approx(0.05 * data.factor, rel=0.1)
    assert float((data.read(x[:500]) == attributes[:500]).float().mean()) == 1.0
    assert torch.equal(next(data.batches(4, 1, seed=9)), next(data.batches(4, 1, seed=9)))


def test_bad_input_is_refused():
    latents, attributes = case()
    with pytest.raises(ValueError, match="thresholds is 0"):
        attribute_scores(latents, attributes, SIZES, 0)
    with pytest.raises(ValueError, match="0 or more"):
        attribute_scores(latents - 5, attributes, SIZES)
    with pytest.raises(ValueError, match="attributes of 120"):
        best_meanings(latents[:7], attributes, SIZES)
    with pytest.raises(ValueError, match="a magnitude and two values"):
        AdditiveAttributes((3, 2), (1.0,))
    with pytest.raises(ValueError, match="mean_square positive"):
        AdditiveAttributes((3, 2), (1.0, 1.0), mean_square=0.0)
