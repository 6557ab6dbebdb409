"""Modular addition seen in the Fourier basis, and the measures of progress it gives (Nanda et al. 2023, "Progress
measures for grokking via mechanistic interpretability", arXiv:2301.05217).

A network that adds modulo p by rotations computes logit(c) ~ sum over k of alpha_k cos(w_k (a + b - c)) for a few key
frequencies k, with w_k = 2 pi k / p. Logits and activations here are tables over all pairs (a, b), with p read from
their shape; computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


def fourier_basis(modulus: int) -> Float[Tensor, "modulus modulus"]:
    """The real Fourier basis over the residues, orthonormal rows: 1, cos w_1 x, sin w_1 x, cos w_2 x, ...

    For an even modulus the last row is the alternating cos w_(p/2) x, whose sine is 0.
    """
    if modulus < 2:
        raise ValueError(f"the modulus is the number of residues, at least 2; got {modulus}")
    residues = torch.arange(modulus, dtype=torch.float64)
    rows = [torch.ones(modulus, dtype=torch.float64)]
    for frequency in range(1, (modulus - 1) // 2 + 1):
        angle = 2 * torch.pi * frequency / modulus * residues
        rows += [angle.cos(), angle.sin()]
    if modulus % 2 == 0:
        rows.append((-1.0) ** residues)
    return functional.normalize(torch.stack(rows), dim=1)


def frequency_power(weight: Float[Tensor, "modulus dim"]) -> Float[Tensor, " frequencies"]:
    """Power ||cosine row||^2 + ||sine row||^2 of F W for the frequencies 1 .. p // 2, the constant left out.

    An embedding has one row a residue. Entry 0 is frequency 1.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (modulus, dim), one row a residue, got {tuple(weight.shape)}")
    rows = (fourier_basis(len(weight)).to(weight.device) @ weight.detach().double()).square().sum(1)[1:]
    return functional.pad(rows, (0, len(rows) % 2)).view(-1, 2).sum(1)


def key_frequencies(power: Float[Tensor, " frequencies"], count: int = 5) -> tuple[int, ...]:
    """The `count` strongest frequencies (counted from 1) in ascending order."""
    if not 1 <= count <= len(power):
        raise ValueError(f"count must be between 1 and the {len(power)} frequencies there are, got {count}")
    return tuple(sorted((power.topk(count).indices + 1).tolist()))


def gini(values: Float[Tensor, " n"]) -> float:
    """Gini's coefficient of sparsity: 0 when all values are equal, 1 - 1/n when one holds everything.

    sum_i (2 i - n - 1) x_i / (n sum_i x_i) for x in ascending order, i = 1 .. n.

    Raises:
        ValueError: when a value is negative or all are 0.
    """
    if values.ndim != 1 or bool((values < 0).any()) or not bool((values > 0).any()):
        raise ValueError(f"Gini's coefficient is of values >= 0, some positive, in one row; got {values.tolist()}")
    ordered = values.detach().double().sort().values
    n = len(ordered)
    place = torch.arange(1, n + 1, dtype=torch.float64, device=values.device)
    return float(((2 * place - n - 1) * ordered).sum() / (n * ordered.sum()))


def cosine_logits(
    modulus: int, frequencies: Sequence[int], weights: Float[Tensor, " keys"] | None = None
) -> Float[Tensor, "modulus modulus modulus"]:
    """sum_k alpha_k cos(w_k (a + b - c)) for all a, b, c: the algorithm written down. alpha_k = 1 by default."""
    _require_frequencies(frequencies, modulus)
    if weights is not None and len(weights) != len(frequencies):
        raise ValueError(f"one weight a frequency: got {len(weights)} for {len(frequencies)} frequencies")
    alpha = torch.ones(len(frequencies)) if weights is None else weights
    x = torch.arange(modulus)
    offset = (x[:, None, None] + x[:, None] - x) % modulus
    waves = torch.stack([(2 * torch.pi * k / modulus * x.double()).cos() for k in frequencies])
    return (alpha.double() @ waves.to(alpha.device))[offset.to(alpha.device)]


def along_sum(
    logits: Float[Tensor, "modulus modulus answers"], frequencies: Sequence[int]
) -> Float[Tensor, "modulus modulus answers"]:
    """The part of each answer's logit that is a combination of cos and sin w_k (a + b), for the k given."""
    modulus = _modulus_of(logits)
    _require_frequencies(frequencies, modulus)
    directions = _sum_waves(modulus, frequencies).to(logits.device)
    flat = logits.detach().double().reshape(modulus**2, -1)
    return (directions.mT @ (directions @ flat)).view(modulus, modulus, -1)


def restricted(
    logits: Float[Tensor, "modulus modulus answers"], frequencies: Sequence[int]
) -> Float[Tensor, "modulus modulus answers"]:
    """The logits with only the key frequencies of a + b kept, and each answer's mean."""
    return along_sum(logits, frequencies) + logits.detach().double().mean((0, 1))


