"""Sizes of models, counted on the meta device: no memory, whatever the size."""

import torch
from torch import nn

from paperworks.models.model import ModelSpec


def count_parameters(model: ModelSpec | nn.Module, *, embedding: bool = True) -> int:
    """Number of parameters, tied ones once; without the (un)embedding tables if `embedding` is False."""
    if isinstance(model, ModelSpec):
        with torch.device("meta"):
            module: nn.Module = model.build()
    else:
        module = model
    skip = (
        set()
        if embedding
        else {id(p) for name, p in module.named_parameters() if _TABLES.intersection(name.split("."))}
    )
    return sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in skip)


_TABLES = {"embedding", "unembedding", "position"}
