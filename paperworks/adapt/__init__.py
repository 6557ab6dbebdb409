"""Parameter-efficient adaptation: one wrapper for any linear-like layer, one short file a method."""

from paperworks.adapt.apply import adapted, apply, disabled, load, merge, remove, save, trainable_parameters
from paperworks.adapt.delta import AdaptedLinear, Adapter, Delta
from paperworks.adapt.lora import LoRA

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "Delta",
    "LoRA",
    "adapted",
    "apply",
    "disabled",
    "load",
    "merge",
    "remove",
    "save",
    "trainable_parameters",
]
