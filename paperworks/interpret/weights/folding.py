"""Weight processing: copies of a model that compute the same, with weights that are easier to read (Nanda 2022).

Every function returns a copy and leaves the model alone. They chain: `fold_value_biases(fold_norms(model))`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paperworks.core.linear import bias_of, is_transposed, weight_of

Model = TypeVar("Model", bound=nn.Module)

# Which linear layers read each norm's output, by the name of the norm: ours, then Llama's in transformers.
_BLOCK_READERS = {
    "mixer_norm": ("mixer.query", "mixer.key", "mixer.value"),
    "feedforward_norm": ("feedforward.gate", "feedforward.up"),
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_FINAL_READERS = {"norm": ("unembedding",), "model.norm": ("lm_head",)}


def norm_readers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """{path of a norm: paths of the linear layers that read it} of a pre-norm decoder.

    Raises:
        ValueError: for a model whose norms are read by something else than linear layers, or are not found.
    """
    modules = dict(model.named_modules())
    found: dict[str, tuple[str, ...]] = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        arrangement = getattr(module, "arrangement", None)
        if arrangement is not None and not arrangement.plain_branches:
            raise ValueError(f"{path} is arranged as {arrangement}; only the norms of PreNorm() blocks can be folded")
        if name in _BLOCK_READERS and parent and not isinstance(module, nn.Identity):
            readers = tuple(f"{parent}.{leaf}" for leaf in _BLOCK_READERS[name] if f"{parent}.{leaf}" in modules)
            if not readers:
                raise ValueError(
                    f"{path} is read by {parent}'s own kind of mixer, whose linear layers are not known here"
                )
            found[path] = readers
        elif path in _FINAL_READERS and not isinstance(module, nn.Identity):
            found[path] = _FINAL_READERS[path]
    if not found:
        raise ValueError(
            f"found no norms of {type(model).__name__} and what reads them; pass readers={{'path.of.norm': ['path.of."
            "linear', ...]}"
        )
    return found


def _require_stored_weights(model: nn.Module) -> None:
    """Refuse layers whose weight is computed when asked for: what is written into it would be lost."""
    for path, module in model.named_modules():
        if callable(getattr(module, "decoded_weight", None)):
            raise ValueError(
                f"{path} ({type(module).__name__}) does not hold its weight as it is: merge adapters and decode weight "
                "formats first"
            )


@torch.no_grad()
def fold_norms(model: Model, readers: Mapping[str, Sequence[str]] | None = None) -> Model:
    """A copy whose norms have gain 1 and bias 0: W <- W diag(gain), b <- b + W bias in all that read them.

    A tied unembedding is untied first. Raises `ValueError` when `readers` is not given and not known, or a layer is
    adapted or compressed.
    """
    _require_stored_weights(model)
    folded = _untied(copy.deepcopy(model))
    for path, linears in (norm_readers(folded) if readers is None else readers).items():
        norm = folded.get_submodule(path)
        gain: Any = getattr(norm, "weight", None)
        shift: Any = getattr(norm, "bias", None)
        offset = bool(getattr(norm, "offset", False)) or type(norm).__name__.startswith("Gemma")
        for linear in map(folded.get_submodule, linears):
            weight = weight_of(linear)
            if shift is not None:
                _add_bias(linear, weight @ shift)
            if gain is not None:
                weight.mul_(1 + gain if offset else gain)
        if gain is not None:
            gain.fill_(0.0 if offset else 1.0)
        if shift is not None:
            shift.zero_()
    return folded


@torch.no_grad()
def centre_writes(model: Model) -> Model:
    """A copy in which everything written to the residual stream has mean 0 over its dimensions.

    LayerNorm subtracts that mean anyway, so a model whose norms are all LayerNorms computes the same.

    Raises:
        ValueError: when a norm is no LayerNorm, for which the function would change.
    """
    others = {
        type(module).__name__
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in ("mixer_norm", "feedforward_norm", "norm")
        and not isinstance(module, nn.LayerNorm)
    }
    if others or getattr(model, "norm", None) is None:
        raise ValueError(
            f"the stream's mean matters to {', '.join(sorted(others)) or 'a model without a final norm'}: "
            "writes can be centred only where every norm is a LayerNorm"
        )
    _require_stored_weights(model)
    centred = _untied(copy.deepcopy(model))
    for path, module in centred.named_modules():
        if isinstance(module, nn.Embedding):  # token embeddings, and learned positions, which are a table too
            module.weight.sub_(module.weight.mean(1, keepdim=True))
        elif getattr(module, "writes_residual", False) and path:
            weight, bias = weight_of(module), bias_of(module)
            weight.sub_(weight.mean(0, keepdim=True))
            if bias is not None:
                bias.sub_(bias.mean())
    return centred


@torch.no_grad()
def centre_unembedding(model: Model) -> Model:
    """A copy whose logits have mean 0 over the vocabulary: shifted by a constant, so log-softmax is the same."""
    _require_stored_weights(model)
    centred = _untied(copy.deepcopy(model))
    unembedding = _unembedding(centred)
    weight, bias = weight_of(unembedding), bias_of(unembedding)
    weight.sub_(weight.mean(0, keepdim=True))
    if bias is not None:
        bias.sub_(bias.mean())
    return centred


@torch.no_grad()
def fold_value_biases(model: Model) -> Model:
    """A copy whose value biases are 0: attention weights add up to 1, so they are part of the output's bias."""
    folded = copy.deepcopy(model)
    for module in folded.modules():
        value, output = getattr(module, "value", None), getattr(module, "output", None)
        bias = None if value is None else bias_of(value)
        if bias is None or output is None:
            continue
        groups = weight_of(output).shape[1] // len(bias)  # query heads that share a value head
        head_dim: Any = getattr(module, "head_dim", len(bias))
        shared = bias.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten()
        _add_bias(output, weight_of(output) @ shared)
        bias.zero_()
    return folded


def _unembedding(model: nn.Module) -> nn.Module:
    found = getattr(model, "unembedding", None) or getattr(model, "lm_head", None)
    if not isinstance(found, nn.Module):
        raise ValueError(f"{type(model).__name__} has neither `unembedding` nor `lm_head`")
    return found


def _untied(model: Model) -> Model:
    """Give the unembedding a weight of its own (in a copy)."""
    unembedding: Any = getattr(model, "unembedding", None)
    if unembedding is None:
        unembedding = getattr(model, "lm_head", None)
    tied = unembedding is not None and any(
        module is not unembedding and getattr(module, "weight", None) is unembedding.weight
        for module in model.modules()
    )
    if tied:
        unembedding.weight = nn.Parameter(unembedding.weight.detach().clone())
        spec: Any = getattr(model, "spec", None)
        if getattr(spec, "tied", False):
            model.spec = replace(spec, tied=False)
    return model


def _add_bias(linear: nn.Module, addition: Tensor) -> None:
    bias = bias_of(linear)
    if bias is not None:
        bias.add_(addition)
    elif isinstance(linear, nn.Linear) and not is_transposed(linear):
        linear.bias = nn.Parameter(addition.clone())
    else:
        raise ValueError(
            f"{type(linear).__name__} has no bias and none can be added; convert it to a plain linear first"
        )
