"""A text to train on: from a file, a data set's name, or the hub, with a tokenizer that fits it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks.core.errors import AssetUnavailable
from paperworks.data.text import texts
from paperworks.data.tokenizers.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe

_SHOWN = 40  # characters of a malformed line that a message quotes


@dataclass(frozen=True)
class Corpus:
    """Documents, in order, and where they came from."""

    documents: list[str]
    origin: str

    @property
    def characters(self) -> int:
        """How many there are."""
        return sum(map(len, self.documents))

    def cut(self, validation: float) -> tuple[Corpus, Corpus]:
        """Hold out the last share: of the documents, or of the characters where there is one document."""
        if not 0 < validation < 1:
            raise ValueError(f"validation is the share to hold out, between 0 and 1, got {validation}")
        if len(self.documents) == 1:
            first, last = texts.split(self.documents[0], validation)
            return Corpus([first], self.origin), Corpus([last], self.origin)
        kept = min(len(self.documents) - 1, max(1, round(len(self.documents) * (1 - validation))))
        return Corpus(self.documents[:kept], self.origin), Corpus(self.documents[kept:], self.origin)

    def encode(self, tokenizer: Tokenizer) -> Int[Tensor, " tokens"]:
        """All documents as one row of ids, an end-of-text token after each where the tokenizer has one."""
        row: list[int] = []
        for document in self.documents:
            row += tokenizer.encode(document, special=False)
            if len(self.documents) > 1 and tokenizer.eos is not None:
                row.append(tokenizer.eos)
        return torch.tensor(row, dtype=torch.int64)


def read_corpus(source: str, *, column: str = "text") -> Corpus:
    """Read documents.

    Args:
        source: a text file (one document), a .jsonl file (one document a line, under `column`), the name of a data
            set (see `text.names`), or "org/name" of a hub data set (its "train" split; needs the `hub` extra).
        column: where a record keeps its text.

    Raises:
        ValueError: for an empty file, one that is no text, or records without the column; says which line.
        FileNotFoundError: no such file, and no data set of that name.
        AssetUnavailable: a data set that cannot be had here.
    """
    path = Path(source).expanduser()
    if path.is_file():
        content = _decoded(path)
        corpus = Corpus(_records(content, column, path) if path.suffix == ".jsonl" else [content], str(path))
    elif source in texts.names():
        found = texts.load_text(source, download=True)
        corpus = Corpus([found.text], found.origin)
    elif source.count("/") == 1 and not path.suffix and not source.startswith((".", "/", "~")):
        corpus = Corpus(_hub(source, column), f"{source} on the hub")
    else:
        raise FileNotFoundError(f"no file at {path}, and no data set of that name; known: {', '.join(texts.names())}")
    if not any(document.strip() for document in corpus.documents):
        raise ValueError(f"{source} holds no text: there is nothing to learn from")
    return corpus


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 (byte {error.start}): give a text file") from error
    if "\0" in text:
        raise ValueError(f"{path} holds NUL characters, so it is a binary file: give a text file")
    return text


def _records(content: str, column: str, path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({line[:_SHOWN]!r}...): {error}") from error
        text = record.get(column) if isinstance(record, dict) else record
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{path}, line {number}: no text under {column!r}; it has: {keys}")
        documents.append(text)
    return documents


def _hub(name: str, column: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise AssetUnavailable(
            f"{name} is a data set of the hub, which needs the extra: pip install 'paperworks[hub]'"
        ) from error
    rows = datasets.load_dataset(name, split="train")
    if column not in rows.column_names:
        raise ValueError(f"{name} has no column {column!r}; it has: {', '.join(rows.column_names)}")
    return [str(text) for text in rows[column]]


def fitting_tokenizer(kind: str, corpus: Corpus, *, vocab_size: int = 4096) -> Tokenizer:
    """A tokenizer for a corpus.

    Args:
        kind: "bytes" (256 ids), "chars" (those of the corpus), "bpe" (trained on it, `vocab_size` ids at most), or a
            folder or tokenizer.json to read.
        corpus: what it must be able to spell.
        vocab_size: for "bpe".

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer("".join(corpus.documents))
    if kind == "bpe":
        return train_bpe(corpus.documents, vocab_size)
    path = Path(kind).expanduser()
    if path.is_dir():
        return Tokenizer.from_folder(path)
    if path.is_file():
        return Tokenizer.from_file(path)
    raise ValueError(f"unknown tokenizer {kind!r}: bytes, chars, bpe, or a folder or file that holds tokenizer.json")


def document_segments(tokens: Int[Tensor, "batch time"], end: int) -> Int[Tensor, "batch time"]:
    """Which document each token of a packed row belongs to, from 1; a document ends with the token `end`."""
    ends = (tokens == end).long()
    return 1 + ends.cumsum(1) - ends


class Separated:
    """Batches whose rows hold several documents, with the segments that keep them from seeing each other."""

    def __init__(self, batches: Iterable[dict[str, Tensor]], end: int) -> None:
        self.batches, self.end = batches, end

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Hand on which passage comes next."""
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield batch | {"segments": document_segments(batch["tokens"], self.end)}
