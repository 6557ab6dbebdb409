"""The residual stream as a sum: what each part of a model wrote into it (Elhage et al. 2021, Nanda 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.linear import bias_of, weight_of
from paperworks.interpret.taps import record


@dataclass(frozen=True)
class ResidualStream:
    """Where the residual stream of a model is, as module paths.

    Attributes:
        start: the module whose output the stream begins with (embedding and positions).
        blocks: the modules whose outputs are the stream after each block.
        writers: the modules whose outputs are added to it, in order.
        norm: the final norm, or None.
        unembedding: the linear layer that gives the logits.
    """

    start: str
    blocks: tuple[str, ...]
    writers: tuple[str, ...]
    norm: str | None
    unembedding: str


# By the path of the list of blocks: (start, mixer, feed-forward, final norm, unembedding) of other libraries' decoders.
_FOREIGN = {
    "model.layers": ("model.embed_tokens", "self_attn", "mlp", "model.norm", "lm_head"),  # Llama and its relatives
    "transformer.h": ("transformer.drop", "attn", "mlp", "transformer.ln_f", "lm_head"),  # GPT-2
    "gpt_neox.layers": ("gpt_neox.emb_dropout", "attention", "mlp", "gpt_neox.final_layer_norm", "lm_head"),
}


def residual_stream(model: nn.Module) -> ResidualStream:
    """Find the residual stream of one of our decoders, or of a transformers model built like Llama, GPT-2 or NeoX.

    Raises:
        ValueError: for a post-norm model, whose stream is not a sum, and for a model of unknown structure (give a
            `ResidualStream` of your own to the functions that ask for one).
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleList) and hasattr(model, "unembedding"):
        return _ours(model, blocks)
    modules = dict(model.named_modules())
    for path, (start, mixer, feedforward, norm, unembedding) in _FOREIGN.items():
        if path in modules and all(name in modules for name in (start, norm, unembedding)):
            layers = [f"{path}.{index}" for index in range(len(modules[path]))]
            writers = [f"{layer}.{part}" for layer in layers for part in (mixer, feedforward)]
            if all(writer in modules for writer in writers) and "post_feedforward_layernorm" not in {
                name.rpartition(".")[2] for name in modules
            }:
                return ResidualStream(start, tuple(layers), tuple(writers), norm, unembedding)
    raise ValueError(
        f"do not know where the residual stream of {type(model).__name__} is; pass a ResidualStream(start=..., "
        "blocks=..., writers=..., norm=..., unembedding=...) of module paths, or convert the model with "
        "paperworks.checkpoints.from_transformers"
    )


def _ours(model: nn.Module, blocks: nn.ModuleList) -> ResidualStream:
    writers: list[str] = []
    for index, block in enumerate(blocks):
        arrangement = getattr(block, "arrangement", None)
        if arrangement is not None and not arrangement.sums_branches:
            raise ValueError(
                f"block {index} is arranged as {arrangement}: its stream is not a sum of what the parts wrote; only "
                "blocks that add their parts (PreNorm, Parallel, Sandwich) can be decomposed"
            )
        for part in ("mixer", "feedforward"):
            if getattr(block, part, None) is not None:
                after = getattr(block, f"{part}_post_norm", None) is not None
                writers.append(f"blocks.{index}.{part}_post_norm" if after else f"blocks.{index}.{part}")
    layers = tuple(f"blocks.{index}" for index in range(len(blocks)))
    norm = "norm" if getattr(model, "norm", None) is not None else None
    return ResidualStream("dropout", layers, tuple(writers), norm, "unembedding")


def head_outputs(
    heads: Float[Tensor, "batch time heads head_dim"], output: nn.Module
) -> Float[Tensor, "batch time heads dim"]:
    """What each head writes to the stream: head h times its columns of the output projection, without its bias.

    Args:
        heads: recorded from `blocks.6.mixer.heads`.
        output: the linear-like module `blocks.6.mixer.output`.
    """
    weight = weight_of(output)
    if heads.dim() != 4 or heads.shape[2] * heads.shape[3] != weight.shape[1]:
        raise ValueError(
            f"heads must be (batch, time, heads, head_dim) with heads x head_dim = {weight.shape[1]}, the inputs of "
            f"the "
            f"output projection; got {tuple(heads.shape)}. Record `blocks.N.mixer.heads`"
        )
    return torch.einsum("bthe,dhe->bthd", heads, weight.unflatten(1, heads.shape[2:]))


