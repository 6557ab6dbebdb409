"""Steering with a dictionary: hold latents at chosen activations while a model runs, and keep what is not explained.

Templeton et al. 2024, "Scaling Monosemanticity", transformer-circuits.pub, "Influence on behavior".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.taps import Edit, edit

Level = float | Float[Tensor, "batch time"]


def clamp(
    model: nn.Module,
    tap: str,
    sae: SparseAutoencoder,
    levels: Mapping[int, Level],
    *,
    positions: Bool[Tensor, "batch time"] | None = None,
    longest: float | None = None,
) -> AbstractContextManager[nn.Module]:
    """Hold latents at given activations in the forward passes inside the context.

    x' = decode(f') + (x - decode(f)), where f = encode(x) and f' is f with the clamped latents replaced: the error that
    the autoencoder makes is kept, so x' = x + sum_i (c_i - a_i(x)) u_i, with a_i = f_i ||decoder_i|| the latent's
    activation as `SparseAutoencoder.strength` gives it, and u_i the unit vector along decoder_i. It acts at every
    position, those that are generated with a cache too.

    Args:
        model, tap: any module, and the path of the module whose output (batch, time, dim) the autoencoder reads.
        sae: of any kind, at the model's own scale (`rescale` undoes a factor of training).
        levels: the activation c_i of each latent i, in units of the tap; a number, or one for each position. 0 switches
            a latent off. Papers give c_i as a multiple of the largest activation seen over some text, as in
            `5 * view.largest` with `feature_views`; a negative one pushes the other way.
        positions: where to clamp, for a forward pass over exactly these positions; everywhere when None.
        longest: activations longer than this pass unchanged. Attention sinks, usually the first token, are so long that
            the autoencoder was trained without them.

    Raises:
        ValueError: for latents that do not exist or have no direction, levels that are not finite, and (at the forward
            pass) activations of another size, and positions or levels of another shape.
    """
    chosen, directions = _directions(sae, levels)
    wanted = list(levels.values())
    for latent, level in zip(chosen, wanted, strict=True):
        if not bool(torch.isfinite(torch.as_tensor(level)).all()):
            raise ValueError(f"latent {latent} is to be clamped to {level}; a finite activation is needed")

    def move(x: Tensor) -> Tensor:
        present = sae.strength(sae.encode(x))[..., chosen]
        change = torch.stack(
            [_at(level, latent, x) - present[..., place] for place, (latent, level) in enumerate(levels.items())],
            dim=-1,
        )
        return change @ directions.to(change)

    return edit(model, {tap: _moving(tap, sae, move, positions, longest)})


def push(
    model: nn.Module,
    tap: str,
    sae: SparseAutoencoder,
    shares: Mapping[int, float],
    *,
    positions: Bool[Tensor, "batch time"] | None = None,
    longest: float | None = None,
) -> AbstractContextManager[nn.Module]:
    """Add latents' directions to a tap, whether or not they are on: x' = x + ||x|| sum_i alpha_i u_i.

    shares: alpha_i of each latent i, in lengths of the activation it is added to. For the rest, see `clamp`; unlike
    there, the same is added wherever ||x|| is the same, and the autoencoder does not run.
    """
    chosen, directions = _directions(sae, shares)
    alphas = torch.tensor([float(shares[latent]) for latent in chosen])
    if not bool(torch.isfinite(alphas).all()):
        raise ValueError(f"shares are {alphas.tolist()}; finite numbers are needed")
    total = alphas.to(directions) @ directions

    def move(x: Tensor) -> Tensor:
        out: Tensor = x.norm(dim=-1, keepdim=True) * total.to(x)
        return out

    return edit(model, {tap: _moving(tap, sae, move, positions, longest)})


def _directions(sae: SparseAutoencoder, latents: Mapping[int, object]) -> tuple[list[int], Float[Tensor, "chosen dim"]]:
    """The latents and the unit vectors along their decoder rows."""
    chosen = list(latents)
    if not chosen:
        raise ValueError("no latent is given: name at least one, as in {latent: activation}")
    wrong = [latent for latent in chosen if not 0 <= latent < sae.latents]
    if wrong:
        raise ValueError(f"there are no latents {wrong}: the dictionary has 0 to {sae.latents - 1}")
    rows = sae.decoder.detach()[chosen]
    lengths = rows.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        empty = [latent for latent, length in zip(chosen, lengths[:, 0].tolist(), strict=True) if not length > 0]
        raise ValueError(f"the decoder rows of latents {empty} are zero: they have no direction to steer along")
    return chosen, rows / lengths


def _at(level: Level, latent: int, x: Tensor) -> float | Tensor:
    if isinstance(level, Tensor) and level.dim():
        return _fitting(level, f"the level of latent {latent}", x)
    return float(level)


def _fitting(given: Tensor, what: str, x: Tensor) -> Tensor:
    if given.shape != x.shape[:-1]:
        raise ValueError(
            f"{what} has shape {tuple(given.shape)}, this forward pass has positions {tuple(x.shape[:-1])}: "
            "with a cache, each pass sees only the new ones"
        )
    return given.to(x.device)


def _moving(
    tap: str, sae: SparseAutoencoder, move: Edit, positions: Bool[Tensor, "batch time"] | None, longest: float | None
) -> Edit:
    """The edit x -> x + move(x) where it is to act, and exactly x elsewhere."""
    if positions is not None and positions.dtype != torch.bool:
        raise ValueError(f"positions are {positions.dtype}; a mask is needed, bool (batch, time)")

    def change(x: Tensor) -> Tensor:
        if x.shape[-1] != sae.dim:
            raise ValueError(
                f"{tap} gives activations of size {x.shape[-1]}, the autoencoder reads size {sae.dim}: "
                "it was made for another model or tap"
            )
        acts = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if positions is not None:
            acts = _fitting(positions, "the mask of positions", x)
        if longest is not None:
            acts = acts & (x.norm(dim=-1) <= longest)
        return torch.where(acts[..., None], x + move(x).to(x.dtype), x)

    return change


def largest_strengths(
    sae: SparseAutoencoder, rows: Sequence[Float[Tensor, "rows dim"]] | Float[Tensor, "rows dim"]
) -> Float[Tensor, " latents"]:
    """Each latent's largest activation over some rows: the unit in which papers give the level of a clamp.

    Rows should leave out attention sinks and padding, whose activations can exceed all others (`Activations` does).

    Raises ValueError when there are no rows.
    """
    parts = [rows] if isinstance(rows, Tensor) else list(rows)
    largest = torch.zeros(sae.latents, dtype=sae.decoder.dtype, device=sae.decoder.device)
    if not sum(map(len, parts)):
        raise ValueError("there are no rows: a largest activation needs some")
    with torch.no_grad():
        for part in parts:
            if len(part):
                largest = torch.maximum(largest, sae.strength(sae.encode(part)).amax(dim=0))
    return largest
