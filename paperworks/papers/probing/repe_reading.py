"""Representation engineering, reading: where SmolLM2 keeps happiness, and which way of finding the direction works."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import interpret
from paperworks.interpret.probing.probes import leading_component, random_probe
from paperworks.interpret.probing.representation_reading import lat, mean_reading, ranked, scan, two_means_reading
from paperworks.interpret.probing.separation import Estimate, wilson
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.papers.probing import _emotions as emotions
from paperworks.papers.probing._emotions import Sides
from paperworks.testbeds import statements

paper = Paper(
    key="repe-reading",
    title="Representation Engineering: A Top-Down Approach to AI Transparency (reading)",
    authors="Zou, Phan, Chen, Campbell, Guo, Ren et al.",
    year=2023,
    ref="arXiv:2310.01405; GitHub andyzoujm/representation-engineering",
    family="probing",
    summary=(
        "Put stimuli into a template that asks for a concept, take the states at its end, and find the direction in "
        "which pairs of them differ: a reading vector, whose projection says how much of the concept a text holds."
    ),
    implements=(
        "paperworks.interpret.probing.representation_reading.lat",
        "paperworks.interpret.probing.representation_reading.mean_reading",
        "paperworks.interpret.probing.representation_reading.two_means_reading",
        "paperworks.interpret.probing.representation_reading.scan",
    ),
)

TRAINING, HELD_OUT = 60, 40  # pairs of happiness and sadness
MIDDLE = (14, 17, 20, 23)  # the outputs of blocks 15 to 24, counted from 1: where the claims are made


def _share(hits: Tensor) -> Estimate:
    return wilson(int(hits.sum()), len(hits))


def _parts(lab: Lab) -> tuple[slice, slice]:
    known = lab.pick(smoke=8, small=TRAINING)
    return slice(0, known), slice(known, None)


def _happiness(lab: Lab) -> Sides:
    return emotions.read_contrast(lab, "happiness", "sadness", lab.pick(smoke=12, small=TRAINING + HELD_OUT))


def _middle(lab: Lab, sides: Sides) -> tuple[int, ...]:
    return tuple(layer for layer in lab.pick(smoke=sides.layers, small=MIDDLE) if layer in sides.layers)


@paper.claim(
    "The difference of means reads happiness against sadness from SmolLM2's middle layers",
    paper="Section 6.1: reading vectors of six emotions separate held-out scenarios",
    control="200 random directions, and labels shuffled within the training pairs",
)
def means_read_emotions(lab: Lab) -> Verdict:
    """Rank held-out pairs by the projection, layer by layer, and two further contrasts of emotions."""
    sides = _happiness(lab)
    known, held = _parts(lab)
    middle = _middle(lab, sides)
    right = {}
    for layer in sides.layers:
        probe = mean_reading(*sides.at(layer, known))
        right[layer] = _share(ranked(probe, *sides.at(layer, held)))
    best = max(middle, key=lambda layer: right[layer].value)
    random = _random_band(lab, sides, best, held)
    shuffled = [_shuffled(sides, layer, known, held, lab.seed) for layer in middle]
    other = _further_contrasts(lab)
    lab.table(
        f"Held-out pairs ranked the right way (95% intervals, seed {lab.seed})",
        ["contrast", *(f"block {layer + 1}" for layer in middle)],
        [
            ["happiness, sadness", *(str(right[layer]) for layer in middle)],
            *([name, *(str(shares[layer]) for layer in middle)] for name, shares in other.items()),
            ["happiness, sadness; labels shuffled in the fit", *(str(share) for share in shuffled)],
        ],
    )
    return lab.judge(
        checks={
            "more than 85% of held-out pairs in the best of blocks 15 to 24": right[best].value > 0.85,
            "above 95% of random directions": right[best].value > random[1],
            "shuffled labels stay between 35% and 65%": all(0.35 <= share.value <= 0.65 for share in shuffled),
        },
        measured={
            "best block": best + 1,
            "held-out pairs right": str(right[best]),
            "by block": [round(right[layer].value, 3) for layer in sides.layers],
            "blocks, counted from 1": [layer + 1 for layer in sides.layers],
            **{f"{name}, best block": max(e.value for e in shares.values()) for name, shares in other.items()},
            "seed": lab.seed,
        },
        control={
            "random directions, 5% to 95%": random,
            "labels shuffled, by block": [str(share) for share in shuffled],
        },
        note="60 pairs to find the direction, 40 to score: unrelated scenarios in the paper's template for concepts.",
    )


def _random_band(lab: Lab, sides: Sides, layer: int, held: slice) -> list[float]:
    positive, negative = sides.at(layer, held)
    shares = [
        float(ranked(random_probe(positive.shape[1], lab.seed + draw), positive, negative).double().mean())
        for draw in range(200)
    ]
    ends = torch.tensor(shares, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    return [float(end) for end in ends]


def _shuffled(sides: Sides, layer: int, known: slice, held: slice, seed: int) -> Estimate:
    """Swap the members of about half of the training pairs before the fit; mean over draws, one of them shown."""
    positive, negative = sides.at(layer, known)
    hits = []
    for draw in range(20):
        turned = torch.rand(len(positive), generator=torch.Generator().manual_seed(seed + draw)) < 0.5
        one = torch.where(turned[:, None], negative, positive)
        other = torch.where(turned[:, None], positive, negative)
        hits.append(ranked(mean_reading(one, other), *sides.at(layer, held)).double().mean())
    n = len(sides.at(layer, held)[0])
    return wilson(round(float(torch.stack(hits).mean()) * n), n)


def _further_contrasts(lab: Lab) -> dict[str, dict[int, Estimate]]:
    """Return, for two more contrasts of emotions, the share of held-out pairs ranked right in each middle block."""
    found = {}
    known = lab.pick(smoke=6, small=24)
    for positive, negative in emotions.CONTRASTS[1:]:
        sides = emotions.read_contrast(lab, positive, negative, lab.pick(smoke=10, small=40))
        found[f"{positive}, {negative}"] = {
            layer: _share(ranked(mean_reading(*sides.at(layer, slice(0, known))), *sides.at(layer, slice(known, None))))
            for layer in _middle(lab, sides)
        }
    return found


@paper.claim(
    "LAT's principal component reads the emotion without labels",
    paper="Section 3.1: PCA of the differences between paired stimuli; Section 6.1 with unrelated scenarios",
    control="the difference of means on the same pairs, which uses the labels; matched pairs, of one scenario under "
    "opposite instructions",
)
def component_reads_emotions(lab: Lab) -> Verdict:
    """Compare PCA of unrelated pairs, in ten orders, with PCA of matched pairs, means and 2-means."""
    sides = _happiness(lab)
    known, held = _parts(lab)
    middle = _middle(lab, sides)
    orders = lab.pick(smoke=2, small=10)
    matched = _matched(lab, middle)
    curves: dict[str, list[Estimate]] = {"difference of means": [], "LAT, unrelated pairs": [], "2-means": []}
    alike = []
    for layer in sides.layers:
        pairs, test = sides.at(layer, known), sides.at(layer, held)
        means = mean_reading(*pairs)
        found = [lat(*pairs, seed=lab.seed + order) for order in range(orders)]
        shares = torch.stack([ranked(probe, *test).double().mean() for probe in found])
        curves["difference of means"].append(_share(ranked(means, *test)))
        curves["LAT, unrelated pairs"].append(wilson(round(float(shares.mean()) * len(test[0])), len(test[0])))
        labels = torch.arange(2 * len(pairs[0])) < len(pairs[0])
        curves["2-means"].append(_share(ranked(two_means_reading(torch.cat(pairs), labels), *test)))
        alike.append(max(abs(float(probe.direction @ means.direction)) for probe in found))
    matched_shares, matched_alike = [], []
    for place, layer in enumerate(middle):
        probe = lat(matched[0][place], matched[1][place], seed=lab.seed)
        matched_shares.append(_share(ranked(probe, *sides.at(layer, held))))
        matched_alike.append(float(probe.direction @ mean_reading(matched[0][place], matched[1][place]).direction))
    _draw(lab, sides.layers, curves, middle, matched_shares)
    at = [sides.layers.index(layer) for layer in middle]
    ours = max(curves["LAT, unrelated pairs"][place].value for place in at)
    means_best = max(curves["difference of means"][place].value for place in at)
    return lab.judge(
        checks={
            "more than 85% of held-out pairs with unrelated pairs, best of blocks 15 to 24": ours > 0.85,
            "with matched pairs PCA finds their difference of means: cosine above 0.9": min(matched_alike) > 0.9,
        },
        measured={
            "LAT, unrelated pairs, by block": [round(e.value, 3) for e in curves["LAT, unrelated pairs"]],
            "LAT, unrelated pairs, best": ours,
            "largest cosine with the difference of means, by block": [round(value, 3) for value in alike],
            "2-means, by block": [round(e.value, 3) for e in curves["2-means"]],
            "blocks, counted from 1": [layer + 1 for layer in sides.layers],
            "orders of pairs": orders,
            "held-out pairs": len(sides.at(middle[0], held)[0]),
            "seed": lab.seed,
        },
        control={
            "difference of means, best": means_best,
            "LAT, matched pairs: cosine with their difference of means": matched_alike,
            "LAT, matched pairs, on the same held-out scenarios": [str(share) for share in matched_shares],
        },
        note="What varies most between two unrelated scenarios is what they are about, not how happy they are. A "
        "matched pair is one scenario read under two instructions; its difference has little else in it.",
    )


def _matched(lab: Lab, layers: Sequence[int]) -> tuple[Float[Tensor, "layers n dim"], Float[Tensor, "layers n dim"]]:
    """Return states at the end of scenarios under opposite instructions: the same text on both sides of a pair."""
    texts = emotions.scenarios("surprise", lab.pick(smoke=8, small=40), lab.seed)  # neither happy nor sad by choice
    model = emotions.emotion_model(lab)
    happy, sad = (
        [f"USER: Pretend you are a {person} person. {text}\nASSISTANT: I feel" for text in texts]
        for person in ("happy", "sad")
    )
    states = statements.last_states(lab, model, happy + sad, layers, "one scenario, two instructions")
    return states[:, : len(happy)], states[:, len(happy) :]


def _draw(
    lab: Lab,
    layers: Sequence[int],
    curves: dict[str, list[Estimate]],
    middle: Sequence[int],
    matched: Sequence[Estimate],
) -> None:
    with lab.figure("layers", figsize=(8.6, 3.8)) as figure:
        axes = figure.subplots()
        blocks = [layer + 1 for layer in layers]
        for color, (name, shares) in zip((COLORS[0], COLORS[1], COLORS[4]), curves.items(), strict=True):
            axes.plot(blocks, [share.value for share in shares], color=color, marker="o", ms=4, label=name)
            axes.fill_between(
                blocks, [s.low for s in shares], [s.high for s in shares], color=color, alpha=0.12, linewidth=0
            )
        axes.plot(
            [layer + 1 for layer in middle],
            [share.value for share in matched],
            "--",
            color=COLORS[2],
            marker="s",
            ms=4,
            label="LAT, matched pairs",
        )
        axes.axhline(0.5, color=CONTROL, linewidth=1.0, linestyle=":")
        axes.set_ylim(0.0, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("block of SmolLM2")
        axes.set_ylabel("held-out pairs ranked right")
        axes.set_title("Happiness against sadness, read from the last token")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


@paper.claim(
    "A reading vector follows a text token by token",
    paper="Section 4: projections at every token, as a detector of lies",
    control="random directions on the same tokens",
)
def follows_a_text(lab: Lab) -> Verdict:
    """Read texts of a happy and a sad scenario, in both orders, and compare the tokens of each sentence."""
    sides = _happiness(lab)
    known, _ = _parts(lab)
    layer = _middle(lab, sides)[-2]
    model = emotions.emotion_model(lab)
    tokenizer = model.tokenizer
    count = lab.pick(smoke=12, small=TRAINING + HELD_OUT)
    held = slice(known.stop, known.stop + lab.pick(smoke=2, small=20))
    happy, sad = (emotions.scenarios(name, count, lab.seed)[held] for name in ("happiness", "sadness"))
    path = f"blocks.{layer}"
    probe = mean_reading(*sides.at(layer, known))
    blind = {f"random {draw}": random_probe(len(probe.direction), lab.seed + draw) for draw in range(20)}
    right, blind_right = [], {name: [] for name in blind}  # type: ignore[var-annotated]
    shown: tuple[list[str], list[float], int] | None = None
    for index, (one, other) in enumerate(lab.track(list(zip(happy, sad, strict=True)), "texts of two sentences")):
        first, second = (one, other) if index % 2 == 0 else (other, one)
        ids = tokenizer.encode(f"{first} {second}")
        cut = len(tokenizer.encode(first))
        with interpret.record(model, path) as seen, torch.no_grad():
            model.hidden(torch.tensor([ids], device=model.device))
        states = seen[path][0].cpu()
        for name, trace in ((name, each.score(states)) for name, each in {"ours": probe, **blind}.items()):
            # The first token is an attention sink whose state says nothing of the text.
            difference = float(trace[1:cut].mean() - trace[cut:].mean())
            happier = (difference > 0) == (index % 2 == 0)
            (right if name == "ours" else blind_right[name]).append(happier)
        if shown is None:
            trace = scan(model, ids, {path: probe})[path]
            shown = ([tokenizer.decode([token]) for token in ids], trace.tolist(), cut)
    assert shown is not None
    _draw_scan(lab, shown, layer)
    ours = wilson(sum(right), len(right))
    shares = sorted(sum(hits) / len(hits) for hits in blind_right.values())
    return lab.judge(
        checks={
            "the happy sentence's tokens score higher in more than 85% of texts": ours.value > 0.85,
            "above 95% of random directions": ours.value > shares[-2],
        },
        measured={"texts right": str(ours), "block": layer + 1, "seed": lab.seed},
        control={"random directions, mean": sum(shares) / len(shares), "random directions, 95%": shares[-2]},
        note="The vector was found at the last token of the template; here it reads every token of plain sentences, "
        "the first token left out; half of the texts begin sad.",
    )


def _draw_scan(lab: Lab, shown: tuple[list[str], list[float], int], layer: int) -> None:
    words, trace, cut = shown
    with lab.figure("scan", figsize=(9.2, 3.6)) as figure:
        axes = figure.subplots()
        places = range(1, len(words))
        colors = [COLORS[0] if place < cut else COLORS[1] for place in places]
        axes.bar(list(places), trace[1:], color=colors, width=0.85)
        axes.set_xticks(list(places), [word.strip() for word in words[1:]], rotation=60, ha="right", fontsize=8)
        axes.axvline(cut - 0.5, color=CONTROL, linewidth=1.0, linestyle=":")
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("projection")
        axes.set_title(f"A text that turns from happy to sad, read after block {layer + 1}")


@paper.claim(
    "Pairs all in one order lose their mean difference when centred; random order or no centring keeps it",
    paper="Section 3.1 and the authors' code: differences in random order, centred, then PCA",
    kind="exact",
)
def order_and_centring(lab: Lab) -> Verdict:
    """Build pairs with a known difference and check the algebra in float64."""
    draws = torch.Generator().manual_seed(lab.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    base, noise, shift, tests = normal(80, 24), 0.3 * normal(80, 24), normal(24), normal(9, 24)
    shift = 5 * shift / shift.norm()
    positive, negative = base + shift + noise, base
    wanted = shift / shift.norm()
    ordered = lat(positive, negative, order="as given", center=False)
    centred = lat(positive, negative, order="as given", center=True)
    random = [lat(positive, negative, seed=seed) for seed in range(5)]
    uncentred = [lat(positive, negative, seed=seed, center=False) for seed in range(5)]
    differences = positive - negative
    top = leading_component(differences, center=False)
    same = max(1 - float(probe.direction @ ordered.direction) for probe in uncentred)
    constant = 10 * normal(24)
    moved = max(
        (fit(positive + constant, negative + constant).score(tests + constant) - fit(positive, negative).score(tests))
        .abs()
        .max()
        .item()
        for fit in (lat, mean_reading)
    )
    flipped = (lat(negative, positive).direction + lat(positive, negative).direction).abs().max().item()
    return lab.judge(
        checks={
            "in one order, not centred: the mean difference, cosine above 0.99": float(ordered.direction @ wanted)
            > 0.99,
            "in one order, centred: it is lost, cosine below 0.7": abs(float(centred.direction @ wanted)) < 0.7,
            "in random order centring does no harm, cosine above 0.95": min(
                float(probe.direction @ wanted) for probe in random
            )
            > 0.95,
            # Differences of float64 numbers near 10 and a singular vector.
            "without centring no order matters, to 1e-10": same < 1e-10,
            "the sign alone is chosen: |cosine| with the singular vector is 1": abs(
                abs(float(ordered.direction @ top)) - 1
            )
            < 1e-12,
            "a constant added to all activations changes no score, to 1e-9": moved < 1e-9,
            "swapping the sides flips the vector": flipped < 1e-9,
        },
        measured={
            "cosine, one order, not centred": float(ordered.direction @ wanted),
            "cosine, one order, centred": abs(float(centred.direction @ wanted)),
            "cosine, random order, least of 5": min(float(probe.direction @ wanted) for probe in random),
            "change of scores under a constant": moved,
        },
    )