@dataclass(frozen=True)
class Decomposition:
    """The final residual stream as a sum of named parts: `final` = `parts`.sum(0)."""

    names: tuple[str, ...]
    parts: Float[Tensor, "parts batch time dim"]
    final: Float[Tensor, "batch time dim"]

    def __getitem__(self, name: str) -> Float[Tensor, "batch time dim"]:
        """One part by name."""
        if name not in self.names:
            from paperworks.core.errors import unknown

            raise KeyError(unknown("part of the residual stream", name, self.names))
        return self.parts[self.names.index(name)]


@torch.no_grad()
def decompose(
    model: nn.Module,
    tokens: Int[Tensor, "batch time"],
    *,
    heads: bool = False,
    stream: ResidualStream | None = None,
    **options: Any,
) -> Decomposition:
    """Run the model and return what each part wrote into the final residual stream.

    Parts are named by their module path ("embedding" for the start); with `heads`, attention is split into
    "blocks.6.mixer.heads.2" and, where the output projection has a bias, "blocks.6.mixer.bias".

    Args:
        model: in evaluation mode; one of ours, or one that `residual_stream` knows.
        tokens: int64 ids.
        heads: whether to split attention into heads (our models).
        stream: where the residual stream is, for other models.
        options: further arguments of the model (segments, say).

    Raises:
        ValueError: when the parts do not add up to the stream: the paths are wrong, or dropout is active.
    """
    where = stream or residual_stream(model)
    taps = [f"{path}.heads" for path in where.writers] if heads else []
    modules = dict(model.named_modules())
    taps = [tap for tap in taps if tap in modules]
    if heads and not taps:
        raise ValueError(
            f"{type(model).__name__} has no taps named `heads`; convert it with "
            "paperworks.checkpoints.from_transformers, or ask without heads=True"
        )
    with record(model, list(dict.fromkeys([where.start, *where.writers, where.blocks[-1], *taps]))) as seen:
        model(tokens, **options)
    names, parts = ["embedding"], [seen[where.start]]
    for path in where.writers:
        if f"{path}.heads" in taps:
            output = modules[f"{path}.output"]
            each = head_outputs(seen[f"{path}.heads"], output)
            names += [f"{path}.heads.{head}" for head in range(each.shape[2])]
            parts += list(each.unbind(2))
            bias = bias_of(output)
            if bias is not None:
                names.append(f"{path}.bias")
                parts.append(bias.expand_as(seen[path]))
        else:
            names.append(path)
            parts.append(seen[path])
    stacked, final = torch.stack(parts), seen[where.blocks[-1]]
    apart = (stacked.sum(0) - final).abs().max()
    if apart > 1e-3 * final.abs().max():  # rounding of some hundred float32 additions stays far below
        raise ValueError(
            f"the parts of {type(model).__name__} add up to another stream (off by {apart:.2g} of "
            f"{final.abs().max():.2g}):"
            " is the model in training mode with dropout, or are the paths of the ResidualStream wrong?"
        )
    return Decomposition(tuple(names), stacked, final)


def frozen_norm(
    norm: nn.Module | None, final: Float[Tensor, "batch time dim"]
) -> tuple[Callable[[Tensor], Tensor], Float[Tensor, " dim"] | None]:
    """The norm with its statistics frozen at `final`, which makes it linear, and its bias apart.

    RMSNorm: x -> x / rms(final) * gain. LayerNorm: x -> (x - mean(x)) / std(final) * gain, bias. For every split of
    `final` into parts, norm(final) = sum of linear(part) + bias.

    Raises:
        ValueError: when `norm` is of no kind known here (checked against what it returns for `final`).
    """
    if norm is None or isinstance(norm, nn.Identity):
        return (lambda x: x), None
    gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0)) or 0.0
    factor = torch.ones(final.shape[-1]).to(final) if gain is None else gain
    if getattr(norm, "offset", False) or type(norm).__name__.startswith("Gemma"):
        factor = 1 + factor
    for centred in (isinstance(norm, nn.LayerNorm), not isinstance(norm, nn.LayerNorm)):
        kept = final - final.mean(-1, keepdim=True) if centred else final
        scale = torch.rsqrt(kept.square().mean(-1, keepdim=True) + eps)

        def linear(x: Tensor, centred: bool = centred, scale: Tensor = scale) -> Tensor:
            return (x - x.mean(-1, keepdim=True) if centred else x) * scale * factor

        whole = linear(final) if bias is None else linear(final) + bias
        expected = norm.forward(final)
        if (whole - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1e-30):
            return linear, bias
    raise ValueError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm with a gain that is known here")
