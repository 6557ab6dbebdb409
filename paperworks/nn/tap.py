"""Taps: named modules whose output is worth looking at, free of cost while nobody looks."""

from torch import Tensor, nn


class Tap(nn.Module):
    """The identity, under a name that `interpret.record` and `interpret.edit` can address."""

    def forward(self, value: Tensor) -> Tensor:
        """`value` itself, so that listeners can see or replace it."""
        return value

    @property
    def listened(self) -> bool:
        """Whether anybody records or edits this tap; values that only a listener needs are computed only then."""
        return bool(self._forward_hooks or self._forward_pre_hooks)
