"""Tables of binary operations, each to be completed from a part of it (Power et al. 2022, arXiv:2201.02177).

Every element is an abstract token: a model sees only which symbols stand left, right and in the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks.core.errors import unknown

Integers = Int[Tensor, " rows"]


def inverse(x: Integers, prime: int) -> Integers:
    """x^-1 modulo a prime as x^(p - 2) (Fermat), exactly; the inverse of 0 does not exist and comes out 0."""
    power, base, exponent = torch.ones_like(x), x % prime, prime - 2
    while exponent:
        if exponent & 1:
            power = power * base % prime
        base = base * base % prime
        exponent >>= 1
    return power * (x % prime != 0)


# Appendix A.1.1 of the paper, in its order; each is taken modulo the prime.
MODULAR: dict[str, Callable[[Integers, Integers, int], Integers]] = {
    "x+y": lambda x, y, p: x + y,
    "x-y": lambda x, y, p: x - y,
    "x/y": lambda x, y, p: x * inverse(y, p),
    "x/y if y odd else x-y": lambda x, y, p: torch.where(y % 2 == 1, x * inverse(y, p), x - y),
    "x^2+y^2": lambda x, y, p: x**2 + y**2,
    "x^2+xy+y^2": lambda x, y, p: x**2 + x * y + y**2,
    "x^2+xy+y^2+x": lambda x, y, p: x**2 + x * y + y**2 + x,
    "x^3+xy": lambda x, y, p: x**3 + x * y,
    "x^3+xy+y": lambda x, y, p: x**3 + x * y + y,
}

SYMMETRIC = ("xy", "xyx^-1", "xyx")  # in S5, the permutations of five things

OPERATIONS = (*MODULAR, *(f"S5 {name}" for name in SYMMETRIC))


@dataclass(frozen=True, kw_only=True)
class Table:
    """All equations `left o right = answer` of one operation, as tokens 0 .. tokens - 1."""

    operation: str
    tokens: int
    left: Integers
    right: Integers
    answer: Integers

    def __len__(self) -> int:
        return len(self.answer)

    def mirrored_pairs(self) -> int:
        """Count the pairs (a, b), (b, a) with a < b and one answer: each is one fact that a split may tear in two."""
        answers = {(a, b): c for a, b, c in zip(*self._columns(), strict=True)}
        return sum(a < b and answers.get((b, a)) == c for (a, b), c in answers.items())

    def split(self, fraction: float, seed: int) -> tuple[Table, Table]:
        """A random `fraction` of the equations for training and the rest for validation; one seed, one split."""
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is the share of equations to train on, between 0 and 1; got {fraction}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        cut = round(fraction * len(self))
        return self._rows(order[:cut]), self._rows(order[cut:])

    def _rows(self, rows: Integers) -> Table:
        return Table(
            operation=self.operation,
            tokens=self.tokens,
            left=self.left[rows],
            right=self.right[rows],
            answer=self.answer[rows],
        )

    def _columns(self) -> tuple[list[int], list[int], list[int]]:
        return self.left.tolist(), self.right.tolist(), self.answer.tolist()


def operation_table(operation: str, prime: int = 97) -> Table:
    """Build the table of an operation of `OPERATIONS`; the S5 ones ignore the prime and have 120 tokens.

    Division leaves out y = 0, so it has p (p - 1) equations; the other modular tables have p^2.
    Raises ValueError for an unknown operation or a modulus that is not prime.
    """
    if operation not in OPERATIONS:
        raise ValueError(unknown("operation", operation, OPERATIONS))
    return _symmetric_table(operation) if operation.startswith("S5 ") else _modular_table(operation, prime)


def _modular_table(operation: str, prime: int) -> Table:
    if prime < 2 or any(prime % divisor == 0 for divisor in range(2, int(prime**0.5) + 1)):
        raise ValueError(f"prime={prime} is not a prime, so not every element has an inverse; try 59 or 97")
    left, right = (grid.flatten() for grid in torch.meshgrid(torch.arange(prime), torch.arange(prime), indexing="ij"))
    if operation == "x/y":
        left, right = left[right != 0], right[right != 0]
    answer = MODULAR[operation](left, right, prime) % prime
    return Table(operation=operation, tokens=prime, left=left, right=right, answer=answer)


def _symmetric_table(operation: str) -> Table:
    members = torch.tensor(list(permutations(range(5))))
    count = len(members)
    left, right = (grid.flatten() for grid in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"))
    x, y = members[left], members[right]
    product = _compose(x, y)
    if operation == "S5 xyx^-1":
        product = _compose(product, x.argsort(dim=1))  # sorting the images of a permutation inverts it
    elif operation == "S5 xyx":
        product = _compose(product, x)
    place = 5 ** torch.arange(5)
    number = torch.empty(int((members * place).sum(dim=1).max()) + 1, dtype=torch.int64)
    number[(members * place).sum(dim=1)] = torch.arange(count)
    answer = number[(product * place).sum(dim=1)]
    return Table(operation=operation, tokens=count, left=left, right=right, answer=answer)


def _compose(x: Int[Tensor, "rows 5"], y: Int[Tensor, "rows 5"]) -> Int[Tensor, "rows 5"]:
    """The permutation that does y first and then x."""
    return x.gather(1, y)
