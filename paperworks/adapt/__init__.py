"""Parameter-efficient adaptation: one wrapper for any linear-like layer, one short file a method."""

from paperworks.adapt.apply import (
    adapted,
    apply,
    coverage,
    disabled,
    in_use,
    names,
    per_row,
    remove,
    trainable_parameters,
    trained_whole,
    use,
)
from paperworks.adapt.contract import Adapter, Delta
from paperworks.adapt.delta import AdaptedLinear
from paperworks.adapt.dora import DoRA
from paperworks.adapt.files import load, save
from paperworks.adapt.ia3 import IA3
from paperworks.adapt.intrinsic import DID, SAID
from paperworks.adapt.layer_info import LayerInfo
from paperworks.adapt.lora import LoRA
from paperworks.adapt.merging import merge, merge_error
from paperworks.adapt.mora import MoRA, remora
from paperworks.adapt.peft_files import load_peft, save_peft
from paperworks.adapt.pissa import PiSSA

__all__ = [
    "DID",
    "IA3",
    "SAID",
    "AdaptedLinear",
    "Adapter",
    "Delta",
    "DoRA",
    "LayerInfo",
    "LoRA",
    "MoRA",
    "PiSSA",
    "adapted",
    "apply",
    "coverage",
    "disabled",
    "in_use",
    "load",
    "load_peft",
    "merge",
    "merge_error",
    "names",
    "per_row",
    "remora",
    "remove",
    "save",
    "save_peft",
    "trainable_parameters",
    "trained_whole",
    "use",
]
