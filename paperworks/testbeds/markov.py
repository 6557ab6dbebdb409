"""Strings of a Markov chain with forbidden transitions, and what is exactly known about each gap in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MarkovChain:
    """Letters 0 .. alphabet - 1, each followed by one of `successors` letters, with unequal chances drawn by `seed`.

    The first letter is any one, with equal chances. Raises ValueError unless 1 <= successors <= alphabet.
    """

    alphabet: int = 8
    successors: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.successors <= self.alphabet:
            raise ValueError(f"successors must be in [1, {self.alphabet}] letters, got {self.successors}")

    def transitions(self) -> Float[Tensor, "alphabet alphabet"]:
        """p(next | letter), float64; each row has `successors` entries above 0.

        Letter i may be followed by i + 1 (so that every letter can be reached) and by others drawn at random.
        """
        draws = torch.Generator().manual_seed(self.seed)
        chances = torch.zeros(self.alphabet, self.alphabet, dtype=torch.float64)
        for letter in range(self.alphabet):
            following = (letter + 1) % self.alphabet
            others = torch.randperm(self.alphabet, generator=draws)
            others = others[others != following][: self.successors - 1]
            weights = 0.5 + torch.rand(self.successors, generator=draws, dtype=torch.float64)
            chances[letter, torch.cat((others.new_tensor([following]), others))] = weights / weights.sum()
        return chances

    def draw(self, rows: int, length: int, draws: torch.Generator) -> Int[Tensor, "rows length"]:
        """so many strings."""
        cumulative = self.transitions().cumsum(1)
        letters = [torch.randint(self.alphabet, (rows,), generator=draws)]
        for _ in range(length - 1):
            u = torch.rand(rows, 1, generator=draws, dtype=torch.float64)
            following = (u >= cumulative[letters[-1]] * (1 - 1e-12)).sum(1)  # rounding must not reach beyond the last
            letters.append(following.clamp(max=self.alphabet - 1))
        return torch.stack(letters, 1)

    def valid(self, strings: Int[Tensor, "rows length"]) -> Bool[Tensor, " rows"]:
        """Which strings the chain can write."""
        return (self.transitions()[strings[:, :-1], strings[:, 1:]] > 0).all(1)

    def posterior(self, known: Int[Tensor, " length"]) -> Float[Tensor, "length alphabet"]:
        """p(letter at each place | the known letters), -1 standing where none is known: forward-backward.

        Raises ValueError when the known letters cannot stand together.
        """
        chances, length = self.transitions(), len(known)
        evidence = torch.ones(length, self.alphabet, dtype=torch.float64)
        there = known >= 0
        evidence[there] = torch.nn.functional.one_hot(known[there], self.alphabet).double()
        forward, backward = evidence.clone(), torch.ones_like(evidence)
        for place in range(1, length):
            forward[place] = forward[place - 1] @ chances * evidence[place]
            forward[place] /= forward[place].sum().clamp(min=1e-300)
        for place in range(length - 2, -1, -1):
            backward[place] = chances @ (evidence[place + 1] * backward[place + 1])
            backward[place] /= backward[place].sum().clamp(min=1e-300)
        both = forward * backward
        if bool((both.sum(1) <= 0).any()):
            raise ValueError("the chain cannot write the known letters together")
        return both / both.sum(1, keepdim=True)
