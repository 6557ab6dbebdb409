"""Weight formats by the names the field uses, with the few choices a command line offers."""

import dataclasses

from paperworks.compress.format import WeightFormat
from paperworks.compress.formats.aqlm import AQLM
from paperworks.compress.formats.awq import AWQ
from paperworks.compress.formats.fourbit import FP4, NF4
from paperworks.compress.formats.fp8 import FP8
from paperworks.compress.formats.gptq import GPTQ
from paperworks.compress.formats.llm_int8 import LLMInt8
from paperworks.compress.formats.quip import QuIP
from paperworks.compress.formats.quip_sharp import QuIPSharp
from paperworks.compress.formats.smoothquant import SmoothQuant
from paperworks.compress.formats.ternary import Ternary
from paperworks.compress.formats.uniform import Int8, Uniform
from paperworks.compress.ggml.format import GGML, K_FALLBACKS
from paperworks.compress.pruning.sparse import Magnitude, Wanda
from paperworks.compress.pruning.sparsegpt import SparseGPT
from paperworks.core.errors import unknown

NAMED: dict[str, type[WeightFormat]] = {
    "rtn": Uniform,
    "int8": Int8,
    "llm-int8": LLMInt8,
    "fp8": FP8,
    "smoothquant": SmoothQuant,
    "nf4": NF4,
    "fp4": FP4,
    "gptq": GPTQ,
    "awq": AWQ,
    "quip": QuIP,
    "quip-sharp": QuIPSharp,
    "aqlm": AQLM,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "ternary": Ternary,
}
GGUF_KINDS = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_1", "q5_0", "q4_1", "q4_0")


def names() -> list[str]:
    """The names that `named` knows."""
    return [*NAMED, *GGUF_KINDS]


def named(name: str, **choices: object) -> WeightFormat:
    """A format by name ("gptq", "nf4", "q4_k" ...); choices that are None are left to the format.

    Raises `ValueError` for an unknown name, a choice the format does not offer, or a value it does not have.
    """
    given = {key: value for key, value in choices.items() if value is not None}
    if name.lower() in GGUF_KINDS:
        kind = name.upper()
        if given:
            raise ValueError(f"{name} leaves nothing to choose (got {', '.join(given)}): its blocks are fixed")
        return GGML(kind=kind, fallback=K_FALLBACKS.get(kind))
    if name not in NAMED:
        raise ValueError(unknown("weight format", name, names()))
    cls = NAMED[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            offered = ", ".join(sorted(fields & {"bits", "group", "block", "sparsity", "pattern"})) or "nothing"
            raise ValueError(f"{name} has no choice of {key}; it offers {offered}")
    return cls(**given)
