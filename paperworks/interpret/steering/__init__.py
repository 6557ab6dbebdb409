"""Directions that change what a model does."""

from paperworks.interpret.steering.vectors import (
    ControlVector,
    control_vector,
    last_token_activations,
    mean_difference,
    pca_difference,
    random_vector,
)

__all__ = [
    "ControlVector",
    "control_vector",
    "last_token_activations",
    "mean_difference",
    "pca_difference",
    "random_vector",
]
