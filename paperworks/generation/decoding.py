"""The decoding loop: one for every architecture, since every mixer keeps the same kind of cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperworks.core.modes import evaluating
from paperworks.generation.matvec import fast_linears
from paperworks.generation.prompts import Prompts, left_pad
from paperworks.generation.sampling import Sampling
from paperworks.nn import Placement


def decode(
    model: nn.Module,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    finished: Callable[[list[list[int]]], list[bool]] | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the new tokens step by step, one a row; rows that have ended yield -1.

    Args:
        model: anything with `forward(tokens, segments=, cache=, last=)` and `new_cache(batch, capacity)`.
        prompts: tokens (batch, time), or a list of rows of unequal length.
        max_new_tokens: the most tokens a row gets.
        sampling: how a token is chosen.
        stop_tokens: a row ends when it draws one of these (which is not yielded).
        seed: for reproducible draws; None draws from torch's global generator.
        finished: called with the new tokens so far of each row; a row for which it says True ends (stop strings).
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    device: torch.device = model.device  # type: ignore[assignment]
    tokens, segments = left_pad(prompts, device)
    batch = tokens.shape[0]
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    seen = _seen(tokens, segments, max_new_tokens) if sampling.repetition_penalty != 1.0 else None
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    written: list[list[int]] = [[] for _ in range(batch)]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(fast_linears(model))
        cache = None
        for step in range(max_new_tokens):
            with torch.inference_mode():
                if cache is None:
                    cache = model.new_cache(batch, tokens.shape[1] + max_new_tokens)  # type: ignore[operator]
                logits = model(tokens, Placement(segments=segments, cache=cache), last=1)[:, -1]
                chosen = sampling.choose(logits, seen, generator)
                if len(stops):
                    alive &= ~torch.isin(chosen, stops)
            if seen is not None:
                seen[:, seen.shape[1] - max_new_tokens + step] = torch.where(alive, chosen, -1)
            out = torch.where(alive, chosen, -1)
            if finished is not None:
                for row, token in enumerate(out.tolist()):
                    if token >= 0:
                        written[row].append(token)
                ended = torch.tensor(finished(written), device=device)
            if (finished is not None or len(stops)) and not bool((out >= 0).any()):
                return
            yield out.clone()
            if finished is not None:
                alive &= ~ended
                if not bool(alive.any()):
                    return
            tokens, segments = torch.where(alive, chosen, 0)[:, None], None


def _seen(tokens: Tensor, segments: Tensor | None, room: int) -> Tensor:
    prompt = tokens if segments is None else torch.where(segments > 0, tokens, -1)
    return torch.cat((prompt, torch.full((len(prompt), room), -1, device=tokens.device)), 1)
