"""Latent wellbeing: how few directions of a model's states tell which of two scenarios is the more pleasant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.interpret.probing.probes import Probe, random_probe
from paperworks.interpret.probing.representation_reading import ranked
from paperworks.interpret.probing.separation import Estimate, wilson
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import DecoderModel
from paperworks.papers.probing.latent_wellbeing.everyday_events import Scenarios, scenario_pairs
from paperworks.papers.probing.latent_wellbeing.ranking import fit_ranking, principal_components
from paperworks.testbeds import statements
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="latent-wellbeing",
    title="Uncovering Latent Human Wellbeing in Language Model Embeddings",
    authors="Freire, Tan, Radhakrishnan, Hannan, Krasheninnikov et al.",
    year=2024,
    ref="arXiv:2402.11777",
    family="probing",
    summary=(
        "A few principal components of sentence embeddings, found without labels and weighed by a logistic regression "
        "without intercept, rank scenarios by how pleasant they are."
    ),
    implements=(
        "paperworks.papers.probing.latent_wellbeing.ranking.fit_ranking",
        "paperworks.papers.probing.latent_wellbeing.ranking.principal_components",
    ),
)

COMPONENTS = (1, 2, 5, 10, 20, 50)
PENALTY = 1.0
TEMPLATES = {"plain": "{}", "asked": '"{}" How pleasant is this? It is very'}


def _embedded(
    lab: Lab, model: DecoderModel, pairs: Scenarios, template: str, layers: Sequence[int], description: str
) -> tuple[Float[Tensor, "layers pairs dim"], Float[Tensor, "layers pairs dim"]]:
    """Return the states at the last token of both sides; each different text is read once."""
    texts = list(dict.fromkeys([*pairs.better, *pairs.worse]))
    states = statements.last_states(lab, model, [template.format(text) for text in texts], layers, description)
    place = {text: row for row, text in enumerate(texts)}
    return states[:, [place[text] for text in pairs.better]], states[:, [place[text] for text in pairs.worse]]


def _share(probe: Probe, better: Tensor, worse: Tensor) -> Estimate:
    return wilson(int(ranked(probe, better, worse).sum()), len(better))


def _standard(
    known: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scale every dimension by its spread in the training texts: a few of a model's dimensions are far larger."""
    both = torch.cat(known).double()
    spread = both.std(0, correction=0).clamp_min(1e-12)
    one, other = ((better / spread, worse / spread) for better, worse in (known, held))
    return one, other


@paper.claim(
    "A few principal components of SmolLM2's states rank scenarios by wellbeing",
    paper="Abstract: one component of text-embedding-ada-002 ranks 73.9% of ETHICS pairs; 300 components 81.8%",
    control="labels shuffled among the training pairs, and random directions",
)
def components_rank_wellbeing(lab: Lab) -> Verdict:
    """Fit on pairs of some events and rank pairs of others, by number of components, template and layer."""
    model = smollm2(lab, smoke_depth=statements.depth(lab))
    layers = lab.pick(smoke=(1, 2), small=(4, 9, 14, 19, 24, 29))
    known, held = (
        scenario_pairs(events, lab.pick(smoke=12, small=count), lab.seed + index)
        for index, (events, count) in enumerate(((slice(0, 7), 300), (slice(7, 10), 200)))
    )
    counts = [count for count in COMPONENTS if count <= lab.pick(smoke=2, small=COMPONENTS[-1])]
    middle = len(layers) // 2
    found: dict[str, dict[str, Estimate]] = {}
    by_layer: dict[str, list[float]] = {}
    controls: dict[str, tuple[float, list[float]]] = {}
    for name, template in TEMPLATES.items():
        parts = [_embedded(lab, model, part, template, layers, f"scenarios, {name}") for part in (known, held)]

        def at(place: int, parts: list[tuple[Tensor, Tensor]] = parts) -> tuple[tuple[Tensor, Tensor], ...]:
            return _standard(*((better[place], worse[place]) for better, worse in parts))

        pairs, test = at(middle)
        found[name] = {
            **{f"{count}": _share(fit_ranking(*pairs, count, penalty=PENALTY), *test) for count in counts},
            "10, of differences": _share(fit_ranking(*pairs, min(10, counts[-1]), mode="paired"), *test),
            "all": _share(fit_ranking(*pairs, penalty=PENALTY), *test),
        }
        by_layer[name] = [
            _share(fit_ranking(*at(place)[0], min(10, counts[-1]), penalty=PENALTY), *at(place)[1]).value
            for place in range(len(layers))
        ]
        controls[name] = (_shuffled(lab, pairs, test, min(10, counts[-1])), _random(lab, test))
    lab.table(
        f"Pairs of unseen events ranked right, block {layers[middle] + 1} (95% intervals, seed {lab.seed})",
        ["template", *next(iter(found.values()))],
        [[name, *(str(share) for share in shares.values())] for name, shares in found.items()],
    )
    _draw(lab, found, by_layer, [layer + 1 for layer in layers])
    ten, whole = (found["asked"][key] for key in (str(counts[min(3, len(counts) - 1)]), "all"))
    shuffled, random = controls["asked"]
    return lab.judge(
        checks={
            "ten components rank more than 65% right": ten.value > 0.65,
            "all dimensions more than 70%": whole.value > 0.7,
            "ten components are above 95% of random directions": ten.value > random[1],
            "with shuffled labels it is 50% to 5% on average": abs(shuffled - 0.5) < 0.05,
        },
        measured={
            **{f"{count} components": str(found["asked"][str(count)]) for count in counts},
            "10 components of the differences": str(found["asked"]["10, of differences"]),
            "all dimensions": str(whole),
            "without the question: 10 components, all": [
                str(found["plain"][str(counts[min(3, len(counts) - 1)])]),
                str(found["plain"]["all"]),
            ],
            "10 components, by block": [round(value, 3) for value in by_layer["asked"]],
            "blocks, counted from 1": [layer + 1 for layer in layers],
            "seed": lab.seed,
        },
        control={
            "shuffled labels, mean of 20": shuffled,
            "random directions, 5% to 95%": random,
        },
        note="States of SmolLM2 at the last token stand in for a sentence encoder's embeddings; 300 training pairs of "
        "42 events, 200 held-out pairs of 18 others; pairs repeat events, so the intervals are too narrow.",
    )


