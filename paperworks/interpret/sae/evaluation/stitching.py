"""Features of one autoencoder put into another: which are new, and what lies between a small and a large dictionary.

Bussmann, Leask, Bloom, Tigges, Nanda 2024, "Stitching SAEs of different sizes" (Alignment Forum).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.sae.evaluation.directions import unit_rows
from paperworks.interpret.sae.kinds.topk import TopKAutoencoder


@torch.no_grad()
def nearest_cosines(large: SparseAutoencoder, small: SparseAutoencoder) -> Float[Tensor, " latents"]:
    """For each feature of `large` its largest cosine with a feature of `small`: low is novel.

    The authors call a feature novel below 0.7 and a reconstruction feature above; the value is theirs for GPT-2's
    residual stream, `insertion_effects` says what it should be elsewhere.
    """
    _require_alike(small, large)
    return (unit_rows(large.decoder) @ unit_rows(small.decoder).T).amax(dim=1)


@torch.no_grad()
def insertion_effects(
    small: SparseAutoencoder, large: SparseAutoencoder, x: Float[Tensor, "batch dim"]
) -> Float[Tensor, " latents"]:
    """For each feature of `large` the change of small's mean ||x - x'||^2 when it alone is put into `small`.

    mean(f_i^2) ||d_i||^2 - 2 mean(f_i d_i . (x - x')): negative for what `small` lacks.
    """
    _require_alike(small, large)
    x = small.check(x)
    latents, missing = large.encode(x), x - small(x)
    out: Tensor = (
        latents.square() * large.decoder.square().sum(dim=1) - 2 * latents * (missing @ large.decoder.T)
    ).mean(dim=0)
    return out


@torch.no_grad()
def stitch(
    small: SparseAutoencoder,
    large: SparseAutoencoder,
    add: Int[Tensor, " added"] | Bool[Tensor, " latents"],
    remove: Int[Tensor, " removed"] | Bool[Tensor, " small_latents"] | None = None,
    *,
    bias: Float[Tensor, " dim"] | None = None,
) -> SparseAutoencoder:
    """A new autoencoder: small's features without `remove`, and large's features `add`.

    Every feature stays the function of x that it was; the decoder's bias is small's, or `bias`.

    Raises ValueError for two of different kinds or sizes of activations, and for TopK, where an added feature changes
    which others are on.
    """
    _require_alike(small, large)
    bias = small.decoder_bias.detach().clone() if bias is None else bias
    kept = torch.ones(small.latents, dtype=torch.bool)
    if remove is not None:
        kept[remove] = False
    parts = [deepcopy(small), deepcopy(large)]
    for part in parts:
        part.recentre(bias)
    rows = {
        name: torch.cat([parts[0].get_parameter(name)[kept], parts[1].get_parameter(name)[add]])
        for name, parameter in small.named_parameters()
        if parameter.shape[0] == small.latents and name != "decoder_bias"
    }
    if not len(rows["decoder"]):
        raise ValueError("nothing is left: every feature is removed and none added")
    made = replace(small.spec, latents=len(rows["decoder"])).build(small.dim).to(small.decoder)
    for name, value in rows.items():
        made.get_parameter(name).copy_(value)
    made.decoder_bias.copy_(bias)
    return made.train(small.training)


class Group(NamedTuple):
    """Features that stand for each other in two dictionaries: one for one, or split."""

    small: Int[Tensor, " some"]
    large: Int[Tensor, " others"]


@torch.no_grad()
def groups(small: SparseAutoencoder, large: SparseAutoencoder, threshold: float) -> list[Group]:
    """The connected components of the graph that joins features with a cosine above the threshold.

    Features of `small` that are joined to nothing come as groups without a counterpart; novel ones of `large` do not.
    """
    _require_alike(small, large)
    joined = unit_rows(large.decoder) @ unit_rows(small.decoder).T > threshold
    owner = list(range(small.latents))  # union-find over small's features; large's join them

    def root(index: int) -> int:
        while owner[index] != index:
            owner[index] = owner[owner[index]]
            index = owner[index]
        return index

    links = [row.nonzero().flatten().tolist() for row in joined]
    for link in links:
        for other in link[1:]:
            owner[root(other)] = root(link[0])
    members: dict[int, tuple[list[int], list[int]]] = {}
    for index in range(small.latents):
        members.setdefault(root(index), ([], []))[0].append(index)
    for index, link in enumerate(links):
        if link:
            members[root(link[0])][1].append(index)
    return [Group(torch.tensor(ours), torch.tensor(theirs, dtype=torch.int64)) for ours, theirs in members.values()]


def interpolate(
    small: SparseAutoencoder, large: SparseAutoencoder, threshold: float, x: Float[Tensor, "batch dim"], stride: int = 1
) -> Iterator[SparseAutoencoder]:
    """Give the autoencoders on the way from `small` to `large`, both included.

    First the novel features are added, the one that helps most first; then each group of counterparts is swapped.
    The decoder's bias goes along in proportion to the features that were put in. `stride`: changes between two that
    are given.
    """
    if stride < 1:
        raise ValueError(f"stride is {stride}; 1 or more changes between two autoencoders are needed")
    novel = (nearest_cosines(large, small) <= threshold).nonzero().flatten()
    order = novel[insertion_effects(small, large, x)[novel].argsort()]
    swaps = groups(small, large, threshold)
    changes = [(order[index : index + 1], order[:0]) for index in range(len(order))]
    changes += [(group.large, group.small) for group in swaps]
    put, gone = order[:0], order[:0]
    yield stitch(small, large, put)
    for count, (added, removed) in enumerate(changes, start=1):
        put, gone = torch.cat([put, added]), torch.cat([gone, removed])
        if count % stride and count < len(changes):
            continue
        share = len(put) / large.latents if count < len(changes) else 1.0
        with torch.no_grad():
            bias = torch.lerp(small.decoder_bias, large.decoder_bias, share)
        yield stitch(small, large, put, gone, bias=bias)


def _require_alike(small: SparseAutoencoder, large: SparseAutoencoder) -> None:
    if type(small) is not type(large) or isinstance(small, TopKAutoencoder):
        raise ValueError(
            f"{type(small).__name__} and {type(large).__name__} cannot be stitched: two of the same kind are needed, "
            "and not TopK, where an added feature changes which others are on"
        )
    if small.dim != large.dim:
        raise ValueError(f"autoencoders of activations of sizes {small.dim} and {large.dim} cannot be stitched")
    if [getattr(model.spec, "decoder", None) for model in (small, large)].count("unit") == 1:
        raise ValueError("one of the two subtracts the decoder's bias from its input and the other does not")
