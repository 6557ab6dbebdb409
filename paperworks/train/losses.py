"""Next-token cross entropy, lean where vocabularies are large."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from paperworks.nn.placement import Placement

IGNORED = -100

# Logits widened at a time: 1 MB of float32 stays in a CPU's cache; a GPU wants work enough to fill it (256 MB).
CHUNK = {"cpu": 2**18}
DEVICE_CHUNK = 2**26

# Below this many logits torch's own function is faster, and its memory does not matter.
LEAN_FROM = 2**20


def next_token_loss(model: nn.Module, batch: Any) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(sum of -log p(next token), number of tokens predicted): what `fit` and `evaluate` take.

    batch: int64 tokens (batch, time), or a mapping with
        "tokens": int64 (batch, time);
        "targets": int64 (batch, time), the token to predict AT each position, that is, after it; -100 is ignored.
            Without it, each position's target is the token that follows in the row;
        "segments": int64 (batch, time), which document of a packed row a token belongs to; 0 is padding. Nothing is
            learned at padding, nor across the border of two documents;
        "positions", "target_positions": int64 (batch, time), where tokens stand, and which position each is to predict:
            for rows that are not in order (`nn.TargetPlacement`). With target positions there must be "targets".
    model: model(tokens) -> logits (batch, time, vocab), or an object that has them as `.logits`; it is called with a
        placement where the batch describes one.
    Raises TypeError or ValueError when the batch is not like that.
    """
    tokens, targets, placement = _parts(batch)
    output = model(tokens) if placement is None else model(tokens, placement)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.dim() != 3:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            f"the model returned {got} for tokens {tuple(tokens.shape)}; logits (batch, time, vocab) are needed"
        )
    wanted = next_targets(tokens, targets, None if placement is None else placement.segments)
    cross_entropy = cross_entropy_sum if logits.numel() >= LEAN_FROM else plain_cross_entropy_sum
    return cross_entropy(logits.flatten(0, 1), wanted.flatten()), (wanted != IGNORED).sum()


def _parts(batch: Any) -> tuple[Tensor, Tensor | None, Placement | None]:
    if isinstance(batch, Tensor):
        batch = {"tokens": batch}
    if not isinstance(batch, Mapping) or "tokens" not in batch:
        raise TypeError(
            f"the batch is {type(batch).__name__}; next_token_loss needs int64 tokens (batch, time), "
            'or a mapping with "tokens" and, if wanted, "targets" and "segments"'
        )
    tokens, targets = batch["tokens"], batch.get("targets")
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens is {tokens.dtype} {tuple(tokens.shape)}; int64 (batch, time) is needed")
    placement = Placement.from_batch(batch)
    where = {} if placement is None else {name: batch[name] for name in vars(placement) if batch.get(name) is not None}
    for name, other in (("targets", targets), *where.items()):
        if other is not None and other.shape != tokens.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}, tokens {tuple(tokens.shape)}; they must be equal")
    if "target_positions" in where and targets is None:
        raise ValueError('the batch has "target_positions"; "targets" must say which tokens stand there')
    return tokens, targets, placement


def next_targets(
    tokens: Int[Tensor, "batch time"],
    targets: Int[Tensor, "batch time"] | None,
    segments: Int[Tensor, "batch time"] | None,
) -> Int[Tensor, "batch time"]:
    """What each position is to predict; -100 where nothing, as at padding and at the end of each document."""
    if targets is None:
        targets = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    if segments is not None:
        follows = functional.pad(segments[:, 1:] == segments[:, :-1], (0, 1), value=True)
        targets = targets.masked_fill(~follows | (segments == 0), IGNORED)
    return targets


def smoothed_cross_entropy_sum(
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    smoothing: float = 0.1,
    excluded: tuple[int, ...] = (),
) -> Float[Tensor, ""]:
    """Sum of -sum_v q_v log p_v over rows whose target is not -100 (Szegedy et al. 2015, arXiv:1512.00567).

    q is 1 - smoothing on the target, and smoothing / K more on each of the K tokens that are not `excluded` (padding,
    which no target ever is, should get nothing). Raises ValueError for smoothing outside [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    kept = targets != IGNORED
    logs = logits[kept].to(_wide(logits)).log_softmax(-1)
    allowed = torch.ones(logs.shape[1], dtype=torch.bool, device=logs.device)
    allowed[list(excluded)] = False
    picked = logs.gather(1, targets[kept][:, None]).sum()
    return -(1 - smoothing) * picked - smoothing * logs[:, allowed].mean(1).sum()


def cross_entropy_sum(logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Sum of -log softmax(logits)[target] over rows whose target is not -100, in float32 or wider.

    Equal to `plain_cross_entropy_sum`, but what it keeps for the backward pass is one number a row: the softmax is
    computed again there, chunk by chunk, straight into the gradient in the dtype of the logits.
    """
    loss: Tensor = _CrossEntropySum.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


def plain_cross_entropy_sum(logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Sum of `cross_entropy_sum` by torch's own function, which keeps a float32 log-softmax of all logits."""
    return functional.cross_entropy(logits.to(_wide(logits)), targets, ignore_index=IGNORED, reduction="sum")


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunk_rows(logits: Tensor) -> int:
    return max(1, CHUNK.get(logits.device.type, DEVICE_CHUNK) // logits.shape[1])


class _CrossEntropySum(torch.autograd.Function):
    """sum_i (logsumexp(z_i) - z_i[target_i]); its gradient is softmax(z_i) - onehot(target_i)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        kept = targets != IGNORED
        index = torch.where(kept, targets, 0)
        wide, rows = _wide(logits), _chunk_rows(logits)
        normalizer = torch.cat([chunk.to(wide).logsumexp(dim=1) for chunk in logits.split(rows)])
        picked = logits.gather(1, index[:, None]).squeeze(1).to(wide)
        ctx.save_for_backward(logits, index, kept, normalizer)
        return torch.where(kept, normalizer - picked, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        logits, index, kept, normalizer = ctx.saved_tensors
        gradient, rows = torch.empty_like(logits), _chunk_rows(logits)
        weight = above[0] * kept
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            probability = (logits[part].to(normalizer.dtype) - normalizer[part, None]).exp_()
            probability.scatter_add_(
                1, index[part, None], probability.new_full((1, 1), -1.0).expand(len(probability), 1)
            )
            probability *= weight[part, None]
            probability[~kept[part]] = 0  # also where such a row's logits are not finite
            gradient[part] = probability
        return gradient, None
