"""What Hugging Face calls our activations."""

from typing import Any

from paperworks.core.errors import unknown

OURS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
THEIRS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}


def read_activation(name: str) -> Any:
    """Return our name of an activation; ValueError for one we do not read, with those we do."""
    if name not in OURS:
        raise ValueError(unknown("activation in config.json", name, OURS))
    return OURS[name]


def write_activation(name: str) -> str:
    """Return their name of an activation of ours; ValueError where they have none."""
    if name not in THEIRS:
        raise ValueError(unknown("activation with a name in Hugging Face's configs", name, THEIRS))
    return THEIRS[name]
