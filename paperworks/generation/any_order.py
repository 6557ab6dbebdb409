"""Filling positions in any order, many at a time: decoding of sigma-GPTs (Pannatier et al. 2024, arXiv:2404.09562)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.modes import evaluating
from paperworks.nn import TargetPlacement


@dataclass(frozen=True)
class Filled:
    """What `fill` wrote.

    Attributes:
        tokens: int64 (batch, wanted), in the order of `wanted`.
        rounds: int64 (batch,), rounds that each row took; a round is two calls of the model.
        accepted: for each row, how many tokens each round kept.
    """

    tokens: Int[Tensor, "batch wanted"]
    rounds: Int[Tensor, " batch"]
    accepted: list[list[int]]


def conditionals(
    model: nn.Module,
    tokens: Int[Tensor, "batch known"],
    positions: Int[Tensor, " known"],
    wanted: Int[Tensor, " wanted"],
) -> Float[Tensor, "batch wanted vocab"]:
    """log p(token at each wanted position | the known ones), all from one pass: the paper's burst.

    The known tokens are read in the order given. Then the last of them stands there once for each wanted position,
    asked for it; these copies see the known tokens and themselves, not each other.
    Raises ValueError for a model without `PairedPositions`, or positions that occur twice.
    """
    _check(tokens, positions, wanted)
    with evaluating(model), torch.inference_mode():
        before = positions.shape[0] - 1
        cache = model.new_cache(len(tokens), before + len(wanted))  # type: ignore[operator]
        _read(model, tokens[:, :-1], positions, cache)
        return _burst(model, tokens[:, -1:], positions[-1:].expand(len(tokens), 1), wanted, cache).log_softmax(-1)


def fill(
    model: nn.Module,
    tokens: Int[Tensor, "batch known"],
    positions: Int[Tensor, " known"],
    wanted: Int[Tensor, " wanted"],
    *,
    orders: int = 1,
    temperature: float = 1.0,
    seed: int | None = None,
) -> Filled:
    """Draw the tokens of the wanted positions given the known ones, several a round, by rejection sampling.

    A round draws every open token x from p(x | known) at once, then asks for each again, in `orders` random orders,
    given the earlier ones of that order: q. A token is kept while u < min(1, q / p), u one uniform number for each
    token and all orders; the first is always kept, and what follows the first refusal is drawn anew in the next
    round. The order that keeps the most counts.

    Args:
        model: a causal decoder of attention with `PairedPositions`, trained in random orders.
        tokens, positions: what is known and where it stands; the start (position 0) is enough.
        wanted: the positions to fill.
        orders: how many orders a round tries (batch rows of the second call).
        temperature: logits are divided by it, those of both passes.
        seed: for reproducible draws.

    Raises:
        ValueError: for an impossible setting, or as `conditionals` does.
    """
    _check(tokens, positions, wanted)
    if orders < 1 or temperature <= 0:
        raise ValueError(f"orders must be at least 1 and temperature above 0, got {orders} and {temperature}")
    draws = torch.Generator(tokens.device)
    draws.seed() if seed is None else draws.manual_seed(seed)
    with evaluating(model), torch.inference_mode():
        rows = [_fill_row(model, row[None], positions, wanted, orders, temperature, draws) for row in tokens]
    accepted = [kept for _, kept in rows]
    rounds = torch.tensor([len(kept) for kept in accepted], device=tokens.device)
    return Filled(torch.stack([found for found, _ in rows]), rounds, accepted)


def _fill_row(
    model: nn.Module,
    tokens: Tensor,
    positions: Tensor,
    wanted: Tensor,
    orders: int,
    temperature: float,
    draws: torch.Generator,
) -> tuple[Tensor, list[int]]:
    cache = model.new_cache(1, positions.shape[0] + len(wanted))  # type: ignore[operator]
    _read(model, tokens[:, :-1], positions, cache)
    last, at = tokens[:, -1:], positions[-1:][None]  # read by no one yet: it is asked anew in each round
    found = torch.empty_like(wanted)
    still_open = torch.arange(len(wanted), device=wanted.device)
    kept: list[int] = []
    while len(still_open):
        known = cache.length
        asked = wanted[still_open]
        logp = (_burst(model, last, at, asked, cache)[0] / temperature).log_softmax(-1)
        cache.truncate(known)
        drawn = torch.multinomial(logp.exp(), 1, generator=draws)[:, 0]
        logp = logp.gather(1, drawn[:, None])[:, 0]
        keys = torch.rand(orders, len(asked), generator=draws, device=asked.device)
        order = keys.argsort(1)
        logu = torch.rand(len(asked), generator=draws, device=asked.device).log()
        logq = _in_turn(model, last, at, drawn[order], asked[order], cache, temperature)
        refused = logu[order] >= logq - logp[order]
        refused[:, 0] = False  # q is p there, but for rounding
        count = torch.where(refused.any(1), refused.int().argmax(1), len(asked))
        best = int(count.argmax())
        taken = int(count[best])
        chosen = order[best, :taken]
        cache.reorder(torch.tensor([best], device=asked.device))
        cache.truncate(known + taken)  # the last token and those taken, but for the last of these
        found[still_open[chosen]] = drawn[chosen]
        last, at = drawn[chosen[-1]].view(1, 1), asked[chosen[-1]].view(1, 1)
        rest = torch.ones(len(asked), dtype=torch.bool, device=asked.device)
        rest[chosen] = False
        still_open = still_open[rest]
        kept.append(taken)
    return found, kept


def _check(tokens: Tensor, positions: Tensor, wanted: Tensor) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 1 or positions.shape != tokens.shape[1:]:
        raise ValueError(
            f"tokens must be (batch, known) with one position each, at least the start; got {tuple(tokens.shape)} and "
            f"positions {tuple(positions.shape)}"
        )
    if wanted.dim() != 1 or len(wanted) < 1:
        raise ValueError(f"wanted must be one or more positions, got shape {tuple(wanted.shape)}")
    places = torch.cat((positions, wanted)).tolist()
    if len(set(places)) < len(places):
        raise ValueError("a position occurs twice among the known and the wanted ones")


def _read(model: nn.Module, tokens: Tensor, positions: Tensor, cache: object) -> None:
    """Fill the cache with known tokens, each asked for the one after it in the order given."""
    if tokens.shape[1]:
        here, asked = positions[None, :-1], positions[None, 1:]
        model(tokens, TargetPlacement(positions=here, target_positions=asked, cache=cache), last=1)


def _burst(model: nn.Module, last: Tensor, at: Tensor, asked: Tensor, cache: object) -> Tensor:
    """The logits for every asked position, none seeing another."""
    alone = torch.eye(len(asked), dtype=torch.bool, device=asked.device)
    many = (len(last), len(asked))
    out: Tensor = model(
        last.expand(many),
        TargetPlacement(
            positions=at.expand(many), target_positions=asked.expand(many), cache=cache, attention_mask=alone
        ),
    )
    return out


def _in_turn(
    model: nn.Module, last: Tensor, at: Tensor, drawn: Tensor, asked: Tensor, cache: object, temperature: float
) -> Tensor:
    """log q of the drawn tokens, each given the earlier ones of its order (a row)."""
    rows = len(drawn)
    cache.reorder(torch.zeros(rows, dtype=torch.int64, device=drawn.device))  # type: ignore[attr-defined]
    tokens = torch.cat((last.expand(rows, 1), drawn[:, :-1]), 1)
    positions = torch.cat((at.expand(rows, 1), asked[:, :-1]), 1)
    logits = model(tokens, TargetPlacement(positions=positions, target_positions=asked, cache=cache))
    out: Tensor = (logits / temperature).log_softmax(-1).gather(2, drawn[..., None])[..., 0]
    return out