def excluded(
    logits: Float[Tensor, "modulus modulus answers"], frequencies: Sequence[int]
) -> Float[Tensor, "modulus modulus answers"]:
    """The logits without the key frequencies of a + b: what a network has memorised survives in them."""
    return logits.detach().double() - along_sum(logits, frequencies)


@dataclass(frozen=True)
class CosineFit:
    """Least squares of logits, centred over the answers, by sum_k alpha_k cos(w_k (a + b - c)).

    Attributes:
        weights: alpha_k, in the order of the frequencies.
        explained: share of the centred logits' squares that the sum explains, 1 when they are nothing else.
    """

    weights: Float[Tensor, " keys"]
    explained: float


def fit_cosines(logits: Float[Tensor, "modulus modulus modulus"], frequencies: Sequence[int]) -> CosineFit:
    """Fit the algorithm's logits to a network's; adding the same to every answer's logit changes nothing.

    Raises:
        ValueError: when there is not one logit a residue, a frequency is out of range, or the logits are constant.
    """
    modulus = _modulus_of(logits)
    if logits.shape[-1] != modulus:
        raise ValueError(f"a fit needs one logit a residue: got {logits.shape[-1]} answers modulo {modulus}")
    centred = logits.detach().double() - logits.detach().double().mean(-1, keepdim=True)
    total = centred.square().sum()
    if not bool(total > 0):
        raise ValueError("the logits do not depend on the answer, so there is nothing to explain")
    # cosines of different frequencies are orthogonal over (a, b, c): each weight is a projection of its own
    waves = [cosine_logits(modulus, [k]).to(logits.device) for k in frequencies]
    weights = torch.stack([(wave * centred).sum() / wave.square().sum() for wave in waves])
    within = sum(
        (weight**2 * wave.square().sum() for weight, wave in zip(weights, waves, strict=True)), total.new_zeros(())
    )
    return CosineFit(weights, float(within / total))


def neuron_frequencies(
    activations: Float[Tensor, "modulus modulus neurons"],
) -> tuple[Int[Tensor, " neurons"], Float[Tensor, " neurons"]]:
    """Each neuron's best frequency, and the share of its variance over (a, b) that this frequency explains.

    Explained is what lies in cos and sin of w_k a and of w_k b and their four products. A neuron that never changes
    explains nothing (0).
    """
    modulus = _modulus_of(activations)
    basis = fourier_basis(modulus).to(activations.device)
    table = torch.einsum("xa,yb,abn->xyn", basis, basis, activations.detach().double()).square()
    rounding = 1e-24 * table[0, 0]  # a constant's variance is not quite 0 in float64
    table[0, 0] = 0  # the mean
    total = table.sum((0, 1))
    shares = []
    for frequency in range(1, modulus // 2 + 1):
        rows = [0, *range(2 * frequency - 1, min(2 * frequency + 1, modulus))]
        shares.append(table[rows][:, rows].sum((0, 1)))
    best = torch.stack(shares).max(0)
    return best.indices + 1, torch.where(total > rounding, best.values / total, 0.0)


def accuracy_and_loss(
    logits: Float[Tensor, "modulus modulus modulus"], pairs: Bool[Tensor, "modulus modulus"] | None = None
) -> tuple[float, float]:
    """The share of pairs with argmax a + b, and the mean cross-entropy in nats; over `pairs`, or over all."""
    modulus = _modulus_of(logits)
    x = torch.arange(modulus, device=logits.device)
    answer = (x[:, None] + x) % modulus
    chosen = torch.ones_like(answer, dtype=torch.bool) if pairs is None else pairs
    if chosen.shape != answer.shape or not bool(chosen.any()):
        raise ValueError(
            f"pairs must be a ({modulus}, {modulus}) mask with at least one pair, got {tuple(chosen.shape)} "
            f"with {int(chosen.sum())}"
        )
    rows, right = logits.detach().double()[chosen], answer[chosen]
    return float((rows.argmax(-1) == right).double().mean()), float(functional.cross_entropy(rows, right))


def _sum_waves(modulus: int, frequencies: Sequence[int]) -> Float[Tensor, "waves pairs"]:
    """Orthonormal rows cos and sin w_k (a + b) over the pairs."""
    x = torch.arange(modulus)
    total = ((x[:, None] + x) % modulus).flatten()
    basis = fourier_basis(modulus)
    rows = [row for k in frequencies for row in range(2 * k - 1, min(2 * k + 1, modulus))]
    return basis[rows][:, total] / modulus**0.5  # each residue is the sum of p pairs


def _modulus_of(table: Tensor) -> int:
    if table.ndim != 3 or table.shape[0] != table.shape[1]:
        raise ValueError(f"a table over all pairs is (modulus, modulus, values), got {tuple(table.shape)}")
    return table.shape[0]


def _require_frequencies(frequencies: Sequence[int], modulus: int) -> None:
    wrong = [k for k in frequencies if not 1 <= k <= modulus // 2]
    if wrong or not frequencies or len(set(frequencies)) != len(frequencies):
        raise ValueError(
            f"frequencies must be different numbers from 1 to {modulus // 2} modulo {modulus}, at least one; "
            f"got {list(frequencies)}"
        )
