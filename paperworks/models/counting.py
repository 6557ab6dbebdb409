"""Sizes of models, counted on the meta device: no memory, whatever the size."""

import torch
from torch import nn

from paperworks.models.backbone import Stack
from paperworks.models.seq2seq import Seq2Seq


def count_parameters(model: Stack | Seq2Seq | nn.Module, *, embedding: bool = True) -> int:
    """Return the number of parameters, tied ones once; without the (un)embedding tables if `embedding` is False."""
    if isinstance(model, Stack | Seq2Seq):
        with torch.device("meta"):
            model = model.build()
    skip = (
        set() if embedding else {id(p) for name, p in model.named_parameters() if _TABLES.intersection(name.split("."))}
    )
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in skip)


_TABLES = {"embedding", "unembedding", "position"}
