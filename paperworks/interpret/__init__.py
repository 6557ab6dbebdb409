"""Record and edit activations of any `torch.nn.Module`, and steer with directions found in them."""

from paperworks.interpret.steering import (
    ControlVector,
    control_vector,
    last_token_activations,
    mean_difference,
    pca_difference,
)
from paperworks.interpret.taps import Recording, edit, record

__all__ = [
    "ControlVector",
    "Recording",
    "control_vector",
    "edit",
    "last_token_activations",
    "mean_difference",
    "pca_difference",
    "record",
]
