"""Parameter-efficient adaptation: one wrapper for any linear-like layer, one short file a method."""

from paperworks.adapt.apply import adapted, apply, disabled, in_use, names, remove, trainable_parameters, use
from paperworks.adapt.delta import AdaptedLinear, Adapter, Delta
from paperworks.adapt.files import load, save
from paperworks.adapt.intrinsic import DID, SAID
from paperworks.adapt.lora import LoRA
from paperworks.adapt.merging import merge, merge_error
from paperworks.adapt.mora import MoRA, remora
from paperworks.adapt.peft_files import load_peft, save_peft

__all__ = [
    "DID",
    "SAID",
    "AdaptedLinear",
    "Adapter",
    "Delta",
    "LoRA",
    "MoRA",
    "adapted",
    "apply",
    "disabled",
    "in_use",
    "load",
    "load_peft",
    "merge",
    "merge_error",
    "names",
    "remora",
    "remove",
    "save",
    "save_peft",
    "trainable_parameters",
    "use",
]
