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
    """Our name of an activation. Raises `ValueError` for one we do not read, with those we do."""
    if name not in OURS:
        raise ValueError(unknown("activation in config.json", str(name), OURS))
    return OURS[name]


def write_activation(name: str, tanh: str = "gelu_new") -> str:
    """Their name of an activation of ours; `tanh` is the family's name of the tanh form of GELU.

    Raises `ValueError` where they have none.
    """
    if name not in THEIRS:
        raise ValueError(unknown("activation with a name in Hugging Face's configs", name, THEIRS))
    return tanh if name == "gelu_tanh" else THEIRS[name]
