"""Explaining latents with a chat model, and scoring explanations: detection and fuzzing (Paulo et al. 2024).

"Automatically Interpreting Millions of Features in Large Language Models", arXiv:2410.13928.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.sae.evaluation.dashboard import AROUND, Excerpt
from paperworks.interpret.taps import record

Decode = Callable[[int], str]  # the text of one token, its spaces included

OPEN, CLOSE = "<<", ">>"
ABOVE = 0.3  # of an excerpt's largest activation: what a latent does less than this is not marked
AT_ONCE = 5  # examples a question, as in the paper

EXPLAIN = (
    "You study one neuron of a language model. Below are passages in which it responds; what it responds to stands "
    f"between {OPEN} and {CLOSE}. Say in one short sentence what these have in common: the words, their meaning, or "
    "what stands around them. Answer with that sentence only."
)
DETECT = (
    "A neuron of a language model is said to respond to what the explanation describes. For each numbered passage, say "
    "whether it holds something that the neuron would respond to. Answer with a list of as many numbers as there are "
    "passages, 1 for yes and 0 for no, such as [1, 0, 0, 1, 0], and nothing else."
)
FUZZ = (
    "A neuron of a language model is said to respond to what the explanation describes. In each numbered passage some "
    f"words stand between {OPEN} and {CLOSE}. Say whether the neuron would respond to exactly these. Answer with a "
    "list of as many numbers as there are passages, 1 for yes and 0 for no, such as [1, 0, 0, 1, 0], and nothing else."
)


class ChatModel(Protocol):
    """Anything that answers a conversation: a model of ours, a service, or a script."""

    def complete(
        self, messages: Sequence[Mapping[str, str]], n: int = 1, *, temperature: float = 0.0, max_tokens: int = 128
    ) -> list[str]:
        """n answers to messages of "role" and "content"."""
        ...


@dataclass(frozen=True)
class Score:
    """A judge's answers about the examples of one latent; None where an answer could not be read.

    right: for examples that the explanation should fit (in the order they were given), whether the judge said yes.
    wrong: likewise for those that it should not fit.
    """

    right: tuple[bool | None, ...]
    wrong: tuple[bool | None, ...]

    @property
    def sensitivity(self) -> float:
        """The share of fitting examples that were accepted."""
        return _share(self.right, True)

    @property
    def specificity(self) -> float:
        """The share of other examples that were turned down."""
        return _share(self.wrong, False)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of both: 0.5 for a judge that always says the same, or that knows nothing."""
        return (self.sensitivity + self.specificity) / 2

    @property
    def unread(self) -> float:
        """The share of answers that could not be read; they count neither way."""
        return (*self.right, *self.wrong).count(None) / (len(self.right) + len(self.wrong))


def _share(answers: Sequence[bool | None], wanted: bool) -> float:
    read = [answer for answer in answers if answer is not None]
    if not read:
        raise ValueError(f"none of the judge's {len(answers)} answers of one class could be read: there is no score")
    return sum(answer is wanted for answer in read) / len(read)


def explain(
    chat: ChatModel,
    excerpts: Sequence[Excerpt],
    decode: Decode,
    *,
    promoted: Sequence[int] = (),
    above: float = ABOVE,
    temperature: float = 0.0,
    max_tokens: int = 100,
) -> str:
    """A chat model's explanation of a latent.

    Args:
        chat: the explainer.
        excerpts: passages where the latent is on, as in `FeatureView.excerpts`; neighbouring marked tokens share a pair
            of marks.
        decode: the text of one token, as in `lambda token: tokenizer.decode([token])`.
        promoted: tokens whose logits the latent raises most, to be shown as well.
        above: marks tokens whose activation exceeds this share of the excerpt's largest.
        temperature, max_tokens: of the answer.

    Raises ValueError when there are no excerpts, or nothing is answered.
    """
    if not excerpts:
        raise ValueError("there are no excerpts: an explanation needs passages where the latent is on")
    lines = [f"{n}. {_text(each, decode, _marked(each, above))}" for n, each in enumerate(excerpts, 1)]
    if promoted:
        lines.append("It makes these tokens more likely: " + ", ".join(repr(decode(token)) for token in promoted))
    answers = chat.complete(_messages(EXPLAIN, "\n".join(lines)), 1, temperature=temperature, max_tokens=max_tokens)
    if not answers or not answers[0].strip():
        raise ValueError(f"the explainer answered {answers!r}; one sentence was asked for")
    return answers[0].strip()


