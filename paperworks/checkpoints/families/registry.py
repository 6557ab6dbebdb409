"""The families we read and write, and the choice of the one that writes a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paperworks.checkpoints.families.bert import Bert
from paperworks.checkpoints.families.bloom import Bloom
from paperworks.checkpoints.families.gemma import Gemma, Gemma2
from paperworks.checkpoints.families.gpt import GPT1, GPT2
from paperworks.checkpoints.families.llama import Llama, Mistral
from paperworks.checkpoints.families.mamba import MambaFamily
from paperworks.checkpoints.families.mixtral import Mixtral
from paperworks.checkpoints.families.neox import NeoX
from paperworks.checkpoints.families.phi3 import Phi3
from paperworks.checkpoints.families.qwen2 import Qwen2
from paperworks.checkpoints.families.rwkv import RWKVFamily
from paperworks.checkpoints.families.switch import Switch
from paperworks.checkpoints.families.t5 import T5
from paperworks.checkpoints.family import Family, Inexpressible
from paperworks.checkpoints.spec_difference import kinds
from paperworks.core.errors import unknown

# In the order in which they are tried for a model that comes from none of them.
_REGISTERED: tuple[Family, ...] = (
    Llama(), Mistral(), Qwen2(), Gemma(), Gemma2(), Mixtral(), GPT1(), GPT2(), NeoX(), Phi3(), Bloom(), Bert(), T5(),
    Switch(), MambaFamily(), RWKVFamily(),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _REGISTERED}


def names() -> list[str]:
    """The model_types that are read and written."""
    return list(FAMILIES)


def lookup(model_type: str) -> Family:
    """The family of a model_type. Raises `ValueError` for one we do not read, with near misses."""
    if model_type not in FAMILIES:
        raise ValueError(unknown("model_type", str(model_type), FAMILIES))
    return FAMILIES[model_type]


def spec_from_config(config: Mapping[str, Any]) -> Any:
    """The spec that a config.json describes; see `Family.read` for what it raises."""
    return lookup(str(config.get("model_type"))).read(config)


def writer(
    spec: Any, source: str | None = None, candidates: Iterable[Family] | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family that writes a spec, and the config it writes.

    Args:
        spec: of the model.
        source: the model_type that the model was read from, tried first; None where it came from no such file.
        candidates: the families to try; None for all.

    Raises:
        ValueError: when no family expresses the spec, with each family's reasons, the nearest family first.
    """
    tried = sorted(FAMILIES.values() if candidates is None else candidates, key=lambda each: each.model_type != source)
    refusals: list[tuple[int, Family, Inexpressible]] = []
    for family in tried:
        try:
            return family, family.write(spec)
        except Inexpressible as error:
            refusals.append((len(kinds(spec) ^ kinds(family.read({}))), family, error))
    refusals.sort(key=lambda entry: (entry[0], len(entry[2].reasons)))
    listing = "".join(f"\n  {family.model_type}: {_first(error.reasons)}" for _, family, error in refusals)
    raise ValueError(
        f"no Hugging Face family expresses this model. Save it with paperworks.save, which keeps every spec, or change "
        f"what the nearest family lacks:{listing}"
    )


def _first(reasons: list[str]) -> str:
    more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
    return "; ".join(reasons[:3]) + more
