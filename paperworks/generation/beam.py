"""Beam search with length penalty (Wu et al. 2016, arXiv:1609.08144, in the form score / length^penalty)."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperworks.core.modes import evaluating
from paperworks.generation.prompts import Prompts, left_pad
from paperworks.nn import Placement


class _Finished:
    """The best complete hypotheses of one prompt."""

    def __init__(self, size: int) -> None:
        self.size, self.entries = size, list[tuple[float, list[int]]]()

    def add(self, score: float, tokens: list[int]) -> None:
        self.entries = sorted([*self.entries, (score, tokens)], key=lambda entry: -entry[0])[: self.size]

    def settled(self, best_open: float) -> bool:
        return len(self.entries) == self.size and self.entries[-1][0] >= best_open


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    prompts: Prompts,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    length_offset: float = 0.0,
    stop_tokens: Sequence[int] = (),
    pad: int = 0,
) -> Int[Tensor, "batch new"]:
    """The highest-scoring continuation of each prompt found with `beams` hypotheses.

    The score is the sum of log probabilities divided by ((o + n) / (o + 1)) ^ length_penalty, n the new tokens, the
    stop token included, and o the length_offset: 0 by default, 5 with a penalty of 0.6 in Wu et al. and the
    Transformer. A prompt is settled once `beams` hypotheses are complete and none still open scores higher at its
    present length.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    if length_offset < 0:
        raise ValueError(f"length_offset must be at least 0, got {length_offset}")

    def divisor(new: int) -> float:
        out: float = ((length_offset + new) / (length_offset + 1)) ** length_penalty
        return out

    tokens, segments = left_pad(prompts, model.device)  # type: ignore[arg-type]
    batch, device = tokens.shape[0], tokens.device
    rows = torch.arange(batch, device=device).repeat_interleave(beams)
    scores = torch.full((batch, beams), -torch.inf, device=device, dtype=torch.float32)
    scores[:, 0] = 0.0  # the first step branches from one copy of the prompt
    written = torch.empty(batch * beams, 0, dtype=torch.int64, device=device)
    finished = [_Finished(beams) for _ in range(batch)]
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    with evaluating(model):
        cache = model.new_cache(batch, tokens.shape[1] + max_new_tokens)  # type: ignore[operator]
        step_tokens, step_segments = tokens, segments
        for step in range(max_new_tokens):
            logits = model(step_tokens, Placement(segments=step_segments, cache=cache), last=1)[:, -1]
            if step == 0:
                logits = logits[rows]
                cache.reorder(rows)
            step_segments = None
            totals = torch.log_softmax(logits.float(), -1).view(batch, beams, -1) + scores[:, :, None]
            vocab = totals.shape[-1]
            # each stop token can end a beam, so this many candidates always leave `beams` open ones
            count = min(beams * (1 + len(stops)), beams * vocab)
            best, flat = totals.flatten(1).topk(count, -1)
            parents, chosen = flat // vocab, flat % vocab
            ends = torch.isin(chosen, stops)
            for row, rank in ends[:, :beams].nonzero().tolist():
                parent = row * beams + int(parents[row, rank])
                score = float(best[row, rank]) / divisor(step + 1)
                finished[row].add(score, written[parent].tolist())
            open_best = best.masked_fill(ends, -torch.inf)
            scores, kept = open_best.topk(beams, -1)
            parent_rows = (torch.arange(batch, device=device)[:, None] * beams + parents.gather(1, kept)).flatten()
            step_tokens = chosen.gather(1, kept).flatten()[:, None]
            written = torch.cat((written[parent_rows], step_tokens), 1)
            cache.reorder(parent_rows)
            best_open = (scores.amax(1) / divisor(step + 1)).tolist()
            if all(done.settled(score) for done, score in zip(finished, best_open, strict=True)):
                break
    length = written.shape[1]
    for row in range(batch):
        for beam in range(beams):
            score = float(scores[row, beam])
            if score > -torch.inf and length:
                finished[row].add(score / divisor(length), written[row * beams + beam].tolist())
    best_rows = [done.entries[0][1] if done.entries else [] for done in finished]
    longest = max(map(len, best_rows))
    return torch.tensor(
        [row + [pad] * (longest - len(row)) for row in best_rows], dtype=torch.int64, device=device
    ).view(batch, longest)
