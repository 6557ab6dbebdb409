"""What a latent responds to and what it does: top texts, histogram, effect on logits, neighbours; of many in one pass.

The parts of the feature dashboards of Bricken et al. 2023 ("Towards Monosemanticity", transformer-circuits.pub).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.linear import weight_of
from paperworks.interpret.residual import residual_stream
from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.sae.evaluation.geometry import neighbours
from paperworks.interpret.taps import record

BINS = 24
AROUND = 12  # tokens shown to either side of the strongest


@dataclass(frozen=True)
class Excerpt:
    """A passage in which a latent is on: tokens, its activation at each, and which of them is the strongest."""

    tokens: tuple[int, ...]
    activations: tuple[float, ...]
    strongest: int


@dataclass(frozen=True)
class FeatureView:
    """One latent.

    Attributes:
        index: of the latent.
        density: the share of tokens at which it is on.
        largest: its largest activation.
        histogram: counts of its activations above zero in `BINS` bins from 0 to the largest.
        excerpts: passages where it is strongest, one a sequence, strongest first.
        promoted, suppressed: (token, change of its logit for a unit of activation, above the mean of the vocabulary),
            read straight off the decoder row through the final norm's gain; empty where the model has no such reading.
        neighbours: (latent, cosine of decoder rows), nearest first.
    """

    index: int
    density: float
    largest: float
    histogram: tuple[int, ...]
    excerpts: tuple[Excerpt, ...]
    promoted: tuple[tuple[int, float], ...]
    suppressed: tuple[tuple[int, float], ...]
    neighbours: tuple[tuple[int, float], ...]

    @property
    def agreement(self) -> float:
        """Share of the passages whose strongest token is the commonest of their strongest ones.

        1 is a feature of one token, 1 / passages one of no token in particular: of a context, or of nothing.
        """
        strongest = [excerpt.tokens[excerpt.strongest] for excerpt in self.excerpts]
        return max(map(strongest.count, strongest)) / len(strongest) if strongest else 0.0

    @property
    def strong(self) -> float:
        """Share of the activations above half of the largest: how often it is really on where it is on at all."""
        return sum(self.histogram[BINS // 2 :]) / max(1, sum(self.histogram))


@torch.no_grad()
def feature_views(
    model: nn.Module,
    tap: str,
    sae: SparseAutoencoder,
    batches: Iterable[Int[Tensor, "batch time"]],
    features: Sequence[int] | None = None,
    *,
    most: int = 100,
    excerpts: int = 12,
    tokens: int = 10,
    leave_out_first: int = 1,
) -> list[FeatureView]:
    """Look at latents of an autoencoder over some texts.

    Args:
        model, tap: what the autoencoder reads.
        sae: of any kind.
        batches: token ids; gone through twice (once to see which latents are on, and how strongly).
        features: which latents; None takes the `most` whose density is nearest to the median of those that are on.
        excerpts: passages a latent.
        tokens: promoted and suppressed tokens a latent.
        leave_out_first: positions at the start of every sequence that do not count.

    Raises:
        ValueError: for latents that do not exist, a tap of another size, and texts in which nothing is on.
    """
    inputs = list(batches)
    density, largest = _survey(model, tap, sae, inputs, leave_out_first)
    chosen = _typical(density, most) if features is None else list(features)
    wrong = [index for index in chosen if not 0 <= index < sae.latents]
    if wrong:
        raise ValueError(f"there are no latents {wrong}: the dictionary has 0 to {sae.latents - 1}")
    histograms, found = _collect(model, tap, sae, inputs, chosen, largest[chosen], excerpts, leave_out_first)
    promoted, suppressed = _logit_effects(model, sae.decoder[chosen], tokens)
    near = _near(sae, chosen, density > 0)
    return [
        FeatureView(
            index,
            float(density[index]),
            float(largest[index]),
            tuple(histograms[place].tolist()),
            tuple(found[place]),
            promoted[place],
            suppressed[place],
            near[place],
        )
        for place, index in enumerate(chosen)
    ]


def _latents(model: nn.Module, tap: str, sae: SparseAutoencoder, batch: Tensor, first: int) -> Tensor:
    """The strengths (batch, time, latents), 0 at positions that do not count."""
    with record(model, tap) as seen:
        model(batch)
    value = next(iter(seen.values()))
    if value.dim() != 3:
        raise ValueError(f"{tap} gives shape {tuple(value.shape)}; a dashboard needs (batch, time, dim)")
    strengths = sae.strength(sae.encode(value))
    strengths[:, :first] = 0
    return strengths


def _survey(
    model: nn.Module, tap: str, sae: SparseAutoencoder, inputs: list[Tensor], first: int
) -> tuple[Float[Tensor, " latents"], Float[Tensor, " latents"]]:
    """Each latent's density and largest strength."""
    on = torch.zeros(sae.latents, dtype=torch.int64)
    largest, count = torch.zeros(sae.latents), 0
    for batch in inputs:
        strengths = _latents(model, tap, sae, batch, first).flatten(0, 1).float().cpu()
        on += (strengths > 0).sum(0)
        largest = torch.maximum(largest, strengths.amax(0))
        count += batch.numel() - first * len(batch)
    if count < 1 or not bool((on > 0).any()):
        raise ValueError(
            f"no latent is on at any of {max(count, 0)} tokens: give more text, or the model and tap that the "
            "autoencoder was made for"
        )
    return on.double() / count, largest


