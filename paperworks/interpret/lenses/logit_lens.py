"""Reading logits off the middle of a model: the logit lens (nostalgebraist 2020) and direct logit attribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.linear import bias_of, weight_of
from paperworks.interpret.residual import Decomposition, ResidualStream, decompose, frozen_norm, residual_stream
from paperworks.interpret.taps import record


@torch.no_grad()
def logit_lens(
    model: nn.Module,
    tokens: Int[Tensor, "batch time"],
    keep: Callable[[Float[Tensor, "batch time vocab"]], Any] | None = None,
    *,
    stream: ResidualStream | None = None,
    **options: Any,
) -> list[Any]:
    """unembed(norm(stream after n blocks)) for n = 0 .. depth; the last equals the model's own logits.

    Args:
        model: one of ours, or one that `residual_stream` knows.
        tokens: int64 ids.
        keep: what to keep of each logits tensor, such as `lambda logits: logits.argmax(-1)`; None keeps all of it
            (depth + 1 tensors of batch x time x vocab).
        stream: where the residual stream is, for other models.
        options: further arguments of the model.
    """
    where = stream or residual_stream(model)
    with record(model, [where.start, *where.blocks]) as seen:
        model(tokens, **options)
    norm = nn.Identity() if where.norm is None else model.get_submodule(where.norm)
    own = getattr(model, "logits", None)  # applies the soft cap of models that have one
    read = own if callable(own) else model.get_submodule(where.unembedding)
    found = []
    for path in (where.start, *where.blocks):
        logits = cast(Tensor, read(norm(seen.pop(path))))
        found.append(logits if keep is None else keep(logits))
    return found


@dataclass(frozen=True)
class LogitAttribution:
    """How much each part of the residual stream adds to a logit, or to the difference of two.

    Attributes:
        names: the parts, as in `Decomposition`, then "norm.bias" and "unembedding.bias" where there are any.
        values: (parts, batch); adds up to `total` over the parts.
        total: (batch,) the logit (difference) itself, from the model's output.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "parts batch"]
    total: Float[Tensor, " batch"]

    def ranked(self, most: int = 10) -> list[tuple[str, float]]:
        """The parts with the largest mean effect, either sign, largest first."""
        mean = self.values.mean(1)
        return [
            (self.names[index], mean[index].item()) for index in mean.abs().argsort(descending=True)[:most].tolist()
        ]


@torch.no_grad()
def direct_logit_attribution(
    model: nn.Module,
    tokens: Int[Tensor, "batch time"],
    answer: Int[Tensor, " batch"],
    against: Int[Tensor, " batch"] | None = None,
    *,
    at: int | Int[Tensor, " batch"] = -1,
    heads: bool = True,
    stream: ResidualStream | None = None,
    **options: Any,
) -> LogitAttribution:
    """Each part's direct effect on a logit: norm(part) . (W_U[answer] - W_U[against]), the final norm frozen.

    The norm's statistics are those of the whole stream, the same for all parts, so the parts add up to the logit.

    Args:
        model: one of ours, or one that `residual_stream` knows; without a soft cap on its logits.
        tokens: int64 ids.
        answer, against: one token a row; without `against` it is the logit of `answer` alone.
        at: the position whose logits are read, one for all rows or one a row.
        heads: whether to split attention into heads (our models).
        stream: where the residual stream is, for other models.
        options: further arguments of the model.

    Raises:
        ValueError: when the answers do not match the batch, or a soft cap makes the logits no sum.
    """
    where = stream or residual_stream(model)
    for name, given in (("answer", answer), ("against", against)):
        if given is not None and given.shape != tokens.shape[:1]:
            raise ValueError(f"{name} must be one token a row, ({tokens.shape[0]},); got {tuple(given.shape)}")
    if getattr(getattr(model, "spec", None), "logit_soft_cap", None) is not None:
        raise ValueError("the model caps its logits with a tanh (logit_soft_cap), so they are no sum of parts")
    parts: Decomposition = decompose(model, tokens, heads=heads, stream=where, **options)
    rows = torch.arange(len(tokens), device=tokens.device)
    place = torch.as_tensor(at, device=tokens.device).expand(len(tokens))
    final = parts.final[rows, place][:, None]
    linear, norm_bias = frozen_norm(None if where.norm is None else model.get_submodule(where.norm), final)
    unembedding = model.get_submodule(where.unembedding)
    weight, bias = weight_of(unembedding), bias_of(unembedding)
    direction = weight[answer] - (0 if against is None else weight[against])
    values = [(linear(part[rows, place][:, None])[:, 0] * direction).sum(-1) for part in parts.parts]
    names = list(parts.names)
    if norm_bias is not None:
        names.append("norm.bias")
        values.append(direction @ norm_bias)
    if bias is not None:
        names.append("unembedding.bias")
        values.append(bias[answer] - (0 if against is None else bias[against]))
    norm = nn.Identity() if where.norm is None else model.get_submodule(where.norm)
    logits = unembedding(norm(final))[:, 0]
    total = logits[rows, answer] - (0 if against is None else logits[rows, against])
    return LogitAttribution(tuple(names), torch.stack(values), total)
