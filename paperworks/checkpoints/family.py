"""The contract of a family of checkpoints: one model_type of transformers, its config and its tensors, both ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from paperworks.checkpoints.layout import Rule, TensorSource
from paperworks.checkpoints.spec_difference import differences
from paperworks.core.errors import CorruptFile, nearest

Config = Mapping[str, Any]
Part = TypeVar("Part")

# Entries of any config that change no logit: notes of the writer, token ids, labels of heads that are not part of the
# model, and settings of `generate` that old files keep here.
INERT = frozenset(
    """
    architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    custom_pipelines decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_past output_scores pad_token_id prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_cache
    """.split()  # noqa: SIM905  (read as a list of words)
)

# Entries of any config of which only these values can be computed here.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "tie_encoder_decoder": (False, None),
    "use_bfloat16": (False,),
    "cross_attention_hidden_size": (None,),
}

# A file may claim any depth, and some families make a list of it before the tensors are counted.
DEPTHS = frozenset({"num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"})
MOST_LAYERS = 2**16


class Inexpressible(ValueError):
    """A spec that a family has no config for; `reasons` says what it lacks, one line each."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        super().__init__("; ".join(self.reasons))


def expect(value: object, kind: type[Part], what: str) -> Part:
    """`value`, typed. Raises `Inexpressible` where it is of another kind, naming `what` it is."""
    if not isinstance(value, kind):
        raise Inexpressible([f"{what} is {type(value).__name__}, this family has {kind.__name__}"])
    return value


@dataclass(frozen=True, kw_only=True)
class GGUFNames:
    """How GGUF stores a family of the Llama line.

    Attributes:
        architecture: llama.cpp's name.
        rotary_permuted: whether query and key rows are ordered for adjacent pairs.
        gain_shift: what is added to the gains of norms.
    """

    architecture: str
    rotary_permuted: bool = False
    gain_shift: float = 0.0


class Family(ABC):
    """One model_type. Register an instance in `families.registry`, one file a family line.

    Attributes:
        model_type, architecture: transformers' names.
        prefix: of tensor names in the files of the whole model, which files of the base model leave out.
        defaults: the config entries that are honoured, and the class's default, which an absent entry takes.
        fixed: the entries of which only these values can be computed here; the first is the class's default.
        inert: the entries that change no logit.
        synonyms: other names of entries.
        ignorable: patterns of tensor names that hold nothing of the model (with or without the prefix).
        aliases: other names of tensors, by pattern part: every occurrence of the key may read as the value.
        copies: tensors that repeat another one: passed over where they equal it, refused where they do not.
        stand_ins: tensors that a file may leave out, and what stands for them.
        gguf: how GGUF stores the family, or None.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]]
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    inert: ClassVar[frozenset[str]] = frozenset()
    synonyms: ClassVar[Mapping[str, str]] = {}
    ignorable: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    copies: ClassVar[Mapping[str, str]] = {}
    stand_ins: ClassVar[Mapping[str, str]] = {}
    gguf: ClassVar[GGUFNames | None] = None

    @abstractmethod
    def spec(self, entries: Config) -> Any:
        """The spec of a config that has all entries of `defaults`. Raises ValueError for what we cannot compute."""

    @abstractmethod
    def config(self, spec: Any) -> dict[str, Any]:
        """The config of a spec. Raises `Inexpressible`; `write` checks what is left out by reading it back."""

    @abstractmethod
    def rules(self, spec: Any) -> list[Rule]:
        """How the tensors of the whole model's files correspond to ours."""

    def fitted(self, spec: Any, source: TensorSource) -> Any:
        """The spec without the parts that a file may leave out and this one does."""
        return spec

    def from_module(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A module's state dict under the names that files have."""
        return dict(state)

    def other_names(self, name: str) -> list[str]:
        """What files may call a tensor besides `name`."""
        found = [name.replace(part, other) for part, others in self.aliases.items() if part in name for other in others]
        return [bare for full in (name, *found) for bare in (full, full.removeprefix(self.prefix)) if bare != name]

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name holds nothing of the model."""
        return any(fnmatchcase(full, each) for each in self.ignorable for full in (name, self.prefix + name))

    def read(self, config: Config) -> Any:
        """The spec that a config.json describes.

        Raises:
            ValueError: for an entry that is not known, or a value that cannot be computed here.
            CorruptFile: when an entry is nonsense.
        """
        try:
            return self.spec(self.entries(config))
        except KeyError as error:
            raise CorruptFile(f"config.json of model_type {self.model_type!r} lacks {error.args[0]!r}") from error
        except (TypeError, ZeroDivisionError, OverflowError, AttributeError) as error:
            raise CorruptFile(
                f"config.json of model_type {self.model_type!r} has an entry of the wrong kind: {error}"
            ) from error

    def entries(self, config: Config) -> dict[str, Any]:
        """The honoured entries, defaults filled in; every other entry is inert or has the one value we compute."""
        found: dict[str, Any] = {}
        fixed = {**FIXED, **self.fixed}
        for name, value in config.items():
            key = self.synonyms.get(name, name)
            if key in self.defaults:
                if found.get(key, value) != value:
                    raise ValueError(f"config.json says {key}={found[key]!r} and, by another name, {value!r}")
                found[key] = value
            elif key in fixed:
                if value not in fixed[key]:
                    allowed = " or ".join(map(repr, fixed[key]))
                    raise ValueError(
                        f"{self.model_type} with {name}={_short(value)} is not read: this entry changes what the model "
                        f"computes, and only {allowed} is implemented"
                    )
            elif key not in self.inert and key not in INERT and not key.startswith("_"):
                close = nearest(name, [*self.defaults, *fixed, *self.inert])
                hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
                raise ValueError(
                    f"config.json of model_type {self.model_type!r} has an entry that this family does not know: "
                    f"{name}={_short(value)}{hint} It may change what the model computes; if it does not, remove it"
                )
        for key in DEPTHS & found.keys():
            if isinstance(found[key], int) and found[key] > MOST_LAYERS:
                raise ValueError(f"config.json describes {key}={found[key]}, more than {MOST_LAYERS} layers")
        return dict(self.defaults) | found

    def write(self, spec: Any) -> dict[str, Any]:
        """The config of a spec, which reads back as that spec. Raises `Inexpressible` with the reasons."""
        try:
            config = self.config(spec)
            back = self.read(config)
        except Inexpressible:
            raise
        except ValueError as error:
            raise Inexpressible([str(error)]) from error
        lost = differences(spec, back)
        if lost:
            raise Inexpressible(lost)
        return {"architectures": [self.architecture], "model_type": self.model_type, "torch_dtype": "float32"} | config


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
