"""Choosing the next token: greedy, temperature, top-k, nucleus (Holtzman et al. 2019, arXiv:1904.09751), min-p."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the logits. The filters apply in the order of the fields.

    Attributes:
        repetition_penalty: logits of tokens already in the row are divided by it where positive and multiplied where
            negative (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set whose probability reaches top_p; 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        )
        for name, right, expected in rules:
            if not right:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    def choose(
        self,
        logits: Float[Tensor, "batch vocab"],
        seen: Int[Tensor, "batch time"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, " batch"]:
        """One token a row. `seen` holds the row's tokens so far (-1 where there is none)."""
        if self.repetition_penalty != 1.0 and seen is not None:
            logits = penalize_repetition(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(self.filter(logits.float() / self.temperature), -1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    def filter(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """Set the logits of excluded tokens to -inf; the likeliest token always stays."""
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(-1, descending=True)
            likelier = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
            excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier >= self.top_p)
            logits = logits.masked_fill(excluded, -torch.inf)
        if self.min_p > 0:
            floor = torch.softmax(logits, -1)
            logits = logits.masked_fill(floor < self.min_p * floor.amax(-1, keepdim=True), -torch.inf)
        return logits


def penalize_repetition(
    logits: Float[Tensor, "batch vocab"], seen: Int[Tensor, "batch time"], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Push down the logits of tokens that are in `seen` (-1 entries are ignored)."""
    present = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    present.scatter_(1, torch.where(seen < 0, logits.shape[1], seen), True)
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(present[:, :-1], penalized, logits)
