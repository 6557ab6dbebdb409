"""How well features describe a board: coverage and board reconstruction (Karvonen et al. 2024, arXiv:2408.00113).

A property is a yes-or-no function of the board ("my disc stands on D3"). A feature with a threshold is a classifier of
every property. Classifiers are chosen on one set of positions, and judged on another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

THRESHOLDS = tuple(step / 10 for step in range(10))  # shares of a feature's largest activation
PRECISION = 0.95  # of a high-precision classifier
FEWEST = 10  # firings from which a precision is believed; 0.95 of fewer is 1


def f1(true_positives: Tensor, fired: Tensor, holds: Tensor) -> Tensor:
    """2 true positives / (fired + holds), the harmonic mean of precision and recall; 0 where nothing is."""
    return 2 * true_positives / (fired + holds).clamp_min(1)


@dataclass(frozen=True)
class Counts:
    """What the classifiers 1[feature_i > threshold * highest_i] do on some positions.

    Attributes:
        true_positives: positions where the classifier fires and the property holds.
        fired: positions where it fires. holds: positions where the property holds.
    """

    true_positives: Float[Tensor, "thresholds features properties"]
    fired: Float[Tensor, "thresholds features"]
    holds: Float[Tensor, " properties"]

    @property
    def f1(self) -> Float[Tensor, "thresholds features properties"]:
        """F1 of each classifier at each property."""
        return f1(self.true_positives, self.fired[..., None], self.holds)

    @property
    def precision(self) -> Float[Tensor, "thresholds features properties"]:
        """Share of a classifier's firings at which the property holds; 0 for one that never fires."""
        return self.true_positives / self.fired[..., None].clamp_min(1)


def count(
    features: Float[Tensor, "n features"],
    properties: Bool[Tensor, "n properties"],
    highest: Float[Tensor, " features"],
    thresholds: tuple[float, ...] = THRESHOLDS,
) -> Counts:
    """Count for all features, thresholds and properties at once, one product of matrices a threshold."""
    true = properties.to(features)
    true_positives, fired = [], []
    for threshold in thresholds:
        fires = _fires(features, highest, threshold)
        true_positives.append((fires.T @ true).double())  # whole numbers, exact in float32 below 2^24 positions
        fired.append(fires.sum(0).double())
    return Counts(torch.stack(true_positives), torch.stack(fired), true.sum(0).double())


def _fires(features: Tensor, highest: Tensor, threshold: float) -> Tensor:
    return (features > threshold * highest).to(features)


@dataclass(frozen=True)
class BoardClassifiers:
    """Classifiers chosen on a training set of positions; see `fit_classifiers`.

    Attributes:
        highest: largest activation of each feature there; 0 or below for a dead one, which never fires.
        thresholds: shares of it that were tried.
        best: for each property, (threshold, feature) of largest F1, as indices.
        lowest: for each feature and property, the index of the lowest threshold whose precision is high; the number of
            thresholds where none is.
    """

    highest: Float[Tensor, " features"]
    thresholds: tuple[float, ...]
    best: Int[Tensor, "properties 2"]
    lowest: Int[Tensor, "features properties"]

    def f1(
        self, features: Float[Tensor, "n features"], properties: Bool[Tensor, "n properties"]
    ) -> Float[Tensor, " properties"]:
        """F1 of each property's best classifier on these positions; coverage is their mean."""
        _check(features, properties, self.lowest.shape)
        fires = features[:, self.best[:, 1]] > self._bounds()[self.best[:, 0], self.best[:, 1]]
        hits = (fires & properties).sum(0).double()
        return f1(hits, fires.sum(0).double(), properties.sum(0).double())

    def coverage(self, features: Float[Tensor, "n features"], properties: Bool[Tensor, "n properties"]) -> float:
        """The mean over properties of the F1 of the classifier chosen for it."""
        return float(self.f1(features, properties).mean())

    def reconstruct(self, features: Float[Tensor, "n features"]) -> Bool[Tensor, "n properties"]:
        """Say that a property holds where any high-precision classifier of it fires.

        A classifier that fires also fires at every lower threshold, so the lowest one stands for all of a feature's.
        """
        found = torch.zeros(len(features), self.lowest.shape[1], dtype=torch.bool, device=features.device)
        for index, threshold in enumerate(self.thresholds):
            chosen = self.lowest == index
            if bool(chosen.any()):
                found |= _fires(features, self.highest, threshold) @ chosen.to(features) > 0
        return found

    def reconstruction(self, features: Float[Tensor, "n features"], properties: Bool[Tensor, "n properties"]) -> float:
        """The mean over positions of the F1 of the board that `reconstruct` predicts."""
        _check(features, properties, self.lowest.shape)
        return board_f1(self.reconstruct(features), properties)

    def _bounds(self) -> Tensor:
        return torch.stack([threshold * self.highest for threshold in self.thresholds])