def _shuffled(lab: Lab, pairs: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], count: int) -> float:
    """Turn a random half of the training pairs round; return the mean share over draws."""
    shares = []
    for draw in range(lab.pick(smoke=2, small=20)):
        turned = torch.rand(len(pairs[0]), generator=torch.Generator().manual_seed(lab.seed + draw)) < 0.5
        one = torch.where(turned[:, None], pairs[1], pairs[0])
        other = torch.where(turned[:, None], pairs[0], pairs[1])
        shares.append(_share(fit_ranking(one, other, count, penalty=PENALTY), *test).value)
    return sum(shares) / len(shares)


def _random(lab: Lab, test: tuple[Tensor, Tensor]) -> list[float]:
    shares = [_share(random_probe(test[0].shape[1], lab.seed + draw), *test).value for draw in range(200)]
    ends = torch.tensor(shares, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    return [float(end) for end in ends]


def _draw(lab: Lab, found: dict[str, dict[str, Estimate]], by_layer: dict[str, list[float]], blocks: list[int]) -> None:
    with lab.figure("components", figsize=(9.2, 3.6)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for color, (name, shares) in zip((COLORS[1], COLORS[0]), found.items(), strict=True):
            kept = {key: share for key, share in shares.items() if key.isdigit() or key == "all"}
            places = list(range(len(kept)))
            label = "with the question" if name == "asked" else "the scenario alone"
            left.errorbar(
                places,
                [share.value for share in kept.values()],
                yerr=[
                    [share.value - share.low for share in kept.values()],
                    [share.high - share.value for share in kept.values()],
                ],
                color=color,
                marker="o",
                markersize=4,
                capsize=2,
                label=label,
            )
            left.set_xticks(places, list(kept))
            right.plot(blocks, by_layer[name], color=color, marker="o", ms=4)
        for axes in (left, right):
            axes.axhline(0.5, color=CONTROL, linewidth=1.0, linestyle=":")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        left.set_xlabel("principal components kept")
        left.set_ylabel("pairs ranked right")
        left.set_title("By components, middle block")
        left.legend(loc="lower right", fontsize=8.5)
        right.set_xlabel("block of SmolLM2")
        right.set_title("By block, ten components")


@paper.claim(
    "The ranking is antisymmetric, knows no sign of a component, and with all components is plain regression",
    paper="Method: logistic regression without intercept on differences of projected embeddings",
    kind="exact",
)
def ranking_is_antisymmetric(lab: Lab) -> Verdict:
    """Check the identities on random embeddings in float64."""
    draws = torch.Generator().manual_seed(lab.seed)
    better, worse = (torch.randn(120, 16, generator=draws, dtype=torch.float64) for _ in range(2))
    better[:, 0] += 1.0
    test = [torch.randn(60, 16, generator=draws, dtype=torch.float64) for _ in range(2)]
    forward, backward = fit_ranking(better, worse, 5), fit_ranking(worse, better, 5)
    flipped = (forward.direction + backward.direction).abs().max().item()
    right = float(ranked(forward, *test).double().mean())
    swapped = float(ranked(forward, test[1], test[0]).double().mean())
    whole = (fit_ranking(better, worse, 16).direction - fit_ranking(better, worse).direction).abs().max().item()
    axis = principal_components(torch.cat([better, worse]), 1)[0]
    one = fit_ranking(better, worse, 1).direction
    mirrored = fit_ranking(-better, -worse, 1).direction  # the components of -x are those of x, of either sign
    # Two convex problems solved to 1e-9 of their gradient.
    return lab.judge(
        checks={
            "swapping all pairs turns the direction round, to 1e-8": flipped < 1e-8,
            "swapping the test pairs gives 1 - accuracy": abs(right + swapped - 1) < 1e-12,
            "all components: regression on the raw differences, to 1e-6": whole < 1e-6,
            "one component: its own direction": abs(abs(float(axis @ one / one.norm())) - 1) < 1e-12,
            "of mirrored embeddings: the mirrored direction": float((one + mirrored).abs().max()) < 1e-8,
        },
        measured={"change under swapping": flipped, "difference from raw regression": whole},
    )
