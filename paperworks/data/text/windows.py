"""Windows of one long text as batches: drawn at random to train on, cut in order to be scored on."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks.data.text.texts import load_text, split
from paperworks.data.tokenizers.tokenizer import CharTokenizer

Batch = dict[str, Tensor]  # "tokens" and "targets", int64 (batch, time): the target is the token after each token


class RandomWindows:
    """`count` batches of windows that begin anywhere in `tokens`; the next epoch draws others.

    Which windows depends on the seed, the epoch and the number of the batch only, so a run that is resumed sees the
    batches it would have seen.
    """

    def __init__(self, tokens: Int[Tensor, " text"], *, length: int, batch: int, count: int, seed: int = 0) -> None:
        _check(tokens, length)
        for name, value in (("batch", batch), ("count", count)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tokens, self.length, self.batch, self.count, self.seed = tokens, length, batch, count, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Say which passage through the batches comes next; `train.fit` does."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)  # a prime keeps pairs apart
        for _ in range(self.count):
            starts = torch.randint(len(self.tokens) - self.length, (self.batch,), generator=generator)
            yield _windows(self.tokens, starts, self.length)


def ordered_windows(
    tokens: Int[Tensor, " text"], *, length: int, batch: int = 32, count: int | None = None
) -> list[Batch]:
    """Cut a text into windows side by side, each token but the first a target once; `count` takes them evenly spread.

    Raises ValueError when the text is too short for one window, or for `count` of them.
    """
    _check(tokens, length)
    starts = torch.arange(0, len(tokens) - length, length)
    if count is not None:
        if not 1 <= count <= len(starts):
            raise ValueError(f"count must be between 1 and the {len(starts)} windows that the text holds, got {count}")
        starts = starts[torch.arange(count) * len(starts) // count]
    return [_windows(tokens, some, length) for some in starts.split(batch)]


def _windows(tokens: Tensor, starts: Tensor, length: int) -> Batch:
    seen = tokens[starts[:, None] + torch.arange(length + 1)]
    return {"tokens": seen[:, :-1], "targets": seen[:, 1:]}


def _check(tokens: Tensor, length: int) -> None:
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise ValueError(f"tokens must be one text of integer ids, got {tokens.dtype} {tuple(tokens.shape)}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if len(tokens) <= length:
        raise ValueError(
            f"a window of {length} tokens and the one after it do not fit in a text of {len(tokens)}; "
            "take a shorter length or a longer text"
        )


@dataclass(frozen=True)
class CharacterText:
    """A text as characters, the end of it held out by position.

    Attributes:
        tokenizer: its characters, those of the held out part included.
        training, validation: int64 ids.
    """

    tokenizer: CharTokenizer
    training: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]

    @classmethod
    def of(cls, text: str, validation: float = 0.1) -> "CharacterText":
        """Split a text; the last `validation` of it is held out."""
        tokenizer = CharTokenizer(text)
        first, last = (torch.tensor(tokenizer.encode(part)) for part in split(text, validation))
        return cls(tokenizer, first, last)

    @classmethod
    def load(cls, name: str = "tinyshakespeare", validation: float = 0.1, *, download: bool = False) -> "CharacterText":
        """Split a public text by name. Raises AssetUnavailable when it cannot be had; see `text.load_text`."""
        return cls.of(load_text(name, download=download).text, validation)

    def train_windows(self, *, length: int, batch: int, count: int, seed: int = 0) -> RandomWindows:
        """Batches of the training part."""
        return RandomWindows(self.training, length=length, batch=batch, count=count, seed=seed)

    def held_out_windows(self, *, length: int, batch: int = 32, count: int | None = None) -> list[Batch]:
        """Batches of the validation part, the same ones every time."""
        return ordered_windows(self.validation, length=length, batch=batch, count=count)
