"""Tokenizer files in the Hugging Face layout: tokenizer.json, its configuration, its chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from paperworks.core.errors import CorruptFile
from paperworks.core.json_files import read_json_object

_USUAL = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[CLS]"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|endoftext|>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
}


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Which tokens play which role; `add_bos` None leaves the beginning to the tokenizer's own post-processor."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    stops: tuple[str, ...] = ()
    add_bos: bool | None = None

    @classmethod
    def guessed(cls, backend: tokenizers.Tokenizer) -> "SpecialTokens":
        """Recognise special tokens by their usual names, among those the file marks as special."""
        marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        bos, eos, pad, unk = (next((name for name in names if name in marked), None) for names in _USUAL.values())
        return cls(bos=bos, eos=eos, pad=pad, unk=unk)


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Raises FileNotFoundError, or CorruptFile when it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever its parser finds
        raise CorruptFile(f"{path} is not a tokenizer.json that can be read: {error}") from error


def read_folder(folder: Path) -> tuple[tokenizers.Tokenizer, SpecialTokens, str | None]:
    """The tokenizer of a folder, the roles of its special tokens, and its chat template."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json; a SentencePiece or vocab/merges tokenizer must be saved as one first "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    backend = read_backend(path)
    config = _read_json(folder / "tokenizer_config.json")
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    guessed = SpecialTokens.guessed(backend)
    configured = bool(named)
    roles: dict[str, Any] = {}
    for role in ("bos", "eos", "pad", "unk"):
        roles[role] = _content(named.get(f"{role}_token")) if configured else getattr(guessed, role)
    add_bos = config.get("add_bos_token")
    special = SpecialTokens(**roles, add_bos=add_bos if isinstance(add_bos, bool) and roles["bos"] else None)
    return backend, special, _template(folder, config)


def _content(token: object) -> str | None:
    """A special token is written as a string or as an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own before the configuration's; of several, the default one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def config_for(special: SpecialTokens, chat_template: str | None) -> dict[str, object]:
    """Compose tokenizer_config.json, naming the class under which transformers reads any tokenizer.json."""
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role in ("bos", "eos", "pad", "unk"):
        token = getattr(special, role)
        if token is not None:
            config[f"{role}_token"] = token
    if special.add_bos is not None:
        config["add_bos_token"] = special.add_bos
    if chat_template is not None:
        config["chat_template"] = chat_template
    return config
