"""Circuits of two tasks compared (Merullo, Eickhoff & Pavlick 2023, "Circuit Component Reuse", arXiv:2310.08744).

Path patching stage by stage, what two sets of heads share and what chance would share, and heads told where to look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.interpret.circuits.circuits import attention_of
from paperworks.interpret.circuits.patching import Metric
from paperworks.interpret.circuits.path_patching import Between, Head, all_heads, path_patch
from paperworks.interpret.taps import Edit, edit

Relative = Literal["stage", "run"]
Measure = Literal["shared", "jaccard", "reused"]


@dataclass(frozen=True)
class StagedCircuit:
    """Heads on strong paths, found backwards from the logits.

    Attributes:
        stages: the heads of each stage, by its name, the strongest first.
        effects: for each stage, what corrupting the paths of every possible sender does, as a share (see
            `staged_circuit`): negative where the metric moves away from the corrupted prompt's.
    """

    stages: dict[str, list[Head]]
    effects: dict[str, dict[Head, float]]

    @property
    def heads(self) -> list[Head]:
        """Every head of some stage, in order."""
        return sorted({head for found in self.stages.values() for head in found})


def staged_circuit(
    model: nn.Module,
    clean: Int[Tensor, "batch time"],
    corrupted: Int[Tensor, "batch time"],
    metric: Metric,
    stages: Mapping[str, str],
    *,
    top: float | None = None,
    over: float | None = None,
    relative_to: Relative = "stage",
    feedforward: Between = "recompute",
    on_each: Callable[[], None] | None = None,
) -> StagedCircuit:
    """Follow the strongest direct paths backwards: the heads that act on the logits, those that act on these, and on.

    The effect of a sender h on the receivers R of a stage is (m_h - m_clean) / (m_whole - m_clean), m_h the mean metric
    with the paths h -> R corrupted. Direct effects fade from stage to stage, so by default m_whole is the metric with
    the paths of all heads into R corrupted, and one threshold means the same in every stage.

    Args:
        model: one of ours.
        clean, corrupted: prompts of equal length, position by position.
        metric: logits -> one number a row.
        stages: name -> where its heads act: "logits" for the first stage, then the inputs of the heads of the stage
            before, letters of "qkv": {"movers": "logits", "inhibition": "q", "duplicates": "kv"}.
        top: keep this share of all the model's heads at each stage, by |effect|, at least one (the paper's 0.02).
        over: keep only heads with |effect| above this; with `top`, those of its heads.
        relative_to: "stage" as above, or "run": m_whole is the metric of the corrupted prompts, the same everywhere.
        feedforward: see `path_patch`.
        on_each: called after each sender.

    Raises:
        ValueError: for stages that are not like that, neither `top` nor `over`, a stage without effect.
    """
    _check_stages(stages)
    if top is None and over is None:
        raise ValueError("give top (a share of all heads), over (an effect to exceed) or both; else every head is kept")
    if top is not None and not 0 < top <= 1:
        raise ValueError(f"top is a share of all heads, above 0 and at most 1; got {top}")
    if over is not None and not over >= 0:
        raise ValueError(f"over is an effect to exceed, 0 or more; got {over}")
    if relative_to not in get_args(Relative):
        raise ValueError(unknown("what effects are relative to", relative_to, get_args(Relative)))
    everything = all_heads(model)
    most = len(everything) if top is None else max(1, round(top * len(everything)))
    with torch.no_grad():
        start, end = (metric(model(tokens)).double().mean().item() for tokens in (clean, corrupted))
    found: dict[str, list[Head]] = {}
    effects: dict[str, dict[Head, float]] = {}
    behind: list[Head] = []
    for name, into in stages.items():
        receivers = ["logits"] if into == "logits" else _inputs(model, behind, into)
        last = len(everything) if into == "logits" else max((layer for layer, _ in behind), default=0)
        senders = [head for head in everything if head[0] < last] if receivers else []
        effects[name], found[name] = {}, []
        if senders:

            def score(some: Sequence[Head], receivers: Sequence[str] = receivers) -> float:
                return path_patch(model, clean, corrupted, some, receivers, metric, feedforward=feedforward)

            whole = end if relative_to == "run" else score(senders)
            if abs(whole - start) <= 1e-9 * max(1.0, abs(start)):
                raise ValueError(
                    f"stage {name!r}: corrupting all its paths leaves the metric at {start:.4g}, so there is no effect "
                    "to take shares of; choose prompts whose answers differ, or end the stages before it"
                )
            for sender in senders:
                effects[name][sender] = (score([sender]) - start) / (whole - start)
                if on_each is not None:
                    on_each()
            order = sorted(senders, key=lambda head, own=effects[name]: (-abs(own[head]), head))  # type: ignore[misc]
            found[name] = [head for head in order[:most] if over is None or abs(effects[name][head]) > over]
        behind = found[name]
    return StagedCircuit(found, effects)


def _check_stages(stages: Mapping[str, str]) -> None:
    if not stages:
        raise ValueError("give at least one stage, such as {'movers': 'logits', 'inhibition': 'q'}")
    for index, (name, into) in enumerate(stages.items()):
        if index == 0 and into != "logits":
            raise ValueError(f"the first stage, {name!r}, acts on the logits: write 'logits', not {into!r}")
        if index and (not into or set(into) - set("qkv")):
            raise ValueError(
                f"stage {name!r} acts on inputs of the heads before it: letters of 'qkv', such as 'q' or 'kv', not "
                f"{into!r}"
            )


def _inputs(model: nn.Module, heads: Sequence[Head], parts: str) -> list[str]:
    """Name the receivers of `path_patch`; several query heads may share keys and values."""
    names = []
    for layer, head in heads:
        mixer = attention_of(model, layer)
        shared = mixer.spec.heads // mixer.kv_heads
        names += [f"{layer}.{head if part == 'q' else head // shared}.{part}" for part in parts]
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Overlap:
    """What two circuits share.

    Attributes:
        shared: |A and B|.
        jaccard: |A and B| / |A or B|: 1 for equal sets, 0 for disjoint ones.
        reused: |A and B| / |B|: the share of the second circuit's heads that the first has too.
    """

    shared: int
    jaccard: float
    reused: float


def overlap(first: Collection[Head], second: Collection[Head]) -> Overlap:
    """Compare two sets of heads; ValueError when one is empty."""
    one, other = set(first), set(second)
    if not one or not other:
        raise ValueError(f"both circuits need a head to be compared; they have {len(one)} and {len(other)}")
    return _overlap(len(one & other), len(one), len(other))


def _overlap(shared: int, first: int, second: int) -> Overlap:
    return Overlap(shared, shared / (first + second - shared), shared / second)


@dataclass(frozen=True)
class Chance:
    """An overlap beside what random sets of the same sizes have, exactly.

    Attributes:
        observed: the measure of the two circuits.
        mean, std: of random sets.
        p_value: how often random sets share as much or more.
    """

    observed: float
    mean: float
    std: float
    p_value: float

    @property
    def deviations(self) -> float:
        """How many standard deviations the observed overlap lies above chance; 0 where chance has no choice."""
        return (self.observed - self.mean) / self.std if self.std > 0 else 0.0


def chance_overlap(
    first: Collection[Head],
    second: Collection[Head],
    heads: Collection[Head],
    *,
    measure: Measure = "jaccard",
    by_layer: bool = False,
) -> Chance:
    """Compare an overlap with that of random sets of heads: the permutation test over all relabellings, exactly.

    A random set of b out of n heads shares s with a set of a in C(a, s) C(n - a, b - s) of C(n, b) cases.

    Args:
        first, second: the circuits.
        heads: all heads of the model.
        measure: of `Overlap`.
        by_layer: draw random sets that have as many heads in each layer as `second` has. Late heads act on the logits
            and early ones on late ones whatever the task, so sets drawn from all layers are easily beaten.

    Raises:
        ValueError: for an empty circuit, a head that is not among `heads`, an unknown measure.
    """
    if measure not in get_args(Measure):
        raise ValueError(unknown("measure of overlap", measure, get_args(Measure)))
    one, other, everything = set(first), set(second), set(heads)
    strange = sorted((one | other) - everything)
    if strange:
        raise ValueError(f"{strange[:3]} are not among the {len(everything)} heads to draw from")
    seen = overlap(one, other)
    strata = [{head for head in everything if head[0] == layer} for layer in {layer for layer, _ in everything}]
    odds = {0: 1.0}  # P(shared heads), a convolution over strata
    for stratum in strata if by_layer else [everything]:
        own = _hypergeometric(len(stratum), len(one & stratum), len(other & stratum))
        total: dict[int, float] = {}
        for before, chance in odds.items():
            for here, more in own.items():
                total[before + here] = total.get(before + here, 0.0) + chance * more
        odds = total
    values = {shared: float(getattr(_overlap(shared, len(one), len(other)), measure)) for shared in odds}
    mean = sum(chance * values[shared] for shared, chance in odds.items())
    variance = sum(chance * (values[shared] - mean) ** 2 for shared, chance in odds.items())
    p_value = sum(chance for shared, chance in odds.items() if shared >= seen.shared)
    return Chance(float(getattr(seen, measure)), mean, math.sqrt(variance), min(1.0, p_value))


def _hypergeometric(total: int, marked: int, drawn: int) -> dict[int, float]:
    cases = math.comb(total, drawn)
    return {
        shared: math.comb(marked, shared) * math.comb(total - marked, drawn - shared) / cases
        for shared in range(max(0, drawn - (total - marked)), min(marked, drawn) + 1)
    }


def rows_on(places: Int[Tensor, "batch places"], time: int) -> Float[Tensor, "batch time"]:
    """Attention rows that look at the given positions of each prompt alone, at all of them alike."""
    if places.dim() != 2 or not places.shape[1]:
        raise ValueError(f"places must be (batch, how many), at least one a prompt; got {tuple(places.shape)}")
    if bool(((places < 0) | (places >= time)).any()):
        raise ValueError(f"places must be positions 0 to {time - 1}, got {int(places.min())} to {int(places.max())}")
    rows = torch.zeros(len(places), time, device=places.device)
    return rows.scatter_add_(1, places, torch.full(places.shape, 1 / places.shape[1], device=places.device))


@contextmanager
def attending(
    model: nn.Module,
    heads: Collection[Head],
    rows: Float[Tensor, "batch time"],
    at: int | Int[Tensor, " batch"] = -1,
) -> Iterator[nn.Module]:
    """Tell heads where to look from one position, inside the context; all that follows is computed from there.

    Args:
        model: one of ours.
        heads: whose attention pattern is overridden.
        rows: for each prompt the attention weights over its positions; each row is not negative and sums to 1.
        at: the position that looks: one, or one for each prompt; negative counts from the end.

    Raises:
        ValueError: for an unknown head, rows that are no attention, or that look at what the position cannot see; at
            the forward pass, for prompts of another number or length.
    """
    known = all_heads(model)
    for head in heads:
        if head not in known:
            raise ValueError(f"head {head}: the model has heads {known[0]} to {known[-1]}, as (layer, head)")
    if rows.dim() != 2 or not len(rows):
        raise ValueError(f"rows must be (batch, time), one row a prompt; got {tuple(rows.shape)}")
    off = (rows.double().sum(-1) - 1).abs()
    if bool((rows < 0).any()) or not bool((off < 1e-4).all()):  # float32 rows of a softmax are far closer
        worst = int(torch.where((rows < 0).any(-1), math.inf, off).argmax())
        raise ValueError(
            f"attention weights are not negative and sum to 1; row {worst} sums to {float(rows[worst].sum()):.4f}, its "
            f"smallest is {float(rows[worst].min()):.4f}"
        )
    batch, time = rows.shape
    place = torch.as_tensor(at, device=rows.device).expand(batch)
    if bool(((place < -time) | (place >= time)).any()):
        raise ValueError(f"`at` must be positions of {time} tokens, got {place.unique().tolist()}")
    place = place % time
    later = torch.arange(time, device=rows.device) > place[:, None]
    for layer, _ in heads:
        if attention_of(model, layer).spec.causal and bool((rows[later] != 0).any()):
            raise ValueError("a row looks at tokens after the position that looks, which this model cannot see")

    def change(layer: int) -> Edit:
        own = sorted(head for other, head in heads if other == layer)

        def look(pattern: Tensor) -> Tensor:
            if pattern.shape[0] != batch or pattern.shape[-1] != time or pattern.shape[-2] != time:
                raise ValueError(
                    f"the rows are for {batch} prompts of {time} tokens; this forward pass has {pattern.shape[0]}, of "
                    f"{pattern.shape[-2]} queries and {pattern.shape[-1]} keys"
                )
            new = pattern.clone()
            which = torch.arange(batch, device=pattern.device)
            for head in own:
                new[which, head, place.to(pattern.device)] = rows.to(pattern)
            return new

        return look

    with edit(model, {f"blocks.{layer}.mixer.pattern": change(layer) for layer in sorted({la for la, _ in heads})}):
        yield model
