"""HiPPO-LegS: the matrix whose state holds the Legendre coefficients of all that was seen (Gu et al. 2020,
arXiv:2008.07669), and its normal-plus-low-rank form (Gu et al. 2021, arXiv:2111.00396).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

Real = torch.float64


def legs(state: int) -> tuple[Float[Tensor, "state state"], Float[Tensor, " state"]]:
    """A and B in float64: A_nk = -sqrt((2n + 1)(2k + 1)) for n > k, -(n + 1) for n = k; B_n = sqrt(2n + 1).

    t c' = A c + B u keeps c_n = integral over s of u(ts) sqrt(2n + 1) P_n(2s - 1), s from 0 to 1: the coefficients of
    the past in Legendre polynomials. c' = A c + B u, as S4 has it, weighs the past by e^-age: its impulse response is
    sqrt(2n + 1) e^-t P_n(2 e^-t - 1).
    """
    if state < 1:
        raise ValueError(f"state must be at least 1, got {state}")
    into = torch.sqrt(2 * torch.arange(state, dtype=Real) + 1)
    return -(torch.outer(into, into).tril(-1) + torch.diag(torch.arange(1, state + 1, dtype=Real))), into


def legendre(state: int, points: Float[Tensor, " points"]) -> Float[Tensor, "state points"]:
    """sqrt(2n + 1) P_n(2s - 1), orthonormal on s in [0, 1], for n = 0 .. state - 1."""
    x = 2 * points - 1
    rows = [torch.ones_like(x), x]
    for n in range(1, state - 1):
        rows.append(((2 * n + 1) * x * rows[n] - n * rows[n - 1]) / (n + 1))  # Bonnet's recursion
    scale = torch.sqrt(2 * torch.arange(state, dtype=points.dtype, device=points.device) + 1)
    return torch.stack(rows[:state]) * scale[:, None]


Modes = tuple[Complex[Tensor, " half"], Complex[Tensor, " half"], Complex[Tensor, " half"]]


def legs_modes(state: int) -> Modes:
    """(Lambda, P, B) of LegS where A = V (Lambda - P P*) V*: one of each conjugate pair, complex128.

    P_n = sqrt(n + 1/2): A + P P^T is -1/2 plus a skew-symmetric matrix, so it is normal. Raises `ValueError` for an odd
    or empty state.
    """
    matrix, into = legs(state)
    low_rank = torch.sqrt(torch.arange(state, dtype=Real) + 0.5)
    return _modes(matrix + torch.outer(low_rank, low_rank), low_rank, into)


def random_modes(state: int, draws: torch.Generator | None = None) -> Modes:
    """The same three of a random Gaussian system of this form, stable: what S4 is compared with.

    A = (G - G^T) / sqrt(2 state) - 1/2 - P P^T, with G, P and B drawn from N(0, 1); only the numbers differ from LegS.
    """
    gaussian = torch.randn(state, state, dtype=Real, generator=draws)
    low_rank, into = (torch.randn(state, dtype=Real, generator=draws) for _ in range(2))
    skew = (gaussian - gaussian.T) / math.sqrt(2 * state)
    return _modes(skew - 0.5 * torch.eye(state, dtype=Real), low_rank, into)


def _modes(normal: Tensor, low_rank: Tensor, into: Tensor) -> Modes:
    """Diagonalize -1/2 + skew: i times a skew matrix is Hermitian, which is safer than a general eigenproblem."""
    state = len(normal)
    if state < 2 or state % 2:
        raise ValueError(f"state must be even and at least 2, for modes come in conjugate pairs; got {state}")
    skew = (normal - normal.T) / 2
    frequency, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    half = slice(state // 2, None)  # ascending, so these are the positive ones
    change = vectors[:, half].conj().T
    values = torch.complex(torch.full_like(frequency[half], -0.5), frequency[half])
    return values, change @ low_rank.to(change.dtype), change @ into.to(change.dtype)
