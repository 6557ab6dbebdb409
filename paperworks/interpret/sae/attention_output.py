"""Features of attention's output, and where they come from: which head, which position, what stood there.

Kissane, Krzyzanowski, Bloom, Conmy, Nanda 2024, arXiv:2406.17759. The autoencoder reads the heads' outputs side by
side, before the output projection, so that every part of a feature belongs to one head; with the patterns held fixed
all of it is linear in the values, and those in the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret.sae.autoencoder import SparseAutoencoder


def merged_heads(heads: Float[Tensor, "batch time heads head_dim"]) -> Float[Tensor, "batch time all"]:
    """Put the heads' outputs side by side: what an attention-output autoencoder reads (`Activations(read=...)`)."""
    if heads.dim() != 4:
        raise ValueError(f"heads must be (batch, time, heads, head_dim), got shape {tuple(heads.shape)}")
    return heads.flatten(2)


@torch.no_grad()
def head_shares(sae: SparseAutoencoder, heads: int) -> Float[Tensor, "latents heads"]:
    """For each feature ||its decoder row in the slice of head k|| / the sum of these over heads."""
    norms = _by_head(sae.decoder, heads).norm(dim=-1)
    out: Tensor = norms / norms.sum(dim=1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    return out


class HeadAttribution(NamedTuple):
    """Parts of one feature's pre-activation at one position; all of them and `constant` add up to it.

    sources: by head and source position, A_k[t, s] v_k(s) . W_enc[slice k]. heads: the same, summed over sources.
    constant: what does not depend on the heads, b_enc - b_dec . W_enc.
    """

    sources: Float[Tensor, "heads source"]
    heads: Float[Tensor, " heads"]
    constant: float


@torch.no_grad()
def attribute_to_heads(
    sae: SparseAutoencoder,
    latent: int,
    position: int,
    pattern: Float[Tensor, "heads query source"],
    values: Float[Tensor, "source kv_heads head_dim"],
) -> HeadAttribution:
    """Attribute a feature's pre-activation directly to heads and source positions (DFA).

    Args:
        sae: reads the heads' outputs side by side.
        latent, position: the feature, and the query position t.
        pattern: attention weights of one sequence, as the tap `pattern` gives them.
        values: of one sequence, before attention; heads that share one (grouped queries) are next to each other.

    Raises ValueError when shapes do not fit.
    """
    heads, kv_heads = pattern.shape[0], values.shape[1]
    row = _encoder_row(sae, latent, heads)
    if heads % kv_heads or row.shape[1] != values.shape[2] or pattern.shape[2] != values.shape[0]:
        raise ValueError(
            f"pattern {tuple(pattern.shape)}, values {tuple(values.shape)} and activations of size {sae.dim} do not "
            "fit: (heads, query, source), (source, kv_heads, head_dim) and heads * head_dim are needed"
        )
    shared = values.repeat_interleave(heads // kv_heads, dim=1)
    sources = pattern[:, position] * torch.einsum("shd,hd->hs", shared.to(row.dtype), row)
    return HeadAttribution(sources, sources.sum(dim=1), float(_constant(sae)[latent]))


@torch.no_grad()
def through_values(
    sae: SparseAutoencoder,
    latent: int,
    position: int,
    pattern: Float[Tensor, "heads query source"],
    value_weight: Float[Tensor, "kv_heads*head_dim dim"],
    components: Mapping[str, Float[Tensor, "source dim"]],
    scale: Float[Tensor, " source"] | None = None,
) -> dict[str, Float[Tensor, "heads source"]]:
    """Go one step up (RDFA): attribute a feature to the components that add up to the residual stream of each source.

    A_k[t, s] scale(s) c(s) . (W_V,k^T W_enc[slice k]), with the pattern and the norm's scale held fixed. The parts of
    all components add up to `attribute_to_heads(...).sources` when the components add up to the stream. A component
    may be anything: the embedding, an earlier layer's output, one earlier feature's f_j D_j W_O.

    Args:
        sae, latent, position, pattern: see `attribute_to_heads`.
        value_weight: of the value projection, with the norm's gain folded in.
        components: by name, what each adds to the residual stream at every source position.
        scale: what the norm divides by, inverted, (source,); None where there is no norm.
    """
    row = _encoder_row(sae, latent, pattern.shape[0])
    kv_heads = value_weight.shape[0] // row.shape[1]
    if not kv_heads or value_weight.shape[0] % row.shape[1] or len(row) % kv_heads:
        raise ValueError(
            f"the value weight {tuple(value_weight.shape)} does not hold whole heads of {row.shape[1]} channels "
            f"for {len(row)} query heads"
        )
    by_head = value_weight.unflatten(0, (kv_heads, -1)).repeat_interleave(len(row) // kv_heads, dim=0)
    readers = torch.einsum("hed,he->hd", by_head.to(row.dtype), row)
    attention = pattern[:, position] if scale is None else pattern[:, position] * scale
    return {name: attention * (readers @ value.to(row.dtype).T) for name, value in components.items()}


def _by_head(rows: Tensor, heads: int) -> Tensor:
    if heads < 1 or rows.shape[-1] % heads:
        raise ValueError(f"activations of size {rows.shape[-1]} are not the outputs of {heads} heads side by side")
    out: Tensor = rows.unflatten(-1, (heads, -1))
    return out


def _encoder_row(sae: SparseAutoencoder, latent: int, heads: int) -> Float[Tensor, "heads head_dim"]:
    if not 0 <= latent < sae.latents:
        raise ValueError(f"latent {latent} is not one of the {sae.latents}, counted from 0")
    return _by_head(sae.encoder[latent], heads)


def _constant(sae: SparseAutoencoder) -> Float[Tensor, " latents"]:
    """The pre-activations of an input of zeros; a gated one's are those of its gate."""
    moved = deepcopy(sae)
    moved.recentre(torch.zeros_like(moved.decoder_bias))
    return moved.get_parameter(moved.latent_biases()[0])