def board_f1(predicted: Bool[Tensor, "n properties"], true: Bool[Tensor, "n properties"]) -> float:
    """The mean over positions of the F1 of a predicted board; an empty board predicted empty counts as 1."""
    if predicted.shape != true.shape or predicted.dtype != torch.bool or true.dtype != torch.bool:
        raise ValueError(
            f"boards are bool (positions, properties) of one shape; got {predicted.dtype} {tuple(predicted.shape)} "
            f"and {true.dtype} {tuple(true.shape)}"
        )
    hits, said, holds = ((each.sum(1).double()) for each in (predicted & true, predicted, true))
    return float(torch.where(said + holds == 0, 1.0, f1(hits, said, holds)).mean())


def fit_classifiers(
    features: Float[Tensor, "n features"],
    properties: Bool[Tensor, "n properties"],
    *,
    thresholds: tuple[float, ...] = THRESHOLDS,
    precision: float = PRECISION,
    fewest: int = FEWEST,
) -> BoardClassifiers:
    """Choose classifiers on a training set: for each property the best one, and all of high precision.

        phi_{i,t}(x) = 1[feature_i(x) > t * max_i]

    Args:
        features: what is on in each position: an autoencoder's latents, a model's neurons; off is 0 or below.
        properties: which properties hold in each.
        thresholds: t, shares of the feature's largest activation on this set, rising from 0 or more to below 1.
        precision: what a high-precision classifier reaches.
        fewest: firings without which a precision is not believed.

    Raises:
        ValueError: for shapes that do not fit, features that are not finite, thresholds or a precision out of range.
    """
    _check(features, properties)
    if not bool(torch.isfinite(features).all()):
        raise ValueError("a feature is not finite: look at what it was computed from")
    if not thresholds or sorted(set(thresholds)) != list(thresholds) or thresholds[0] < 0 or thresholds[-1] >= 1:
        raise ValueError(f"thresholds must rise, from 0 or more to below 1, got {thresholds}")
    if not 0 < precision <= 1 or fewest < 1:
        raise ValueError(f"precision must lie in (0, 1] and fewest be 1 or more, got {precision} and {fewest}")
    highest = features.amax(0)
    counts = count(features, properties, highest, thresholds)
    choices = counts.f1.flatten(0, 1).argmax(0)
    best = torch.stack([choices // features.shape[1], choices % features.shape[1]], dim=1)
    good = (counts.precision >= precision) & (counts.fired >= fewest)[..., None]
    lowest = torch.where(good.any(0), good.long().argmax(0), len(thresholds))  # argmax: the first that is good
    return BoardClassifiers(highest, tuple(thresholds), best, lowest)


def _check(features: Tensor, properties: Tensor, known: tuple[int, ...] | None = None) -> None:
    if features.dim() != 2 or properties.dim() != 2 or len(features) != len(properties) or not len(features):
        raise ValueError(
            "features (n, features) and properties (n, properties) need the same positions, one or more; got "
            f"{tuple(features.shape)} and {tuple(properties.shape)}"
        )
    if properties.dtype != torch.bool:
        raise ValueError(f"a property holds or does not: properties must be bool, got {properties.dtype}")
    if known is not None and (features.shape[1], properties.shape[1]) != tuple(known):
        raise ValueError(
            f"these classifiers were chosen for {known[0]} features and {known[1]} properties, got "
            f"{features.shape[1]} and {properties.shape[1]}"
        )