def detection(
    chat: ChatModel,
    explanation: str,
    excerpts: Sequence[Excerpt],
    silent: Sequence[Excerpt],
    decode: Decode,
    *,
    at_once: int = AT_ONCE,
    seed: int = 0,
) -> Score:
    """Score an explanation by whether a judge tells with it in which passages a latent is on; nothing is marked.

    Args:
        chat: the judge.
        explanation: of the latent.
        excerpts: passages where it is on, and which the explainer has not seen: see `hold_out`.
        silent: passages where it is on nowhere: see `silent_excerpts`. They should be as long as the others, for a
            longer one holds more words of any kind.
        decode: the text of one token.
        at_once: passages a question.
        seed: of the order in which they are asked about.

    Raises ValueError when a side is empty, or a passage is on the wrong one.
    """
    _check(excerpts, silent)
    for each in excerpts:
        if not max(each.activations) > 0:
            raise ValueError(f"the latent is off everywhere in a passage said to activate it: {_text(each, decode)!r}")
    for each in silent:
        if max(each.activations) > 0:
            raise ValueError(f"the latent is on in a passage said to be silent: {_text(each, decode)!r}")
    texts = [_text(each, decode) for each in (*excerpts, *silent)]
    return _judged(chat, DETECT, explanation, texts, len(excerpts), at_once, seed)


def fuzzing(
    chat: ChatModel,
    explanation: str,
    excerpts: Sequence[Excerpt],
    decode: Decode,
    *,
    above: float = ABOVE,
    at_once: int = AT_ONCE,
    seed: int = 0,
) -> Score:
    """Score an explanation by whether a judge tells with it which tokens a latent is on at.

    Every second passage has the wrong tokens marked: as many, of those where the latent is off. A passage with too few
    of these is marked rightly.

    Args: see `detection`; `excerpts` from the strongest to the weakest, so that both halves have all strengths.

    Raises ValueError when no passage can be marked rightly, or none wrongly.
    """
    draws = random.Random(seed)
    right, wrong = [], []
    for number, each in enumerate(excerpts):
        marked = _marked(each, above)
        off = [place for place, activation in enumerate(each.activations) if activation <= 0]
        if number % 2 and len(off) >= len(marked):
            wrong.append(_text(each, decode, set(draws.sample(off, len(marked)))))
        else:
            right.append(_text(each, decode, marked))
    _check(right, wrong)
    return _judged(chat, FUZZ, explanation, [*right, *wrong], len(right), at_once, seed)


