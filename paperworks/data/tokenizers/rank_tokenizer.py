"""A tokenizer that is a table of ranks, in the manner and file format of tiktoken (OpenAI 2022)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import pre_tokenizers

from paperworks.core.atomic import writing_file
from paperworks.core.errors import CorruptFile
from paperworks.data.tokenizers.byte_pairs import merge
from paperworks.data.tokenizers.tokenizer import TextStream

_SPACES = r"\s+(?!\S)|\s+"
# How text is cut into pieces before merging: the published patterns.
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
)
PATTERNS = {"gpt2": GPT2, "cl100k": CL100K}

_SURROGATES = re.compile("[\ud800-\udfff]")
_KEPT = 1 << 14  # pieces whose ids are remembered; a text repeats few words most of the time
_SHORT = 64  # bytes of a piece worth remembering


class RankTokenizer:
    """Text to ids and back, ids being ranks.

    A text is cut by a pattern; a piece that is a token is its rank; in any other the adjacent pair whose joined bytes
    have the lowest rank is joined first. Special tokens are never made of merges: text that contains one is refused
    unless it is said what it means.

    Attributes:
        ranks: bytes to rank; every single byte has one.
        special_tokens: text to id.
        bos, eos, pad: ids by role, as other tokenizers have them; eos is "<|endoftext|>" where there is one.
    """

    def __init__(
        self, ranks: Mapping[bytes, int], *, pattern: str = "gpt2", special_tokens: Mapping[str, int] | None = None
    ) -> None:
        """`pattern`: a name of `PATTERNS`, or a regular expression as tokenizers.Regex reads it.

        Raises ValueError for ranks that leave a byte out or are given twice, or special tokens that collide with them.
        """
        self.ranks = dict(ranks)
        self.special_tokens = dict(special_tokens or {})
        _require_whole(self.ranks, self.special_tokens)
        self.pattern = PATTERNS.get(pattern, pattern)
        try:
            self._split = pre_tokenizers.Split(tokenizers.Regex(self.pattern), behavior="isolated")
        except Exception as error:  # the library raises plain Exception for whatever its parser finds
            raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
        self._tokens = {rank: token for token, rank in self.ranks.items()}
        self._texts = {index: text for text, index in self.special_tokens.items()}
        self._ids = lru_cache(_KEPT)(self._merged)
        self.bos = self.pad = None
        self.eos = self.special_tokens.get("<|endoftext|>")
        self.stop_ids = () if self.eos is None else (self.eos,)
        self.chat_template: str | None = None

    @classmethod
    def from_file(
        cls, path: str | Path, *, pattern: str = "gpt2", special_tokens: Mapping[str, int] | None = None
    ) -> RankTokenizer:
        """Read a rank file: a line a token, base64 of its bytes, a space, its rank.

        Raises:
            FileNotFoundError: no such file.
            CorruptFile: a line that is not such a line, a token or rank given twice, a byte without a rank.
        """
        ranks = read_ranks(Path(path))
        try:
            return cls(ranks, pattern=pattern, special_tokens=special_tokens)
        except ValueError as error:
            raise CorruptFile(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the rank file; the pattern and special tokens are not in it, as in the published format."""
        with writing_file(path) as place:
            lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in sorted(self._tokens.items())]
            place.write_bytes(b"".join(lines))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max((*self._tokens, *self._texts)) + 1

    def encode(
        self,
        text: str,
        bos: bool | None = None,
        special: bool = True,
        *,
        allowed: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Turn text into ids.

        Args:
            text: any text.
            bos: must not be True: these vocabularies have no such token.
            special: False spells special tokens out like any other text, which is what text from a stranger wants.
            allowed: special tokens that are read as themselves, or "all".

        Raises:
            ValueError: for text that contains a special token which is not allowed, when `special` is True.
        """
        if not isinstance(text, str):
            raise TypeError(f"text to encode must be a str, got {type(text).__name__}")
        if not text.isascii() and _SURROGATES.search(text):
            raise ValueError(
                "the text holds lone surrogates, which are no characters; decode its bytes with errors=..."
            )
        if bos:
            raise ValueError("this vocabulary has no beginning-of-sequence token; call encode with bos=False")
        if not special or not self.special_tokens:
            return self.encode_ordinary(text)
        known = set(self.special_tokens) if allowed == "all" else set(allowed)
        if strange := known - set(self.special_tokens):
            raise ValueError(f"allowed names no special token: {', '.join(sorted(map(repr, strange)))}")
        refused = set(self.special_tokens) - known
        found = _any_of(refused).search(text) if refused else None
        if found is not None:
            raise ValueError(
                f"the text contains the special token {found.group()!r}: pass allowed={{{found.group()!r}}} to read it "
                "as itself, or special=False to spell it out"
            )
        if not known:
            return self.encode_ordinary(text)
        ids, start = [], 0
        for match in _any_of(known).finditer(text):
            ids += [*self.encode_ordinary(text[start : match.start()]), self.special_tokens[match.group()]]
            start = match.end()
        return ids + self.encode_ordinary(text[start:])

    def encode_ordinary(self, text: str) -> list[int]:
        """Turn text into ids, special tokens spelled out like the rest."""
        ids: list[int] = []
        for piece in self.pieces(text):
            written = piece.encode()
            ids += self._ids(written) if len(written) <= _SHORT else self._merged(written)
        return ids

    def pieces(self, text: str) -> Iterator[str]:
        """Cut a text as the pattern says; the pieces joined are the text."""
        for piece, _ in self._split.pre_tokenize_str(text):
            yield piece

    def _merged(self, piece: bytes) -> tuple[int, ...]:
        rank = self.ranks.get(piece)
        return (rank,) if rank is not None else tuple(self.ranks[part] for part in merge(piece, self.ranks))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD. Unknown ids are an error."""
        return b"".join(self._bytes(int(token), skip_special) for token in ids).decode("utf-8", errors="replace")

    def stream(self, skip_special: bool = True) -> TextStream:
        """Start turning ids into text one by one, never giving out half a character."""
        return TextStream(lambda ids: self.decode(ids, skip_special))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, special tokens as their text: nothing is lost."""
        return b"".join(self._bytes(int(token), False) for token in ids)

    def _bytes(self, token: int, skip_special: bool) -> bytes:
        if token in self._tokens:
            return self._tokens[token]
        if token in self._texts:
            return b"" if skip_special else self._texts[token].encode()
        raise ValueError(f"the id {token} is outside the vocabulary: no token and no special token has it")


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a rank file; see `RankTokenizer.from_file`. Nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no rank file {path}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        parts = line.split(b" ")
        if len(parts) != 2 or not parts[1].isdigit():
            raise CorruptFile(f"{path}, line {number}: not base64, a space and a rank: {line[:40]!r}")
        try:
            token = base64.b64decode(parts[0], validate=True)
        except binascii.Error as error:
            raise CorruptFile(f"{path}, line {number}: {parts[0][:40]!r} is not base64 ({error})") from error
        if token in ranks:
            raise CorruptFile(f"{path}, line {number}: the token {token[:40]!r} has the rank {ranks[token]} already")
        if len(parts[1]) > 9:  # more digits than any vocabulary needs
            raise CorruptFile(f"{path}, line {number}: the rank {parts[1][:40]!r} is too large")
        ranks[token] = int(parts[1])
    return ranks


def _require_whole(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{len(missing)} of the 256 single bytes have no rank, the first is {bytes(missing[:1])!r}: "
            "text with them could not be written"
        )
    if b"" in ranks:
        raise ValueError("the empty token has a rank: no text is made of nothing")
    seen: dict[int, bytes] = {}
    for token, rank in ranks.items():
        if rank < 0 or rank in seen:
            other = f"also {seen[rank]!r}'s" if rank in seen else "negative"
            raise ValueError(f"the rank {rank} of {token!r} is {other}: ranks are ids, all different, from 0")
        seen[rank] = token
    for text, index in special.items():
        if not text or index < 0 or index in seen:
            raise ValueError(f"the special token {text!r} needs a text and an id of its own, {index} is not free")
        seen[index] = text.encode()
    # a special token may stand between (p50k's end of text does); counting finds a gap before a range that a hostile
    # rank makes endless is looked through
    gap = next((rank for rank in range(len(seen)) if rank not in seen and rank <= max(ranks.values())), None)
    if gap is not None:
        raise ValueError(f"the rank {gap} belongs to no token and to no special token: ranks are ids without a gap")


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
