"""Text to token ids and back: one interface over the tokenizers library, from its own files, GGUF or plain text."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from paperworks.core.atomic import writing_file
from paperworks.data.tokenizers.files import SpecialTokens, config_for, read_backend, read_folder
from paperworks.data.tokenizers.gguf import gguf_special_tokens, gguf_tokenizer
from paperworks.data.tokenizers.gguf_writer import gguf_metadata

END_OF_TEXT = "<|endoftext|>"
_SURROGATES = re.compile("[\ud800-\udfff]")

# Tokens that end an answer in the published chat formats, beside a vocabulary's own end of sequence.
END_OF_TURN = (
    END_OF_TEXT,
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
)


class Tokenizer:
    """Text to ids and back.

    Attributes:
        bos, eos, pad: ids, or None where the vocabulary has no such token.
        stop_ids: ids at which an answer is over: eos and the end-of-turn tokens.
        chat_template: the jinja2 source that writes a conversation as text, or None.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special: SpecialTokens | None = None, *, chat_template: str | None = None
    ) -> None:
        special = special or SpecialTokens()
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.special = special
        self.chat_template = chat_template
        self.bos = self._id(special.bos)
        self.eos = self._id(special.eos)
        self.pad = self._id(special.pad)
        added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        ends = [self._id(token) for token in (*special.stops, *(token for token in END_OF_TURN if token in added))]
        self.stop_ids = tuple(dict.fromkeys(token for token in (self.eos, *ends) if token is not None))

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json; special tokens are recognised by their usual names.

        Raises:
            CorruptFile: not a tokenizer.json.
        """
        backend = read_backend(Path(path))
        return Tokenizer(backend, SpecialTokens.guessed(backend))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder in the Hugging Face layout: tokenizer.json, with its configuration and chat template if there.

        Raises:
            FileNotFoundError: no tokenizer.json there.
            CorruptFile: a file that is not what its name says.
        """
        backend, special, chat_template = read_folder(Path(folder))
        return Tokenizer(backend, special, chat_template=chat_template)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> "Tokenizer":
        """Build the tokenizer that a GGUF file's metadata describes.

        Raises:
            ValueError: a kind of vocabulary or a pre-tokenizer that is not known here; says which are.
            CorruptFile: a description that contradicts itself.
        """
        backend = gguf_tokenizer(metadata)
        template = metadata.get("tokenizer.chat_template")
        special = gguf_special_tokens(metadata)
        return Tokenizer(backend, special, chat_template=template if isinstance(template, str) else None)

    def gguf_metadata(self) -> dict[str, object]:
        """Describe this tokenizer as a GGUF file's metadata does; `from_gguf` reads it back with the same ids.

        Raises:
            ValueError: a kind of vocabulary, or rules for cutting text, that GGUF has no name for.
        """
        return gguf_metadata(self.backend, self.special, self.chat_template)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, bos: bool | None = None, special: bool = True) -> list[int]:
        """Turn text into ids.

        Args:
            text: any text; what the vocabulary cannot spell becomes its unknown token.
            bos: begin with the beginning-of-sequence token; None does what the model was trained with.
            special: read special tokens written in the text, such as "<|im_start|>", as themselves; False spells them
                out like any other text, which is what text from a stranger wants.
        """
        if not isinstance(text, str):
            raise TypeError(f"text to encode must be a str, got {type(text).__name__}")
        if not text.isascii() and _SURROGATES.search(text):
            raise ValueError(
                "the text holds lone surrogates, which are no characters; decode its bytes with errors=..."
            )
        backend = self.backend if special else self._literal
        if bos is None:
            bos = self.special.add_bos
        if bos is None:
            return backend.encode(text).ids
        ids = backend.encode(text, add_special_tokens=False).ids
        if not bos:
            return ids
        if self.bos is None:
            raise ValueError("this vocabulary has no beginning-of-sequence token; call encode with bos=False")
        return [self.bos, *ids]

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy of the backend that sees no special tokens in the text."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary are an error."""
        ids = [int(token) for token in ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"the id {wrong} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> "TextStream":
        """Start turning ids into text one by one, never giving out half a character."""
        return TextStream(lambda ids: self.backend.decode(ids, skip_special_tokens=skip_special))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder, as transformers reads them."""
        config = config_for(self.special, self.chat_template)
        for name, content in (
            ("tokenizer.json", self.backend.to_str()),
            ("tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"),
        ):
            with writing_file(Path(folder) / name) as place:
                place.write_text(content, encoding="utf-8")


class TextStream:
    """Text as it comes: `push` an id and get what has become certain, `finish` for the rest.

    Decoding a window that begins with the last piece given out keeps what depends on the neighbour before (a space, a
    character spread over several tokens) as it is in the whole text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0  # how many of the window's ids have been given out as text

    def push(self, token: int) -> str:
        """Take one more id; return the text it completes, possibly none."""
        self._ids.append(int(token))
        before, now = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return now[len(before) :]

    def finish(self) -> str:
        """Remaining text: the replacement characters of bytes that never became a character."""
        before, now = self._decode(self._ids[: self._given]), self._decode(self._ids)
        self._ids, self._given = [], 0
        return now[len(before) :]


class ByteTokenizer(Tokenizer):
    """Every byte of the text's UTF-8 is its own id: 256 ids, any text, nothing to train."""

    def __init__(self) -> None:
        vocabulary = {_byte_symbol(byte): byte for byte in range(256)}
        super().__init__(_byte_level(models.BPE(vocab=vocabulary, merges=[]), split=False))


class CharTokenizer(Tokenizer):
    """Every distinct character of `text` is an id, in code point order; other characters are refused."""

    def __init__(self, text: str) -> None:
        characters = sorted(set(text))
        if not characters:
            raise ValueError("a character vocabulary needs a text with at least one character")
        vocabulary = {character: index for index, character in enumerate(characters)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.decoder = decoders.Fuse()
        super().__init__(backend)
        self._characters = frozenset(characters)

    def encode(self, text: str, bos: bool | None = None, special: bool = True) -> list[int]:
        """Turn text into ids; raises ValueError that names characters the vocabulary lacks."""
        strange = sorted(set(text) - self._characters)
        if strange:
            shown = ", ".join(map(repr, strange[:8]))
            raise ValueError(f"characters outside the vocabulary of {len(self._characters)}: {shown}")
        return super().encode(text, bos, special)


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: tuple[str, ...] = (END_OF_TEXT,), min_frequency: int = 2
) -> Tokenizer:
    """Train a byte-level BPE vocabulary as GPT-2's (Sennrich et al. 2016; Radford et al. 2019).

    The first special token is the end of sequence. Fewer merges than asked for are learned when the texts run out.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least} (256 bytes and {len(special_tokens)} special), got {vocab_size}"
        )
    backend = _byte_level(models.BPE(), split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, SpecialTokens(eos=special_tokens[0] if special_tokens else None))


def _byte_level(model: models.BPE, *, split: bool) -> tokenizers.Tokenizer:
    """Wrap a BPE model in the mapping of bytes to printable symbols; `split` cuts into words first, as GPT-2 does."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_symbol(byte: int) -> str:
    """The printable character GPT-2's vocabulary spells a byte with: itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    others = [other for other in range(256) if other not in printable]
    return chr(0x100 + others.index(byte))
