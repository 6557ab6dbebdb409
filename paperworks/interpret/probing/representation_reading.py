"""Reading vectors of linear artificial tomography (Zou et al. 2023, arXiv:2310.01405).

What a concept looks like inside a model: stimuli put into a template, differences between the states of pairs of them,
and the direction in which these vary most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.interpret.probing.labels import Labels, as_cases, as_truth
from paperworks.interpret.probing.probes import Probe, leading_component, mass_mean
from paperworks.interpret.taps import record

Order = Literal["random", "as given"]

CONCEPT = "USER: Consider the amount of {concept} in the following: {stimulus}\nASSISTANT: The amount of {concept} is"


def concept_prompt(concept: str, stimulus: str) -> str:
    """Put a stimulus into the paper's template for concepts; read at the last token."""
    return CONCEPT.format(concept=concept, stimulus=stimulus)


def lat(
    positive: Float[Tensor, "pairs dim"],
    negative: Float[Tensor, "pairs dim"],
    *,
    order: Order = "random",
    center: bool = True,
    unit: bool = False,
    seed: int = 0,
) -> Probe:
    """Linear artificial tomography: the first principal component of the pairs' differences, as a probe.

    score(a) = v . (a - mean of all activations), v of length 1; of v and -v the one under which more positives score
    above their partner.

    Args:
        positive, negative: activations of paired stimuli, more and less of the concept.
        order: "random" takes each difference in an order drawn by `seed` (the paper's). Pairs "as given" all point one
            way, and centring then takes away just the mean difference that is looked for.
        center: subtract the differences' mean before the decomposition.
        unit: bring each difference to length 1 first (the authors' option).
        seed: of the order.

    Raises:
        ValueError: sides that do not pair up, an unknown order, or no difference at all.
    """
    one, other = as_cases(positive), as_cases(negative)
    if one.shape != other.shape:
        raise ValueError(f"stimuli must pair up as (pairs, dim), got {tuple(one.shape)} and {tuple(other.shape)}")
    if order not in get_args(Order):
        raise ValueError(unknown("order of pairs", order, get_args(Order)))
    differences = one - other
    if order == "random":
        turned = torch.rand(len(one), generator=torch.Generator().manual_seed(seed)) < 0.5
        differences = torch.where(turned[:, None].to(one.device), -differences, differences)
    if unit:
        differences = differences / differences.norm(dim=1, keepdim=True).clamp_min(1e-300)
    if center and len(differences) == 1:
        raise ValueError("one pair, centred, leaves no difference; give more pairs, or center=False")
    direction = leading_component(differences, center=center)
    higher = ((one - other) @ direction > 0).double().mean()
    if float(higher) < 0.5:
        direction = -direction
    middle = torch.cat([one, other]).mean(0)
    return Probe(direction, -float(direction @ middle))


def mean_reading(positive: Float[Tensor, "n dim"], negative: Float[Tensor, "m dim"]) -> Probe:
    """The difference of means as a probe of unit direction, 0 half-way between them."""
    activations = torch.cat([as_cases(positive), as_cases(negative)])
    found = mass_mean(activations, torch.arange(len(activations)) < len(positive))
    length = float(found.direction.norm())
    if length == 0:
        raise ValueError("positives and negatives have the same mean: there is no direction between them")
    return Probe(found.direction / length, found.bias / length)


def two_means_reading(activations: Float[Tensor, "n dim"], labels: Labels, *, rounds: int = 100) -> Probe:
    """The unit direction between the centroids of 2-means on all activations; labels fix its sign only.

    Lloyd's iterations from the two sides of the first principal component: deterministic.
    """
    cases = as_cases(activations)
    truth = as_truth(labels, len(cases))
    axis = leading_component(cases)
    inside = cases @ axis > (cases @ axis).mean()
    first, second = cases[inside].mean(0), cases[~inside].mean(0)
    for _ in range(rounds):
        now = (cases - first).norm(dim=1) < (cases - second).norm(dim=1)
        if torch.equal(now, inside) or bool(now.all()) or not bool(now.any()):
            break
        inside = now
        first, second = cases[inside].mean(0), cases[~inside].mean(0)
    direction = (first - second) / (first - second).norm()
    found = Probe(direction, -float(direction @ (first + second)) / 2)
    return found if float((found.predict(cases) == truth).double().mean()) >= 0.5 else -found


def ranked(
    probe: Probe, positive: Float[Tensor, "pairs dim"], negative: Float[Tensor, "pairs dim"]
) -> Bool[Tensor, " pairs"]:
    """For each pair whether the positive scores above the negative, the paper's accuracy of a reading."""
    return probe.score(positive) > probe.score(negative)


@torch.no_grad()
def scan(
    model: nn.Module, tokens: Int[Tensor, " time"] | Sequence[int], probes: Mapping[str, Probe]
) -> dict[str, Float[Tensor, " time"]]:
    """Each probe's score at every token of a text, by the module path it reads: a monitor's trace.

    Args:
        model: any module that takes tokens (batch, time).
        tokens: of one text.
        probes: by path of a module whose output is (batch, time, dim).
    """
    row = torch.as_tensor(tokens, device=next(model.parameters()).device)
    if row.dim() != 1 or not len(row):
        raise ValueError(f"a scan reads the tokens of one text, shape (time,), got {tuple(row.shape)}")
    with record(model, list(probes)) as seen:
        model(row[None])
    return {path: probe.score(seen[path][0].cpu()) for path, probe in probes.items()}
