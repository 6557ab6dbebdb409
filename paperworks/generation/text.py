"""From text to text: prompts in, continuations out, stop strings, pieces as they come."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.generation.beam import beam_search
from paperworks.generation.decoding import decode
from paperworks.generation.sampling import Sampling

Stream = Callable[[str], object]


def generate(
    model: nn.Module,
    prompts: str | Sequence[str] | Tensor,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    beams: int = 1,
    length_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    pad: int = 0,
    stream: Stream | None = None,
) -> Any:
    """Continue each prompt and return what was added (without the prompt).

    Args:
        model: a model of ours, with its tokenizer when prompts are text.
        prompts: a text, a list of texts (of unequal length if need be), or int64 tokens (batch, time).
        max_new_tokens: the most tokens a prompt gets.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; temperature 0 is greedy.
        beams: above 1, beam search instead of sampling, with `length_penalty` (see `beam_search`).
        seed: for reproducible draws.
        stop: the text ends before the first of these strings.
        stop_tokens: the text ends before one of these; None takes the tokenizer's (end of text, end of turn).
        pad: fills up tensor rows that ended early.
        stream: called with each piece of text as it comes (one prompt only).

    Returns:
        A text for a text, a list for a list, an int64 tensor (batch, new tokens) for tokens.

    Raises:
        ValueError: for an empty prompt, a missing tokenizer, or settings that do not fit together.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    tokenizer: Any = getattr(model, "tokenizer", None)
    stops = list(stop_tokens) if stop_tokens is not None else list(tokenizer.stop_ids) if tokenizer else []
    strings = [stop] if isinstance(stop, str) else list(stop)
    if isinstance(prompts, Tensor):
        if strings or stream is not None:
            raise ValueError("stop strings and stream need text prompts; tokens give tokens")
        return _tokens(model, prompts, max_new_tokens, sampling, stops, seed, pad, beams, length_penalty)
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so it cannot read text: pass tokens (batch, time), or set model.tokenizer"
        )
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if stream is not None and (len(texts) != 1 or beams > 1):
        raise ValueError(f"stream follows one prompt without beam search, got {len(texts)} prompts and {beams} beams")
    encoded = [tokenizer.encode(text) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(f"prompt {text!r} encodes to no token; give it at least one character")
    if beams > 1:
        rows = _tokens(model, encoded, max_new_tokens, sampling, stops, seed, -1, beams, length_penalty)
        written = [_cut(tokenizer.decode([i for i in row.tolist() if i >= 0]), strings) for row in rows]
        return written[0] if isinstance(prompts, str) else written
    writers = [_Writer(tokenizer, strings, stream) for _ in texts]
    steps = decode(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stops,
        seed=seed,
        finished=lambda rows: [writer.read(row) for writer, row in zip(writers, rows, strict=True)],
    )
    for _ in steps:
        pass
    written = [writer.finish() for writer in writers]
    return written[0] if isinstance(prompts, str) else written


def _tokens(
    model: nn.Module,
    prompts: Any,
    most: int,
    sampling: Sampling,
    stops: Sequence[int],
    seed: int | None,
    pad: int,
    beams: int,
    length_penalty: float,
) -> Tensor:
    if beams > 1:
        if sampling != Sampling(temperature=sampling.temperature):
            raise ValueError("beam search takes the likeliest sequence: leave top_k, top_p, min_p and the penalty out")
        return beam_search(
            model, prompts, beams=beams, max_new_tokens=most, length_penalty=length_penalty, stop_tokens=stops, pad=pad
        )
    steps = list(decode(model, prompts, max_new_tokens=most, sampling=sampling, stop_tokens=stops, seed=seed))
    if not steps:
        return torch.empty(len(prompts), 0, dtype=torch.int64)
    rows = torch.stack(steps, 1)
    return torch.where(rows < 0, pad, rows)


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


class _Writer:
    """The text of one row as it grows; holds back what may yet turn out to be the start of a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], stream: Stream | None) -> None:
        self._pieces: Any = tokenizer.stream()
        self._stops, self._stream = [stop for stop in stops if stop], stream
        self._text, self._sent, self._read, self._ended = "", 0, 0, False

    def read(self, tokens: list[int]) -> bool:
        """Take in the row's new tokens; return whether a stop string ended it."""
        while self._read < len(tokens) and not self._ended:
            self._text += self._pieces.push(tokens[self._read])
            self._read += 1
            cut = _cut(self._text, self._stops)
            self._ended, self._text = cut != self._text or any(s in self._text for s in self._stops), cut
        self._send(len(self._text) if self._ended else len(self._text) - self._held())
        return self._ended

    def finish(self) -> str:
        """The whole text."""
        if not self._ended:
            self._text = _cut(self._text + self._pieces.finish(), self._stops)
        self._send(len(self._text))
        return self._text

    def _held(self) -> int:
        return max((size for size in self._prefixes()), default=0)

    def _prefixes(self) -> Iterator[int]:
        for stop in self._stops:
            for size in range(1, len(stop)):
                if self._text.endswith(stop[:size]):
                    yield size

    def _send(self, end: int) -> None:
        if self._stream is not None and end > self._sent:
            self._stream(self._text[self._sent : end])
            self._sent = end
