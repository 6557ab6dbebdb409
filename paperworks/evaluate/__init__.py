"""Metrics and benchmarks: how answers are scored, and how examples are shown before a question."""

from paperworks.evaluate.choices import ChoiceScores, score_choices, score_tokens
from paperworks.evaluate.shots import few_shot

__all__ = ["ChoiceScores", "few_shot", "score_choices", "score_tokens"]
