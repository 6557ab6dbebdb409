"""Training and evaluation mode for a while, with every module put back into its own afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode inside the block."""
    with _kept(model):
        model.eval()
        yield


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode inside the block.

    A model that is in training mode already is left alone, with those of its parts (a frozen normalization) that
    somebody has put in evaluation mode on purpose.
    """
    with _kept(model):
        if not model.training:
            model.train()
        yield
