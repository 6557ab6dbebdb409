"""Hadamard matrices (Paley 1933) and the fast multiplication by them.

A Hadamard matrix has entries +-1 and H H^T = n I. Sylvester's construction gives every power of two, Paley's two give
12, 20, 28, 36, 44, 52, 60 ..., and a Kronecker product of two is a third. What has no such factor (an odd width, say)
is filled up with a fixed orthogonal matrix, so that `transform` is orthogonal for every width.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

_AXIS = (
    64  # a power of two is multiplied by in matrices of at most this order: few passes over memory, little work each
)
_LARGEST_PALEY = 1024  # its matrices are multiplied by as they are, at order^2 a row


def transform(x: Float[Tensor, "... width"], *, inverse: bool = False) -> Float[Tensor, "... width"]:
    """x Q^T over the last dimension, Q = H / sqrt(n) orthogonal; the inverse multiplies by Q.

    H is the Kronecker product of `factors(width)`; where they are Hadamard (see `is_hadamard`), all entries of Q have
    the same magnitude 1/sqrt(n), so that no coordinate of the result depends on few of those of x.
    """
    width = x.shape[-1]
    sizes = [factor.shape[0] for factor in factors(width)]
    out = x.reshape(-1, *sizes)
    for axis, factor in enumerate(factors(width), 1):
        matrix = factor.to(out)
        out = (out.movedim(axis, -1) @ (matrix if inverse else matrix.T)).movedim(-1, axis)
    return out.reshape(x.shape)


@lru_cache(maxsize=64)
def factors(width: int) -> tuple[Float[Tensor, "order order"], ...]:
    """Orthogonal matrices, float64, whose Kronecker product is Q; none for width 1.

    Raises `ValueError` for a width below 1.
    """
    if width < 1:
        raise ValueError(f"a Hadamard transform needs a width of at least 1, got {width}")
    twos = (width & -width).bit_length() - 1  # how often 2 divides the width
    odd = width >> twos
    if odd == 1:
        return tuple(_sylvester_factors(twos))
    for used in range(2, twos + 1):
        matrix = paley(odd << used) if odd << used <= _LARGEST_PALEY else None
        if matrix is not None:
            return (*_sylvester_factors(twos - used), matrix.double() / math.sqrt(odd << used))
    return (*_sylvester_factors(twos), _fixed_orthogonal(odd))


def is_hadamard(width: int) -> bool:
    """Whether all entries of Q have one magnitude: false where an orthogonal matrix fills up an odd factor."""
    return all(bool((f.abs() - 1 / math.sqrt(len(f))).abs().max() < 1e-6) for f in factors(width))


def sylvester(power: int) -> Float[Tensor, "order order"]:
    """The Hadamard matrix of order 2^power with entries +-1 (Sylvester 1867): H_2n = [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def paley(order: int) -> Float[Tensor, "order order"] | None:
    """A Hadamard matrix by Paley's construction for a prime, or None where there is none of this order.

    I: order - 1 a prime that is 3 modulo 4 (12, 20, 24, 44, 60 ...). II: order / 2 - 1 a prime that is 1 modulo 4
    (12, 28, 36, 60, 76 ...).
    """
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return torch.eye(order) + _conference(order - 1, sign=-1)
    if order % 2 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        conference = _conference(order // 2 - 1, sign=1)
        off, on = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(conference, off) + torch.kron(torch.eye(order // 2), on)
    return None


def _conference(prime: int, sign: int) -> Float[Tensor, "order order"]:
    """C of order prime + 1 with zero diagonal, C C^T = prime I and C^T = sign C, of quadratic residues."""
    residues = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if number in residues else -1.0 for number in range(1, prime)])
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = float(sign)
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _sylvester_factors(twos: int) -> list[Tensor]:
    """Orthogonal factors for 2^twos, none larger than `_AXIS`."""
    count = -(-twos // (_AXIS.bit_length() - 1))
    powers = [twos // count + (index < twos % count) for index in range(count)]
    return [sylvester(power).double() / math.sqrt(2**power) for power in powers]


def _fixed_orthogonal(order: int) -> Float[Tensor, "order order"]:
    """The same orthogonal matrix whenever asked; its columns' signs are fixed by a positive diagonal of R."""
    draws = torch.randn(order, order, generator=torch.Generator().manual_seed(order), dtype=torch.float64)
    matrix, triangle = torch.linalg.qr(draws)
    out: Tensor = matrix * triangle.diagonal().sign()
    return out
