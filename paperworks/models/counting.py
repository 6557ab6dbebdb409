"""Sizes of models, counted on the meta device: no memory, whatever the size."""

import torch
from torch import nn

from paperworks.models.decoder import Decoder


def count_parameters(model: Decoder | nn.Module, *, embedding: bool = True) -> int:
    """Return the number of parameters, tied ones once; without the (un)embedding tables if `embedding` is False."""
    if isinstance(model, Decoder):
        with torch.device("meta"):
            model = model.build()
    skip = set() if embedding else {id(p) for name, p in model.named_parameters() if name.split(".")[0] in _TABLES}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in skip)


_TABLES = {"embedding", "unembedding", "position"}
