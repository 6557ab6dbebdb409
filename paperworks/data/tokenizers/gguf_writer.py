"""Tokenizers as GGUF metadata: the vocabulary in full, and the name of the rules by which text is cut.

GGUF has only a name for those rules, so a tokenizer is written when its rules are those that a name stands for, and
refused otherwise: read back, it must give the same ids.
"""

import json
from typing import Any

import tokenizers

from paperworks.data.tokenizers.files import SpecialTokens
from paperworks.data.tokenizers.gguf import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, gguf_tokenizer

NORMAL, BYTE = 1, 6  # kinds of token: GGUF's tokenizer.ggml.token_type

# One name for each set of rules; the first is the one whose rules a written file is given.
_NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "mpt")

_INSTEAD = 'take the tokenizer off (model.tokenizer = None), or export layout="huggingface", which holds the rules'


def gguf_metadata(
    backend: tokenizers.Tokenizer, special: SpecialTokens, chat_template: str | None
) -> dict[str, object]:
    """The `tokenizer.*` entries of a GGUF file; see `Tokenizer.gguf_metadata`."""
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise ValueError(f"GGUF holds tokenizers that merge (BPE), this is {model['type']} without merges; {_INSTEAD}")
    tokens, kinds = _vocabulary(backend.get_vocab(with_added_tokens=True), described["added_tokens"])
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    entries: dict[str, object] = {"tokens": tokens, "token_type": kinds} | _roles(backend, special)
    if model.get("byte_fallback"):
        entries |= {"model": "llama", "pre": "default", "scores": _scores(tokens, pairs)}
        entries |= {"add_space_prefix": _prepends(described), "token_type": _piece_kinds(tokens, kinds, special)}
    else:
        entries |= {"model": "gpt2", "pre": _name(described), "merges": [" ".join(pair) for pair in pairs]}
    metadata: dict[str, object] = {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    _check(described, metadata)
    return metadata


def _vocabulary(vocabulary: dict[str, int], added: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """The tokens by id and their kinds; an id that no token has gets a name that no text is cut into."""
    size = max(vocabulary.values()) + 1
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    for token, index in vocabulary.items():
        tokens[index], kinds[index] = token, NORMAL
    for entry in added:
        kinds[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    return tokens, kinds


def _roles(backend: tokenizers.Tokenizer, special: SpecialTokens) -> dict[str, object]:
    """The ids of the special tokens, and whether a text begins with the first of them."""
    named = {"bos": special.bos, "eos": special.eos, "padding": special.pad, "unknown": special.unk}
    named |= dict(zip(("eot", "eom"), special.stops, strict=False))
    found = {role: backend.token_to_id(token) for role, token in named.items() if token is not None}
    ids = {role: index for role, index in found.items() if index is not None}
    begins = special.add_bos
    if begins is None:  # the post-processor decides
        begins = "bos" in ids and backend.encode("a").ids[:1] == [ids["bos"]]
    return {**{f"{role}_token_id": index for role, index in ids.items()}, "add_bos_token": begins}


def _name(described: dict[str, Any]) -> str:
    """The name of the rules that a byte-level tokenizer follows."""
    for name in _NAMES:
        metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
        like = gguf_tokenizer(metadata | {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []})
        if _rules(json.loads(like.to_str())) == _rules(described):
            return name
    raise ValueError(
        "GGUF has no name known here for the rules by which this tokenizer cuts text "
        f"({json.dumps(described['pre_tokenizer'])[:200]}); named are those of {', '.join(_NAMES)}; {_INSTEAD}"
    )


def _rules(described: dict[str, Any]) -> tuple[object, ...]:
    """What decides how text is cut: the normalizer, the pre-tokenizer's steps, and whether words stay whole."""
    cutter = described["pre_tokenizer"] or {"type": None}
    steps = [_step(step) for step in cutter.get("pretokenizers", [cutter])]
    return described["normalizer"], steps, bool(described["model"].get("ignore_merges"))


def _step(step: dict[str, Any]) -> object:
    if step == {"type": "Digits", "individual_digits": True}:  # some files say "each digit apart" in these words
        step = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    return {key: value for key, value in step.items() if key != "trim_offsets"}  # which changes no id


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Score each piece by its first merge, so that the best come first; what is not merged scores below all."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends(described: dict[str, Any]) -> bool:
    steps = (described["normalizer"] or {}).get("normalizers", [])
    return any(step["type"] == "Prepend" for step in steps)


def _piece_kinds(tokens: list[str], kinds: list[int], special: SpecialTokens) -> list[int]:
    """Mark the tokens that spell a byte, and the unknown token, as SentencePiece does."""
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    marked = [BYTE if token in bytes_ else kind for token, kind in zip(tokens, kinds, strict=True)]
    return [UNKNOWN if token == special.unk else kind for token, kind in zip(tokens, marked, strict=True)]


def _check(described: dict[str, Any], metadata: dict[str, object]) -> None:
    """Read the metadata as a GGUF reader does: the rules and the merges must be those that were written."""
    again = json.loads(gguf_tokenizer(metadata).to_str())
    merges = [[list(merge) for merge in text["model"]["merges"]] for text in (described, again)]
    if merges[0] != merges[1] or _rules(described) != _rules(again):
        raise ValueError(
            "GGUF's scores and names cannot express this tokenizer's merges or the way it cuts text "
            f"({json.dumps([described['normalizer'], described['pre_tokenizer']])[:300]}); {_INSTEAD}"
        )
