"""A small transformer of invented facts that is trained to say whether statements are true, and negated ones too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks import interpret, train
from paperworks.lab import Lab
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE
from paperworks.train.losses import IGNORED

TOPICS, SUBJECTS, ANSWERS = 6, 16, 6  # subjects of a topic, and answers of which one is right for each subject
IS, NOT, STOP, TRUE, FALSE = range(5)
_FIRST_SUBJECT = 5
_FIRST_ANSWER = _FIRST_SUBJECT + TOPICS * SUBJECTS
STATEMENT = 6  # tokens of a negated statement and its verdict


@dataclass(frozen=True)
class World:
    """Every statement "subject is [not] answer ." of six topics, with its truth, and the token T or F after it."""

    tokens: Int[Tensor, "n 6"]  # affirmative statements are padded behind; `length` says where they end
    length: Int[Tensor, " n"]  # tokens up to the period
    true: Bool[Tensor, " n"]
    affirmative: Bool[Tensor, " n"]
    topic: Int[Tensor, " n"]


def draw_world(seed: int) -> World:
    """Draw which answer is right for each subject, and write all statements, true and false equally often."""
    draws = torch.Generator().manual_seed(seed)
    rows, lengths, truths, affirmative, topics = [], [], [], [], []
    for topic in range(TOPICS):
        right = torch.randint(ANSWERS, (SUBJECTS,), generator=draws).tolist()
        for subject in range(SUBJECTS):
            for answer in range(ANSWERS):
                # The right answer as often as the wrong ones together.
                for _ in range(ANSWERS - 1 if answer == right[subject] else 1):
                    for plain in (True, False):
                        true = (answer == right[subject]) == plain
                        text = [_FIRST_SUBJECT + topic * SUBJECTS + subject, IS] + ([] if plain else [NOT])
                        text += [_FIRST_ANSWER + topic * ANSWERS + answer, STOP]
                        lengths.append(len(text))
                        rows.append([*text, TRUE if true else FALSE, STOP][:STATEMENT])
                        truths.append(true)
                        affirmative.append(plain)
                        topics.append(topic)
    return World(
        torch.tensor(rows), torch.tensor(lengths), torch.tensor(truths), torch.tensor(affirmative), torch.tensor(topics)
    )


def small_model(lab: Lab) -> DecoderModel:
    """Return a fresh model of four blocks and 64 dimensions."""
    torch.manual_seed(lab.seed)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=4, position=RoPE()), feedforward=GatedMLP(hidden=128))
    vocabulary = _FIRST_ANSWER + TOPICS * ANSWERS
    return Decoder(vocab_size=vocabulary, dim=64, depth=4, norm=RMSNorm(), block=block).build()


def learn(lab: Lab, model: DecoderModel, world: World) -> list[float]:
    """Train on all statements, four in five with their verdict T or F, and return the losses."""
    steps, batch = lab.pick(smoke=5, small=1000), 256
    draws = torch.Generator().manual_seed(lab.seed)
    targets = torch.full_like(world.tokens, IGNORED)
    targets[:, :-1] = world.tokens[:, 1:]
    places = torch.arange(STATEMENT)
    targets[places >= world.length[:, None]] = IGNORED  # nothing after the verdict

    def batches() -> Iterator[dict[str, Tensor]]:
        for _ in range(steps):
            rows = torch.randint(len(world.tokens), (batch,), generator=draws)
            silent = torch.rand(batch, generator=draws) < 0.2
            wanted = targets[rows].clone()
            wanted[silent, world.length[rows][silent] - 1] = IGNORED
            yield {"tokens": world.tokens[rows], "targets": wanted}

    settings = train.Settings(
        steps=steps, lr=2e-3, warmup=0.05,
        optimizer=train.AdamW(weight_decay=0.05), seed=lab.seed, save_every=None, log_every=steps,
        progress=False,
    )  # fmt: skip
    with lab.threads(1), lab.progress("a small model of facts", steps) as advance:
        report = train.fit(
            model, train.next_token_loss, lambda epoch: batches(), settings, on_step=lambda step: advance(1)
        )
    return report.losses


@torch.no_grad()
def at_periods(model: DecoderModel, world: World) -> tuple[Float[Tensor, "depth n dim"], Tensor]:
    """Return the residual stream after each block at the period, and the logits there."""
    paths = [f"blocks.{layer}" for layer in range(model.spec.depth)]
    with interpret.record(model, paths) as seen:
        logits = model(world.tokens)
    rows = torch.arange(len(world.tokens))
    states = torch.stack([seen[path][rows, world.length - 1] for path in paths])
    return states, logits[rows, world.length - 1]