def _typical(density: Float[Tensor, " latents"], most: int) -> list[int]:
    """The latents that are on, those nearest to the median density first, in order of their index."""
    alive = (density > 0).nonzero()[:, 0]
    logs = density[alive].log()
    order = (logs - logs.median()).abs().argsort(stable=True)[:most]
    return sorted(alive[order].tolist())


def _collect(
    model: nn.Module,
    tap: str,
    sae: SparseAutoencoder,
    inputs: list[Tensor],
    chosen: list[int],
    largest: Float[Tensor, " chosen"],
    excerpts: int,
    first: int,
) -> tuple[Int[Tensor, "chosen bins"], list[list[Excerpt]]]:
    """The histograms, and the strongest passages: of each sequence the one place where a latent is strongest."""
    histograms = torch.zeros(len(chosen), BINS, dtype=torch.int64)
    best: list[list[tuple[float, Excerpt]]] = [[] for _ in chosen]
    for batch in inputs:
        strengths = _latents(model, tap, sae, batch, first)[..., chosen].float().cpu()
        bins = (strengths / largest.clamp(min=1e-30) * BINS).long().clamp(max=BINS - 1)
        for place in range(len(chosen)):
            on = strengths[..., place] > 0
            histograms[place] += torch.bincount(bins[..., place][on], minlength=BINS)
        peaks, places = strengths.max(1)  # (batch, chosen)
        for row, place in (peaks > 0).nonzero().tolist():
            found, value = best[place], float(peaks[row, place])
            if len(found) == excerpts and value <= found[-1][0]:
                continue
            found.append((value, _excerpt(batch[row], strengths[row, :, place], int(places[row, place]))))
            found.sort(key=lambda pair: -pair[0])
            del found[excerpts:]
    return histograms, [[excerpt for _, excerpt in found] for found in best]


def _excerpt(tokens: Tensor, strengths: Tensor, peak: int) -> Excerpt:
    around = slice(max(0, peak - AROUND), peak + AROUND + 1)
    return Excerpt(tuple(tokens[around].tolist()), tuple(strengths[around].tolist()), peak - around.start)


Ranked = tuple[tuple[int, float], ...]


def _logit_effects(
    model: nn.Module, rows: Float[Tensor, "chosen dim"], count: int
) -> tuple[list[Ranked], list[Ranked]]:
    """The tokens each decoder row promotes and suppresses most; nothing for models without such a reading."""
    try:
        where = residual_stream(model)
    except ValueError:
        return [()] * len(rows), [()] * len(rows)
    weight = weight_of(model.get_submodule(where.unembedding))
    if weight.shape[1] != rows.shape[1]:
        return [()] * len(rows), [()] * len(rows)  # not a direction of the residual stream
    norm = None if where.norm is None else model.get_submodule(where.norm)
    gain = getattr(norm, "weight", None)
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    effects = (unit if gain is None else unit * gain) @ weight.T
    effects = effects - effects.mean(1, keepdim=True)
    count = min(count, effects.shape[1])
    return tuple(  # type: ignore[return-value]
        [
            tuple(zip(tokens, values, strict=True))
            for tokens, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
        for found in (effects.topk(count), effects.topk(count, largest=False))
    )


def _near(sae: SparseAutoencoder, chosen: list[int], alive: Tensor) -> list[Ranked]:
    """Each latent's nearest ones among those that are on, itself left out."""
    count = min(9, int(alive.sum()))
    found = neighbours(sae.decoder[chosen], sae.decoder, count, alive=alive.to(sae.decoder.device))
    return [
        tuple((other, value) for other, value in zip(others, values, strict=True) if other != index)[:8]
        for index, others, values in zip(chosen, found.indices.tolist(), found.cosines.tolist(), strict=True)
    ]
