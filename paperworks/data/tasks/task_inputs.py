"""Structured inputs as token sequences: the transformations of GPT (Radford et al. 2018, Section 3.3 and Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Sequences = list[list[int]]


@dataclass(frozen=True)
class TaskInputs:
    """Three ids that the vocabulary had not before: they begin a sequence, part it, and end it.

    What a model makes of the last one is what a task reads. Each method returns the sequences of one example.
    """

    start: int
    delimiter: int
    extract: int

    @classmethod
    def after(cls, vocab_size: int) -> TaskInputs:
        """The three ids that follow a vocabulary: `models.vocabulary.with_more_tokens(model, 3)` has them."""
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)

    def classification(self, text: Sequence[int]) -> Sequences:
        """One sequence."""
        return [[self.start, *text, self.extract]]

    def entailment(self, premise: Sequence[int], hypothesis: Sequence[int]) -> Sequences:
        """Premise and hypothesis in one sequence."""
        return [[self.start, *premise, self.delimiter, *hypothesis, self.extract]]

    def similarity(self, one: Sequence[int], other: Sequence[int]) -> Sequences:
        """Both orders: what is read is their sum (`TaskModel(reading="sum")`)."""
        return [self.entailment(one, other)[0], self.entailment(other, one)[0]]

    def choice(self, context: Sequence[int], answers: Sequence[Sequence[int]]) -> Sequences:
        """One sequence an answer (`TaskModel(reading="choice")`)."""
        if len(answers) < 2:
            raise ValueError(f"there must be at least 2 answers to choose from, got {len(answers)}")
        return [self.entailment(context, answer)[0] for answer in answers]


def task_batch(
    examples: Sequence[Sequences], labels: Sequence[int], *, context: int | None = None
) -> dict[str, Int[Tensor, "..."]]:
    """ "tokens" and "segments" (batch, sequences, time), padded after, and "labels" (batch,).

    Raises ValueError when examples have unequally many sequences, a label is missing, or a sequence exceeds `context`.
    """
    if not examples or len(examples) != len(labels):
        raise ValueError(f"each of one or more examples needs a label, got {len(examples)} and {len(labels)}")
    counts = {len(example) for example in examples}
    if len(counts) > 1:
        raise ValueError(f"all examples of a batch need equally many sequences, got {sorted(counts)}")
    longest = max(len(sequence) for example in examples for sequence in example)
    if context is not None and longest > context:
        raise ValueError(f"a sequence has {longest} tokens and the model reads {context}: shorten the text")
    tokens = torch.zeros(len(examples), counts.pop(), longest, dtype=torch.int64)
    segments = torch.zeros_like(tokens)
    for index, example in enumerate(examples):
        for place, sequence in enumerate(example):
            tokens[index, place, : len(sequence)] = torch.tensor(sequence)
            segments[index, place, : len(sequence)] = 1
    return {"tokens": tokens, "segments": segments, "labels": torch.tensor(labels)}
