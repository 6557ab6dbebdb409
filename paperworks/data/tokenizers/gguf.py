"""Tokenizers from GGUF metadata: byte-level BPE with its pre-tokenizer, and SentencePiece BPE with scores.

A GGUF file holds the vocabulary, but of the pre-tokenizer (how text is cut before merging) only a name; the rules
behind the names are those of the models' own published tokenizer files.
"""

from collections.abc import Mapping
from typing import TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from paperworks.core.errors import CorruptFile, unknown
from paperworks.data.tokenizers.files import SpecialTokens

_Element = TypeVar("_Element", str, int, float)

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # kinds of token: GGUF's tokenizer.ggml.token_type

# How each family cuts text into words before merging. Contractions, then words with at most one leading mark or space,
# then digits, then punctuation, then white space.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARK = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_MARK}{_UPPER}*{_LOWER}+|{_MARK}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_MARK}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_MARK}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (),  # ByteLevel's own rule
    "digits": (r"\p{N}",),  # single digits, then ByteLevel's own rule
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "tekken": (_TEKKEN,),
    "gpt4o": (_GPT4O,),
}
_RULES = {
    **dict.fromkeys(("gpt-2", "phi-2", "roberta-bpe", "mpt"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), "qwen2"),
    "tekken": "tekken",
    **dict.fromkeys(("gpt-4o", "llama4"), "gpt4o"),
}
# Published with normalization to composed characters (NFC) in front.
_COMPOSED = frozenset(("qwen2", "deepseek-r1-qwen", "mpt"))
# A word that is itself in the vocabulary is one token, whatever the merges would make of it; and a text begins with
# the bos token where the file does not say.
_WHOLE_WORDS = frozenset(("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"))
_BEGINS_BY_DEFAULT = _WHOLE_WORDS


def gguf_tokenizer(metadata: Mapping[str, object]) -> tokenizers.Tokenizer:
    """Build the tokenizer from `tokenizer.ggml.*`; see `Tokenizer.from_gguf`."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(metadata)
    elif kind == "llama":
        backend = _sentencepiece(metadata)
    else:
        raise ValueError(
            f"the GGUF file has a tokenizer of kind {kind!r}; known are 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE); give the model a tokenizer.json instead"
        )
    backend.add_special_tokens(_added(metadata, CONTROL))
    backend.add_tokens(_added(metadata, USER_DEFINED))
    special = gguf_special_tokens(metadata)
    if special.add_bos and special.bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special.bos}:0 $A:0", special_tokens=[(special.bos, backend.token_to_id(special.bos))]
        )
    return backend


def gguf_special_tokens(metadata: Mapping[str, object]) -> SpecialTokens:
    """Find the roles of special tokens in `tokenizer.ggml.*_token_id`."""
    tokens = _tokens(metadata)

    def token(role: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise CorruptFile(f"the {role} token id {index!r} is outside the vocabulary of {len(tokens)}")
        return tokens[index]

    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = metadata.get("tokenizer.ggml.model") == "llama" or _pre(metadata) in _BEGINS_BY_DEFAULT
    bos = token("bos")
    stops = tuple(name for name in (token("eot"), token("eom")) if name is not None)
    return SpecialTokens(
        bos=bos,
        eos=token("eos"),
        pad=token("padding"),
        unk=token("unknown"),
        stops=stops,
        add_bos=add_bos if bos is not None else False,
    )


def _pre(metadata: Mapping[str, object]) -> object:
    return metadata.get("tokenizer.ggml.pre")


def _list(metadata: Mapping[str, object], key: str, kind: type[_Element]) -> list[_Element]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise CorruptFile(
            f"the GGUF metadata tokenizer.ggml.{key} must be a list of {kind.__name__}, got {str(values)[:40]}"
        )
    return values


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    return _list(metadata, "tokens", str)


def _vocabulary(metadata: Mapping[str, object]) -> dict[str, int]:
    tokens = _tokens(metadata)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        index = next(index for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise CorruptFile(f"the vocabulary gives {tokens[index]!r} twice, as {index} and {vocabulary[tokens[index]]}")
    return vocabulary


def _added(metadata: Mapping[str, object], kind: int) -> list[AddedToken]:
    """Tokens matched whole in the text: control tokens, and those the model's makers defined."""
    if "tokenizer.ggml.token_type" not in metadata:
        return []
    tokens, kinds = _tokens(metadata), _list(metadata, "token_type", int)
    if len(tokens) != len(kinds):
        raise CorruptFile(f"the vocabulary has {len(tokens)} tokens but {len(kinds)} token types")
    special = kind == CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind and token
    ]


def _byte_level(metadata: Mapping[str, object]) -> tokenizers.Tokenizer:
    pre = _pre(metadata)
    if not isinstance(pre, str) or pre not in _RULES:
        raise ValueError(
            f"{unknown('pre-tokenizer', str(pre), _RULES)}. Without its rules the text would be cut wrongly; give the "
            "model a tokenizer.json instead"
        )
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _list(metadata, "merges", str))]
    try:
        model = models.BPE(
            vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre in _WHOLE_WORDS, fuse_unk=False
        )
    except Exception as error:  # the library raises plain Exception, as for a merge outside the vocabulary
        raise CorruptFile(f"the GGUF file's merges do not fit its vocabulary: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = _SPLITS[_RULES[pre]]
    own_rule = _RULES[pre] in ("gpt2", "digits")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_rule),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, object]) -> tokenizers.Tokenizer:
    vocabulary = _vocabulary(metadata)
    scores = _list(metadata, "scores", float)
    if len(scores) != len(vocabulary):
        raise CorruptFile(f"the vocabulary has {len(vocabulary)} tokens but {len(scores)} scores")
    unk = gguf_special_tokens(metadata).unk
    byte_fallback = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_from_scores(metadata, vocabulary, scores),
        unk_token=unk,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
    backend = tokenizers.Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_from_scores(
    metadata: Mapping[str, object], vocabulary: dict[str, int], scores: list[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joined piece scores best; list all such pairs, best first."""
    kinds = metadata.get("tokenizer.ggml.token_type")
    whole = (UNKNOWN, CONTROL, USER_DEFINED, UNUSED)
    pairs: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocabulary.items():
        if isinstance(kinds, list) and index < len(kinds) and kinds[index] in whole:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((-scores[index], index, cut, left, right))
    pairs.sort()
    return [(left, right) for *_, left, right in pairs]
