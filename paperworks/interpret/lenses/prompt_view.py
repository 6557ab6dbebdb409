"""One prompt, looked at from all sides: logit lens, attention, direct logit attribution and neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from paperworks.core.linear import weight_of
from paperworks.core.selection import select
from paperworks.interpret.lenses.logit_lens import logit_lens
from paperworks.interpret.residual import decompose, frozen_norm, residual_stream
from paperworks.interpret.taps import record

LIKELIEST = 8  # tokens kept of each reading of the stream
NEURONS = 12  # kept of each position


@dataclass(frozen=True)
class Neuron:
    """A unit of a feed-forward part at one position: its activation, and what it adds to the answer's logit."""

    path: str
    unit: int
    activation: float
    effect: float


@dataclass(frozen=True)
class PromptView:
    """What a model makes of one prompt.

    Attributes:
        tokens: the prompt.
        lens_tokens, lens_probabilities: (depth + 1, time, likeliest), the likeliest next tokens if the stream were read
            after so many blocks; the last row is what the model predicts.
        answer_probabilities, answer_ranks: (depth + 1, time), of the token that the model predicts in the end, in each
            of these readings; rank 1 is the likeliest.
        patterns: by path of the mixer, attention weights (heads, query, key) in 255ths of the largest of a row.
        components: the parts that write to the stream, heads apart ("blocks.3.mixer.heads.1", "blocks.3.feedforward").
        effects: (components, time), what each adds to the logit of the likeliest next token, above its mean over the
            vocabulary; the final norm is frozen, so that a column adds up to that logit.
        neurons: for each position those with the largest effects, either sign.
    """

    tokens: Int[Tensor, " time"]
    lens_tokens: Int[Tensor, "readings time likeliest"]
    lens_probabilities: Float[Tensor, "readings time likeliest"]
    answer_probabilities: Float[Tensor, "readings time"]
    answer_ranks: Int[Tensor, "readings time"]
    patterns: dict[str, UInt8[Tensor, "heads query key"]]
    components: tuple[str, ...]
    effects: Float[Tensor, "components time"]
    neurons: tuple[tuple[Neuron, ...], ...]


@torch.no_grad()
def prompt_view(model: nn.Module, tokens: Int[Tensor, " time"]) -> PromptView:
    """Look at one prompt.

    Args:
        model: one of our decoders, pre-norm, in evaluation mode.
        tokens: int64 ids (time,).

    Raises:
        ValueError: for a batch, an empty prompt, a model whose logits are no sum of parts (see `residual_stream`).
    """
    if tokens.dim() != 1 or not len(tokens):
        raise ValueError(f"one prompt is tokens of shape (time,), at least one; got {tuple(tokens.shape)}")
    if getattr(getattr(model, "spec", None), "logit_soft_cap", None) is not None:
        raise ValueError("the model caps its logits with a tanh (logit_soft_cap), so they are no sum of parts")
    batch = tokens[None]
    where = residual_stream(model)
    answers = model(batch)[0].argmax(-1)
    readings = logit_lens(model, batch, lambda logits: _reading(logits[0].float().softmax(-1), answers))
    lens_tokens, lens_probabilities, answer_probabilities, answer_ranks = map(torch.stack, zip(*readings, strict=True))
    modules = dict(model.named_modules())
    taps = [path for path in modules if path.endswith((".mixer.pattern", ".feedforward.hidden"))]
    with record(model, taps) if taps else record(model, where.start) as seen:
        parts = decompose(model, batch, heads=any(path.endswith(".heads") for path in modules))
    norm = None if where.norm is None else modules[where.norm]
    linear, bias = frozen_norm(norm, parts.final)
    unembedding = weight_of(modules[where.unembedding])
    direction = unembedding[answers] - unembedding.mean(0)  # (time, dim)
    effects = torch.stack([(linear(part)[0] * direction).sum(-1) for part in parts.parts])
    names = parts.names
    if bias is not None:
        names, effects = (*names, "norm.bias"), torch.cat((effects, (direction @ bias)[None]))
    return PromptView(
        tokens,
        lens_tokens,
        lens_probabilities,
        answer_probabilities,
        answer_ranks,
        {path.removesuffix(".pattern"): _bytes(seen[path][0]) for path in taps if path.endswith(".pattern")},
        names,
        effects,
        _neurons(
            model,
            {path.removesuffix(".hidden"): seen[path][0] for path in taps if path.endswith(".hidden")},
            _toward(linear, parts.final, direction),
        ),
    )


def _reading(
    shares: Float[Tensor, "time vocab"], answers: Int[Tensor, " time"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The likeliest tokens, their probabilities, and probability and rank of the answer at each position."""
    likeliest = shares.topk(LIKELIEST)
    answer = shares.gather(1, answers[:, None])
    return likeliest.indices, likeliest.values, answer[:, 0], 1 + (shares > answer).sum(1)


def _bytes(pattern: Float[Tensor, "heads query key"]) -> UInt8[Tensor, "heads query key"]:
    return (255 * pattern / pattern.amax(-1, keepdim=True).clamp(min=1e-9)).round().to(torch.uint8).cpu()


def _toward(linear: Callable[[Tensor], Tensor], final: Tensor, direction: Tensor) -> Float[Tensor, "time dim"]:
    """What a unit vector written at a position adds to its answer's logit: the gradient of a linear map."""
    with torch.enable_grad():
        written = torch.zeros_like(final, requires_grad=True)
        (gradient,) = torch.autograd.grad((linear(written)[0] * direction).sum(), written)
    return gradient[0]


def _neurons(
    model: nn.Module, hidden: dict[str, Float[Tensor, "time units"]], toward: Float[Tensor, "time dim"]
) -> tuple[tuple[Neuron, ...], ...]:
    """Return, for each position, the units with the largest effects on the answer's logit."""
    found: list[list[Neuron]] = [[] for _ in range(len(toward))]
    for path, activation in hidden.items():
        (down,) = select(model, f"{path}.down").values()
        effect = activation * (toward @ weight_of(down))
        best = effect.abs().topk(min(NEURONS, effect.shape[1]), dim=1).indices
        for time, units in enumerate(best.tolist()):
            found[time] += [
                Neuron(path, unit, float(activation[time, unit]), float(effect[time, unit])) for unit in units
            ]
    return tuple(tuple(sorted(some, key=lambda neuron: -abs(neuron.effect))[:NEURONS]) for some in found)
