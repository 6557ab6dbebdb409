"""Two tasks for one small transformer, as synthetic sentences: whose partner is named again, and what colour it has.

Names: two couples, then the second of a couple again, and the answer is the first one of it (indirect object
identification, with a couple to mistake it for). Colours: two coloured objects, then an object again, and the answer is
its colour (Colored Objects). The last word says which is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.interpret.circuits.patching import Metric, logit_difference
from paperworks.lab import Lab
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, LearnedPositions, RMSNorm
from paperworks.testbeds.training import fit

Task = Literal["names", "colours"]
TASKS: tuple[Task, ...] = get_args(Task)

# The vocabulary, one range after the other; small, for every word's match has to be learned.
NAMES, COLOURS, OBJECTS, FILLERS = range(10), range(10, 16), range(16, 24), range(24, 28)
ASK: dict[Task, int] = {"names": 28, "colours": 29}
WORDS: dict[Task, tuple[range, range]] = {"names": (NAMES, NAMES), "colours": (COLOURS, OBJECTS)}
TIME = 10
PARTS = (2, 2, 1, 1)  # two pairs of words, and two places where a word may come again
LAYOUTS = 8


@dataclass(frozen=True)
class Prompts:
    """Prompts of one task, and what their places mean.

    Attributes:
        tokens: the task's words among fillers, and at the end the word that asks.
        corrupted: other words at the same places, of which none comes again.
        answer, wrong: the word before the repeated one, and the first word of the other pair.
        source: where the repeated word stands for the first time, just after the answer.
        other: where the other pair's second word stands, just after the wrong candidate.
    """

    tokens: Int[Tensor, "rows time"]
    corrupted: Int[Tensor, "rows time"]
    answer: Int[Tensor, " rows"]
    wrong: Int[Tensor, " rows"]
    source: Int[Tensor, " rows"]
    other: Int[Tensor, " rows"]

    @property
    def metric(self) -> Metric:
        """The logit of the answer minus that of the wrong candidate."""
        return logit_difference(self.answer, self.wrong)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor) -> Prompts:
        return Prompts(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _layouts() -> Int[Tensor, "layouts parts"]:
    """Draw where each part begins."""
    draws = torch.Generator().manual_seed(0)
    widths = torch.tensor(PARTS)
    gaps = torch.rand(LAYOUTS, TIME - 1 - int(widths.sum()) + len(PARTS), generator=draws).argsort(1)[:, : len(PARTS)]
    return gaps.sort(1).values - torch.arange(len(PARTS)) + widths.cumsum(0) - widths


PLACES = _layouts()


def _different(count: int, words: range, how_many: int, draws: torch.Generator) -> Int[Tensor, "rows words"]:
    return words.start + torch.rand(count, len(words), generator=draws).argsort(1)[:, :how_many]


def _pairs(task: Task, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw two pairs of different words, and a word that could come again but is in none of them."""
    first, second = WORDS[task]
    if first == second:
        drawn = _different(count, first, 5, draws)
        return drawn[:, :4].view(count, 2, 2), drawn[:, 4]
    ones, others = _different(count, first, 2, draws), _different(count, second, 3, draws)
    return torch.stack([ones, others[:, :2]], dim=2), others[:, 2]


def prompts(task: Task, count: int, draws: torch.Generator, *, adversarial: bool = False) -> Prompts:
    """Draw prompts of a task.

    One of the two pairs' second words comes again, at either of two places; the answer is the word before it in its
    pair. In `adversarial` prompts, which training has none of, both come again, and the later one counts.
    """
    rows = torch.arange(count)
    tokens = FILLERS.start + torch.randint(len(FILLERS), (count, TIME), generator=draws)
    corrupted = tokens.clone()
    places = PLACES[torch.randint(LAYOUTS, (count,), generator=draws)]
    (pairs, _), (others, stray) = _pairs(task, count, draws), _pairs(task, count, draws)
    asked = torch.randint(2, (count,), generator=draws)
    late = torch.ones_like(asked) if adversarial else torch.randint(2, (count,), generator=draws)
    mention = places[rows, 2 + late]
    for text, words, again in ((tokens, pairs, pairs[rows, asked, 1]), (corrupted, others, stray)):
        text.scatter_(1, places[:, :2], words[:, :, 0])
        text.scatter_(1, places[:, :2] + 1, words[:, :, 1])
        text[rows, mention] = again
    if adversarial:
        tokens[rows, places[:, 2]] = pairs[rows, 1 - asked, 1]
    tokens[:, -1] = corrupted[:, -1] = ASK[task]
    return Prompts(
        tokens=tokens,
        corrupted=corrupted,
        answer=pairs[rows, asked, 0],
        wrong=pairs[rows, 1 - asked, 0],
        source=places[rows, asked] + 1,
        other=places[rows, 1 - asked] + 1,
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    ours: Any = model
    return functional.cross_entropy(ours(batch[0], last=1)[:, -1], batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, asked: Prompts) -> float:
    """Share of prompts whose answer is the model's first choice."""
    ours: Any = model
    return float((ours(asked.tokens, last=1)[:, -1].argmax(-1) == asked.answer).float().mean())


@dataclass(frozen=True)
class Trained:
    """A model, and the steps it took until it was right in 99.5% of new prompts of its tasks."""

    model: DecoderModel
    steps: int


_TRAINED: dict[tuple[object, ...], Trained] = {}
_BATCH, _LOOK = 128, 50


def trained(lab: Lab, seed: int, tasks: Sequence[Task] = TASKS) -> Trained:
    """Train three layers of six heads, attention only, on some of the tasks until they are learned."""
    key = (lab.scale, seed, tuple(tasks))
    if key in _TRAINED:
        return _TRAINED[key]
    torch.manual_seed(seed)
    model = Decoder(
        vocab_size=max(ASK.values()) + 1,
        dim=64,
        depth=3,
        block=Block(norm=RMSNorm(), mixer=Attention(heads=6, head_dim=16)),
        norm=RMSNorm(),
        context=TIME,
        position=LearnedPositions(length=TIME),
        init_std=0.3,  # with 0.1 binding is not learned in time
    ).build()
    most = lab.pick(smoke=3, small=3000)
    draws = torch.Generator().manual_seed(seed + 1000)
    new = [prompts(task, lab.pick(smoke=16, small=512), torch.Generator().manual_seed(99)) for task in tasks]

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(most):
            drawn = [prompts(task, _BATCH // len(tasks), draws) for task in tasks]
            yield torch.cat([each.tokens for each in drawn]), torch.cat([each.answer for each in drawn])

    def learned(step: int) -> bool:
        return step % _LOOK == 0 and min(accuracy(model, each) for each in new) > 0.995

    adam = train.AdamW(weight_decay=0.3)  # strong: what serves both tasks costs less
    constant: dict[str, Any] = {"schedule": "constant", "optimizer": adam, "on_step": learned}
    with lab.threads(1):
        losses = fit(model, _loss, batches, steps=most, lr=3e-3, seed=seed, **constant)
    _TRAINED[key] = Trained(model.eval(), len(losses))
    return _TRAINED[key]
