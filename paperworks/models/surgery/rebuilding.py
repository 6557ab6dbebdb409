"""A model of another spec made of the weights of one: what conversions share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paperworks.models.decoder import Decoder, DecoderModel


def rebuilt(
    model: DecoderModel, spec: Decoder, state: Mapping[str, Tensor], trainable: Mapping[str, bool] | None = None
) -> DecoderModel:
    """The model of `spec` with the weights of `state`, in the mode and with the tokenizer of `model`.

    Args:
        trainable: which parameters are, by name; those not named are as they are in `model`, new ones trainable.
    """
    held = {name: parameter.requires_grad for name, parameter in model.named_parameters()} | dict(trainable or {})
    with torch.device("meta"):  # no weights are drawn only to be replaced
        converted = spec.build()
    converted.load_state_dict(state, assign=True)
    converted.tie()
    for name, parameter in converted.named_parameters():
        parameter.requires_grad_(held.get(name, True))
    converted.tokenizer = model.tokenizer
    return converted.train(model.training)


def require_plain(model: DecoderModel) -> None:
    """Raise `TypeError` where the model holds other weights than its spec builds: adapters, compressed ones."""
    with torch.device("meta"):
        wanted = {name: each.shape for name, each in model.spec.build().state_dict().items()}
    held = {name: each.shape for name, each in model.state_dict().items()}
    if held != wanted:
        first = min(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
        raise TypeError(
            f"the model's weights are not those its spec builds, {first} for one: merge adapters first (adapt.merge), "
            "and load the weights uncompressed"
        )
