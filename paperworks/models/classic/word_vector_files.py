"""Word vectors as text files, the format of the published word2vec program and of most vectors that are shared."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

# a size with more digits than this is no file's: without the bound a hostile header is a number of a megabyte
_HEADER = re.compile(rb"(\d{1,12}) (\d{1,6}) ?\r?\n?")


def write_word_vectors(path: str | Path, words: Sequence[str], vectors: Float[Tensor, "words dim"]) -> None:
    """Write a line `count dim`, then one `word number number ...` a word, in UTF-8.

    Nine digits a number: reading gives the same float32.

    Raises:
        ValueError: when words and rows are not equally many, a word is empty, twice there, or has a space or a line
            break in it, or a number is not finite. Nothing is written then.
    """
    if vectors.dim() != 2 or len(vectors) != len(words) or not vectors.numel():
        raise ValueError(f"{len(words)} words need a matrix of as many rows, at least one, got {tuple(vectors.shape)}")
    for word in words:
        if not word or any(sign in word for sign in " \n\r"):
            raise ValueError(
                f"the word {word!r} cannot be written: words are not empty and have no space or line break; "
                "join the parts of a phrase by an underscore"
            )
    _require_once(words, "")
    if not bool(vectors.isfinite().all()):
        row = int((~vectors.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"the vector of {words[row]!r} has numbers that are not finite")
    rows = vectors.detach().to("cpu", torch.float32).tolist()
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"{len(rows)} {len(rows[0])}\n")
        for word, row in zip(words, rows, strict=True):
            file.write(f"{word} {' '.join(f'{number:.9g}' for number in row)}\n")


def read_word_vectors(path: str | Path) -> tuple[tuple[str, ...], Float[Tensor, "words dim"]]:
    """The words of a file and their vectors, in the file's order, float32.

    Memory follows what is in the file, never what its header claims.

    Raises:
        ValueError: naming the line, when the header is no `count dim`, a line has more or fewer numbers, or what is no
            finite number, is not UTF-8, or a word is twice there; when there are more or fewer lines than announced.
    """
    path = Path(path)
    words: list[str] = []
    numbers = array("f")
    with path.open("rb") as file:
        first = file.readline(64)
        header = _HEADER.fullmatch(first)
        if header is None:
            raise ValueError(
                f"{path}, line 1: expected the numbers of words and dimensions, like b'3000 100', got {first[:40]!r}; "
                "a file without this line (GloVe's) needs it added"
            )
        count, dim = int(header[1]), int(header[2])
        if count < 1 or dim < 1:
            raise ValueError(f"{path}, line 1: {count} words of {dim} numbers are no word vectors")
        for number, line in enumerate(file, start=2):
            if len(words) == count:
                raise ValueError(f"{path} has more than the {count} words that its first line announces")
            words.append(_read_line(line, dim, numbers, f"{path}, line {number}"))
    if len(words) < count:
        raise ValueError(f"{path} ends after {len(words)} of {count} words: it is truncated; fetch it again")
    _require_once(words, f"{path}: ")
    vectors = torch.frombuffer(numbers, dtype=torch.float32).clone().view(count, dim)
    if not bool(vectors.isfinite().all()):
        row = int((~vectors.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{path}, line {row + 2}: the vector of {words[row]!r} has numbers that are not finite")
    return tuple(words), vectors


def _read_line(line: bytes, dim: int, numbers: array[float], place: str) -> str:
    """Add a line's numbers to those before and return its word."""
    try:
        # spaces alone part: other white space may be in a word, and the published program ends lines with a space
        word, *fields = line.decode("utf-8").rstrip(" \r\n").split(" ")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start}); is it a binary file?") from None
    if not word:
        raise ValueError(f"{place}: there is no word before the numbers")
    if len(fields) != dim:
        raise ValueError(f"{place}: {word!r} has {len(fields)} numbers, expected {dim}; is the file truncated?")
    try:
        numbers.extend(map(float, fields))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{place}: the vector of {word!r} has what is no number: {error}") from None
    return word


def _require_once(words: Sequence[str], place: str) -> None:
    word, times = Counter(words).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{place}the word {word!r} is there {times} times: each has one vector")