def hold_out(excerpts: Sequence[Excerpt], shown: int) -> tuple[list[Excerpt], list[Excerpt]]:
    """Passages for the explainer, and all others for the judge: both over all strengths.

    excerpts: sorted by strength, of different sequences, as in `FeatureView.excerpts`.
    shown: how many the explainer sees, evenly spaced from the strongest on.

    Raises ValueError when nothing would be left for one of them.
    """
    if not 1 <= shown < len(excerpts):
        raise ValueError(f"{shown} of {len(excerpts)} passages cannot be shown: each side needs one or more")
    chosen = {index * len(excerpts) // shown for index in range(shown)}
    return (
        [each for place, each in enumerate(excerpts) if place in chosen],
        [each for place, each in enumerate(excerpts) if place not in chosen],
    )


@torch.no_grad()
def silent_excerpts(
    model: nn.Module,
    tap: str,
    sae: SparseAutoencoder,
    batches: Iterable[Int[Tensor, "batch time"]],
    features: Sequence[int],
    *,
    count: int = 12,
    leave_out_first: int = 1,
    seed: int = 0,
) -> list[list[Excerpt]]:
    """For each latent up to `count` random passages, as long as those of `feature_views`, where it is off.

    At most one of a sequence, and none with its first positions: what a latent does there does not count in
    `feature_views`, so they cannot be called silent. A latent that is on almost everywhere may have fewer, or none.

    Raises ValueError for latents that do not exist, and sequences that are too short.
    """
    wrong = [latent for latent in features if not 0 <= latent < sae.latents]
    if wrong:
        raise ValueError(f"there are no latents {wrong}: the dictionary has 0 to {sae.latents - 1}")
    draws = torch.Generator().manual_seed(seed)
    found: list[list[tuple[float, Excerpt]]] = [[] for _ in features]
    for batch in batches:
        with record(model, tap) as seen:
            model(batch)
        on = sae.strength(sae.encode(next(iter(seen.values()))))[..., list(features)].cpu() > 0
        width = min(2 * AROUND + 1, batch.shape[1] - leave_out_first)
        if width < 1:
            raise ValueError(f"sequences of {batch.shape[1]} tokens have none after the first {leave_out_first}")
        quiet = ~on[:, leave_out_first:].unfold(1, width, 1).any(dim=-1)  # (batch, start, chosen)
        for place in range(len(features)):
            for row in range(len(batch)):
                starts = quiet[row, :, place].nonzero().flatten()
                if not len(starts):
                    continue
                start = leave_out_first + int(starts[torch.randint(len(starts), (1,), generator=draws)])
                tokens = tuple(batch[row, start : start + width].tolist())
                # Of all sequences' passages those with the smallest draws are kept, so that each has the same chance.
                key = float(torch.rand((), generator=draws))
                found[place].append((key, Excerpt(tokens, (0.0,) * width, width // 2)))
            found[place] = sorted(found[place], key=lambda pair: pair[0])[:count]
    return [[excerpt for _, excerpt in each] for each in found]


def _check(fitting: Sequence[object], other: Sequence[object]) -> None:
    if not fitting or not other:
        raise ValueError(
            f"there are {len(fitting)} examples that fit and {len(other)} that do not; a score needs some of both"
        )


def _marked(excerpt: Excerpt, above: float) -> set[int]:
    """The places whose activation exceeds a share of the largest one."""
    if not 0 <= above < 1:
        raise ValueError(f"above is a share of the largest activation in [0, 1), got {above}")
    largest = max(excerpt.activations)
    return {place for place, value in enumerate(excerpt.activations) if value > above * largest}


def _text(excerpt: Excerpt, decode: Decode, marked: set[int] | None = None) -> str:
    """A passage in one line, marked tokens between marks; their leading spaces stay outside."""
    parts = []
    for inside, places in groupby(range(len(excerpt.tokens)), key=lambda place: place in (marked or ())):
        piece = "".join(decode(excerpt.tokens[place]) for place in places)
        body = piece.lstrip()
        parts.append(f"{piece[: len(piece) - len(body)]}{OPEN}{body}{CLOSE}" if inside else piece)
    return "".join(parts).replace("\n", "\u23ce")


def _messages(task: str, content: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": task}, {"role": "user", "content": content}]


def _judged(
    chat: ChatModel, task: str, explanation: str, texts: list[str], fitting: int, at_once: int, seed: int
) -> Score:
    """Ask about shuffled texts, the first `fitting` of which are to be accepted."""
    if at_once < 1:
        raise ValueError(f"at_once is how many passages a question has, 1 or more; got {at_once}")
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    answers: list[bool | None] = [None] * len(texts)
    for start in range(0, len(order), at_once):
        asked = order[start : start + at_once]
        lines = [f"{number}. {texts[index]}" for number, index in enumerate(asked, 1)]
        question = f"Explanation: {explanation}\n\nPassages:\n" + "\n".join(lines)
        replies = chat.complete(_messages(task, question), 1, temperature=0.0, max_tokens=8 + 4 * len(asked))
        for index, answer in zip(asked, _read(replies[0] if replies else "", len(asked)), strict=True):
            answers[index] = answer
    return Score(tuple(answers[:fitting]), tuple(answers[fitting:]))


def _read(reply: str, count: int) -> list[bool | None]:
    """The zeros and ones of a reply, of its last list if it has one; None where their number is not `count`."""
    lists = re.findall(r"\[([^\[\]]*)\]", reply)
    found = re.findall(r"\d+", lists[-1] if lists else reply)
    if len(found) != count or any(number not in ("0", "1") for number in found):
        return [None] * count
    return [number == "1" for number in found]
