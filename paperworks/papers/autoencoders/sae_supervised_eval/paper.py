"""Autoencoders judged by a dictionary made with supervision: approximation, sparse control, interpretability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paperworks.interpret import sae
from paperworks.interpret.sae.evaluation.attributes import AdditiveAttributes, attribute_scores
from paperworks.interpret.sae.evaluation.supervised import (
    SupervisedDictionary,
    agreement,
    approximation,
    least_squares_codes,
    mean_codes,
    sparse_edit,
)
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.papers.autoencoders.sae_supervised_eval.name_edits import (
    CHANGES,
    KINDS,
    SITES,
    STEPS,
    SWAP,
    Judged,
    fitted,
    judge_site,
)
from paperworks.papers.circuits.ioi_circuit import trained as trained_model

paper = Paper(
    key="sae-supervised-eval",
    title="Towards Principled Evaluations of Sparse Autoencoders for Interpretability and Control",
    authors="Makelov, Lange, Nanda",
    year=2024,
    ref="arXiv:2405.08366",
    family="autoencoders",
    summary=(
        "Where a task's attributes are known, codes for their values can be computed, and an autoencoder is held "
        "against them: does its reconstruction carry the task, can few of its features change one attribute, and what "
        "do they say? Small attributes are hidden by larger ones, and simple ones split."
    ),
    implements=(
        "paperworks.interpret.sae.evaluation.supervised.mean_codes",
        "paperworks.interpret.sae.evaluation.supervised.least_squares_codes",
        "paperworks.interpret.sae.evaluation.supervised.approximation",
        "paperworks.interpret.sae.evaluation.supervised.sparse_edit",
        "paperworks.interpret.sae.evaluation.supervised.agreement",
        "paperworks.interpret.sae.evaluation.attributes.attribute_scores",
        "paperworks.interpret.sae.evaluation.attributes.best_meanings",
    ),
)

SMALL, LARGE = 0.3, 1.0  # magnitudes of the third attribute; the first two have 1 and 0.8
LATENTS = 32
SEEDS = 4


def _data(lab: Lab, third: float, seed: int = 0) -> AdditiveAttributes:
    return AdditiveAttributes((10, 10, 2), (1.0, 0.8, third), mean_square=64.0, seed=lab.seed + seed)


_KNOWN: dict[tuple[object, ...], sae.SparseAutoencoder] = {}


def _additive(lab: Lab, penalty: float, third: float, seed: int = 0) -> sae.SparseAutoencoder:
    """Train Templeton et al.'s autoencoder on additive activations, once."""
    key = (lab.scale, lab.seed, penalty, third, seed)
    if key not in _KNOWN:
        steps = lab.pick(smoke=5, small=STEPS)
        spec = sae.Standard(latents=LATENTS, penalty=penalty, decoder="weighted")
        batches = _data(lab, third, seed).batches(512, steps, seed=lab.seed + seed + 1)
        _KNOWN[key] = fitted(lab, spec, batches, steps, lab.seed + seed, None)
    return _KNOWN[key]


@paper.claim(
    "Supervised codes are the true ones, their edits the counterfactual activations, and the scores have their ends",
    paper="Section 3: mean codes and least-squares codes; sufficiency and necessity",
    kind="exact",
)
def codes_are_exact(lab: Lab) -> Verdict:
    """Compare codes with the true ones on every combination of attributes, and on some with gaps."""
    data = AdditiveAttributes(noise=0.0, seed=lab.seed)
    codes = [code.double() for code in data.codes]
    data.codes = codes
    every = torch.cartesian_prod(*map(torch.arange, data.sizes))
    x = data.sum(every)
    true = [code - code.mean(dim=0) for code in codes]
    balanced, regressed = mean_codes(x, every), least_squares_codes(x, every)
    new = (every[:, 0] + 3) % 10
    counterfactual = every.clone()
    counterfactual[:, 0] = new
    edited = balanced.edit(x, 0, every[:, 0], new)
    # Half of the combinations with an even sum of the first two values are missing: attributes depend on each other.
    kept = ((every[:, 0] + every[:, 1]) % 4 != 0) | (every[:, 2] == 0)
    gaps, biased = least_squares_codes(x[kept], every[kept]), mean_codes(x[kept], every[kept])
    sums = max(_weighted_sum(each, every[kept]) for each in (gaps, biased))
    weight = torch.randn(64, generator=lab.generator(lab.seed), dtype=torch.float64)

    def metric(output: Tensor) -> Tensor:
        # Not linear: a linear metric has the same mean with x and with its mean, so both scores would be 0 / 0.
        return (output @ weight).square()

    whole = approximation(x[:57], x[:57], lambda y: y, metric)
    nothing = approximation(x[:57], x[:57].mean(dim=0).expand(57, -1), lambda y: y, metric)
    return lab.judge(
        checks={
            "mean codes are the true ones, to 1e-12": _apart(balanced, true) < 1e-12,
            "so are least-squares codes": _apart(regressed, true) < 1e-12,
            "an edit is the counterfactual activation, to 1e-12": _largest(edited - data.sum(counterfactual)) < 1e-12,
            "codes weighted by how often values occur add up to 0": sums < 1e-12,
            "with gaps, least squares reconstructs exactly and means do not": (
                _largest(gaps.reconstruct(every[kept]) - x[kept]) < 1e-12
                and _largest(biased.reconstruct(every[kept]) - x[kept]) > 0.01
            ),
            "sufficiency and necessity of x itself are 1, of its mean 0": (
                abs(whole.sufficiency - 1) + abs(whole.necessity - 1) < 1e-12
                and abs(nothing.sufficiency) + abs(nothing.necessity) < 1e-12
            ),
        },
        measured={
            "largest error of a mean code": _apart(balanced, true),
            "largest error of a least-squares code": _apart(regressed, true),
            "largest weighted sum of codes": sums,
            "error of mean codes with gaps": _largest(biased.reconstruct(every[kept]) - x[kept]),
            "error of least squares with gaps": _largest(gaps.reconstruct(every[kept]) - x[kept]),
            "metric with x, and with the mean of x": [whole.clean, whole.ablated],
        },
    )


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _apart(dictionary: SupervisedDictionary, true: list[Tensor]) -> float:
    return max(_largest(code - other) for code, other in zip(dictionary.codes, true, strict=True))


def _weighted_sum(dictionary: SupervisedDictionary, attributes: Tensor) -> float:
    return max(
        _largest(torch.bincount(column, minlength=len(code)).double() @ code) / len(column)
        for code, column in zip(dictionary.codes, attributes.unbind(dim=1), strict=True)
    )


@paper.claim(
    "On additive activations one swap of supervised codes changes one attribute and nothing else",
    paper="Sections 3 and 4: supervised dictionaries control the task almost perfectly, autoencoders with few features "
    "much less",
    control="two changes in an autoencoder trained on the same activations, chosen greedily, the counterfactual known",
)
def swaps_control(lab: Lab) -> Verdict:
    """Change each attribute to another value; success is to read what the true counterfactual reads as."""
    data, model = _data(lab, SMALL), _additive(lab, 3.0, SMALL)
    seen, attributes = data.draw(lab.pick(smoke=400, small=4000), torch.Generator().manual_seed(lab.seed + 7))
    dictionary = mean_codes(seen, attributes, data.sizes)
    x, old = data.draw(lab.pick(smoke=64, small=2000), torch.Generator().manual_seed(lab.seed + 8))
    draws = torch.Generator().manual_seed(lab.seed + 9)
    supervised, features, none, moved = [], [], [], []
    for attribute, size in enumerate(data.sizes):
        new = (old[:, attribute] + torch.randint(1, size, (len(old),), generator=draws)) % size
        target = x + data.codes[attribute][new] - data.codes[attribute][old[:, attribute]]
        edited = sparse_edit(model, x, target, SWAP)
        swapped = dictionary.edit(x, attribute, old[:, attribute], new)
        supervised.append(agreement(lambda y: y, swapped, target, data.read))
        features.append(agreement(lambda y: y, edited.x, target, data.read))
        none.append(agreement(lambda y: y, x, target, data.read))
        moved.append(float(edited.moved.mean()))
    weights = dictionary.weights(old).mean(dim=0).tolist()
    return lab.judge(
        checks={
            "supervised edits succeed in more than 98%, whichever attribute": min(supervised) > 0.98,
            "as many changes of the autoencoder's features succeed less often, whichever attribute": all(
                other < ours for ours, other in zip(supervised, features, strict=True)
            ),
            "no edit succeeds in less than 2%": max(none) < 0.02,
        },
        measured={
            "supervised, by attribute": supervised,
            "share of the reconstruction that a swap takes away": weights,
        },
        control={
            "autoencoder, two changes, by attribute": features,
            "share of its reconstruction taken away": moved,
            "no edit, by attribute": none,
        },
        note="Three attributes of 10, 10 and 2 values, lengths 1, 0.8 and 0.3 in 64 dimensions, noise 0.02; the "
        "autoencoder (weighted penalty 3, 32 latents, 3,000 steps) is told the counterfactual activation, the "
        "supervised dictionary only the attribute's new value. An attribute that is not changed must stay as well.",
    )


@dataclass(frozen=True)
class Hidden:
    """What an autoencoder has of three attributes: scores by attribute, and what of the third it writes."""

    f1: list[float]
    balanced: list[float]
    written: float  # share of the third attribute's code difference that is in the reconstruction
    pairs: float  # mean best F1 for pairs of a value of the first or second attribute with one of the third
    l0: float


def _hidden(lab: Lab, penalty: float, third: float, seed: int) -> Hidden:
    data, model = _data(lab, third, seed), _additive(lab, penalty, third, seed)
    x, attributes = data.draw(lab.pick(smoke=400, small=10_000), torch.Generator().manual_seed(lab.seed + seed + 99))
    with torch.no_grad():
        latents = model.encode(x)
        reconstruction = model.decode(latents)
    scores = attribute_scores(latents, attributes, data.sizes)
    pair = torch.stack([2 * attributes[:, 0] + attributes[:, 2], 2 * attributes[:, 1] + attributes[:, 2]], dim=1)
    joint = attribute_scores(latents, pair, (20, 20))
    code = least_squares_codes(reconstruction, attributes, data.sizes).codes[2]
    difference = data.codes[2][1] - data.codes[2][0]
    written = float((code[1] - code[0]) @ difference / difference.square().sum())
    best = joint.f1.amax(dim=0)
    on = float((latents > 0).sum(dim=1).double().mean())
    return Hidden(scores.mean_best(), scores.mean_best_balanced(), written, float(best.mean()), on)


@paper.claim(
    "A small attribute is occluded by larger ones: no feature tells its values, until it is as large",
    paper="Section 5 and the toy models: feature occlusion and over-splitting",
    control="the same with the third attribute as long as the first, and with a third of the penalty",
)
def small_attributes_are_occluded(lab: Lab) -> Verdict:
    """Score features against attribute values at two magnitudes of the third attribute and two penalties."""
    seeds = lab.pick(smoke=1, small=SEEDS)
    found = {
        (penalty, third): [_hidden(lab, penalty, third, seed) for seed in range(seeds)]
        for penalty in (3.0, 1.0)
        for third in (SMALL, LARGE)
    }
    mean = {key: _averaged(each) for key, each in found.items()}
    lab.table(
        f"Mean best F1 (balanced accuracy) by attribute, mean of {seeds} seeds",
        ["penalty", "third", "first", "second", "third attribute", "pairs", "third written", "L0"],
        [
            [
                penalty,
                third,
                *[f"{f1:.2f} ({right:.2f})" for f1, right in zip(one.f1, one.balanced, strict=True)],
                one.pairs,
                one.written,
                one.l0,
            ]
            for (penalty, third), one in mean.items()
        ],
    )
    _draw_occlusion(lab, mean)
    hidden, shown = mean[3.0, SMALL], mean[3.0, LARGE]
    return lab.judge(
        checks={
            "penalty 3: F1 of the third attribute below 0.4 at magnitude 0.3": hidden.f1[2] < 0.4,
            "penalty 3: above 0.5 once it has magnitude 1": shown.f1[2] > 0.5,
            "penalty 1: it rises by more than 0.2 with the magnitude": mean[1.0, LARGE].f1[2] - mean[1.0, SMALL].f1[2]
            > 0.2,
        },
        measured={
            "F1 at 0.3, penalty 3, by attribute": hidden.f1,
            "balanced accuracy": hidden.balanced,
            "share of the third attribute written": hidden.written,
            "F1 of the third attribute, each seed": [one.f1[2] for one in found[3.0, SMALL]],
        },
        control={
            "F1 at 1, penalty 3, by attribute": shown.f1,
            "balanced accuracy at 1": shown.balanced,
            "share written at 1": shown.written,
            "F1 of the third attribute, penalty 1, each seed at 0.3 and at 1": [
                [one.f1[2] for one in found[1.0, third]] for third in (SMALL, LARGE)
            ],
            "F1 of the third attribute at 1, each seed": [one.f1[2] for one in found[3.0, LARGE]],
            "F1 for pairs of values, at 0.3 and at 1": [hidden.pairs, shown.pairs],
            "F1 at 0.3, penalty 1": mean[1.0, SMALL].f1,
            "F1 at 1, penalty 1": mean[1.0, LARGE].f1,
        },
        note="A feature that is always on has F1 0.667 for a value of the third attribute, so lower scores say there "
        "is none for it. It is not that nothing of it is written: features fire for one of its values together with "
        "one value of a larger attribute (see the F1 of pairs), for such a pair costs the penalty one activation where "
        "two attributes cost two. That is over-splitting of the larger attribute, and at penalty 3 it hides the third "
        "attribute at magnitude 1 as well; only at penalty 1, where activations are cheaper, does a feature of its own "
        "come with its magnitude.",
    )


def _averaged(found: list[Hidden]) -> Hidden:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Hidden(
        [mean([one.f1[index] for one in found]) for index in range(3)],
        [mean([one.balanced[index] for one in found]) for index in range(3)],
        mean([one.written for one in found]),
        mean([one.pairs for one in found]),
        mean([one.l0 for one in found]),
    )


def _draw_occlusion(lab: Lab, mean: dict[tuple[float, float], Hidden]) -> None:
    with lab.figure("occlusion", figsize=(8.4, 3.4)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        names = ["1st\n(10 values)", "2nd\n(10 values)", "3rd\n(2 values)", "pairs\nwith 3rd"]
        for index, third in enumerate((SMALL, LARGE)):
            one = mean[3.0, third]
            left.bar(
                [place + 0.38 * (index - 0.5) for place in range(4)],
                [*one.f1, one.pairs],
                width=0.36,
                color=COLORS[index],
                label=f"third has length {third:g}",
            )
        left.plot([1.6, 2.4], [2 / 3, 2 / 3], color=INK, linewidth=1, linestyle=":")
        left.text(2, 0.69, "always on", ha="center", fontsize=8)
        left.set_xticks(range(4), names, fontsize=9)
        left.set_ylim(0, 1.25)
        left.set_yticks([0, 0.25, 0.5, 0.75, 1])
        left.legend(loc="upper right", ncols=2, fontsize=8)
        left.set_title("Best feature's F1, penalty 3")
        for penalty, color in ((1.0, COLORS[2]), (3.0, COLORS[3])):
            values = [mean[penalty, third].f1[2] for third in (SMALL, LARGE)]
            right.plot([SMALL, LARGE], values, marker="o", color=color, label=f"penalty {penalty:g}")
        right.set_ylim(0, 1.05)
        right.set_xlabel("length of the third attribute")
        right.set_title("F1 of the third")
        right.legend(loc="upper left")


@paper.claim(
    "In a model that finds the indirect object, supervised codes control it; autoencoders need more features",
    paper="Sections 4 and 5: supervised dictionaries near perfect on all tests; task-trained autoencoders have "
    "interpretable features but control the answer less",
    control="as many changes in autoencoders trained on the same activations; mean codes, which are biased as the two "
    "names always differ",
)
def controls_a_model(lab: Lab) -> Verdict:
    """Change the answer inside a trained model; success is its answer with the true counterfactual patched in."""
    model = trained_model(lab)
    judged = {place: judge_site(lab, model, site) for place, site in SITES.items()}
    lab.table(
        "Dictionaries at two places of the model",
        ["place", "dictionary", "sufficiency", "necessity", "edits, 2 changes", "taken away", "F1 of answers"],
        [
            [
                place,
                name,
                one.approximation.sufficiency,
                one.approximation.necessity,
                one.success[CHANGES.index(SWAP)] if name in KINDS else one.success[0],
                one.moved,
                one.f1[0] if name in KINDS else "",
            ]
            for place, (found, _) in judged.items()
            for name, one in found.items()
        ],
    )
    _draw_control(lab, judged)
    ours = [found["least squares"] for found, _ in judged.values()]
    means = [found["means"] for found, _ in judged.values()]
    learned = [{name: found[name] for name in KINDS} for found, _ in judged.values()]
    two = CHANGES.index(SWAP)
    best = [max(one.success[two] for one in kinds.values()) for kinds in learned]
    return lab.judge(
        checks={
            "two changes of any autoencoder agree at least 10 points less": all(
                one.success[0] - other > 0.1 for one, other in zip(ours, best, strict=True)
            ),
            "supervised edits agree with the patched counterfactual in more than 90%": min(
                one.success[0] for one in ours
            )
            > 0.9,
            "supervised reconstructions are sufficient and necessary to 0.9": min(
                min(one.approximation.sufficiency, one.approximation.necessity) for one in ours
            )
            > 0.9,
            "least squares is above means in both": all(
                one.approximation.sufficiency > other.approximation.sufficiency
                and one.approximation.necessity > other.approximation.necessity
                for one, other in zip(ours, means, strict=True)
            ),
            "an autoencoder has features for the answers, mean best F1 above 0.8": all(
                max(one.f1[0] for one in kinds.values()) > 0.8 for kinds in learned
            ),
            "without an edit less than 20% agree": max(none for _, none in judged.values()) < 0.2,
        },
        measured={
            "places": list(SITES),
            "supervised edits that agree": [one.success[0] for one in ours],
            "sufficiency": [one.approximation.sufficiency for one in ours],
            "necessity": [one.approximation.necessity for one in ours],
            "logit difference, and with the mean in place": [
                [one.approximation.clean, one.approximation.ablated] for one in ours
            ],
            "share of the reconstruction a swap takes away": [one.moved for one in ours],
        },
        control={
            "best autoencoder, two changes": best,
            "best autoencoder, four changes": [
                max(one.success[CHANGES.index(4)] for one in kinds.values()) for kinds in learned
            ],
            "sufficiency and necessity of mean codes": [
                [one.approximation.sufficiency, one.approximation.necessity] for one in means
            ],
            "F1 for answer, subject and order of the best autoencoder": [
                [max(one.f1[index] for one in kinds.values()) for index in range(3)] for kinds in learned
            ],
            "F1 of what features say best, mean, best autoencoder": [
                max(one.meaning for one in kinds.values()) for kinds in learned
            ],
            "no edit": [none for _, none in judged.values()],
        },
        note="The model and task of ioi-circuit, one template; dictionaries from 20,000 sentences, tested on 4,000 "
        "others. An edit adds to the activation, so that an autoencoder's error stays as it is. Autoencoders are told "
        "the counterfactual's activation and the supervised dictionary only the name. After block 1 necessity is "
        "lower: the mean there leaves two thirds of the logit difference, and what two names do together is in no sum "
        "of codes.",
    )


def _draw_control(lab: Lab, judged: dict[str, tuple[dict[str, Judged], float]]) -> None:
    with lab.figure("control", figsize=(8.6, 3.4)) as figure:
        panels = figure.subplots(1, len(judged), sharey=True)
        for axes, (place, (found, none)) in zip(panels, judged.items(), strict=True):
            for color, name in zip(COLORS[1:], KINDS, strict=False):
                axes.plot(range(1, len(CHANGES) + 1), found[name].success, marker="o", ms=4, color=color, label=name)
            supervised = found["least squares"].success[0]
            axes.scatter([CHANGES.index(SWAP) + 1], [supervised], color=COLORS[0], s=90, marker="*", zorder=4,
                         label="supervised swap")  # fmt: skip
            axes.axhline(none, color=CONTROL, linewidth=1, linestyle=":", label="no edit")
            axes.set_xticks(range(1, len(CHANGES) + 1), [str(count) for count in CHANGES])
            axes.set_ylim(0, 1.05)
            axes.set_xlabel("changes allowed")
            axes.set_title(place[:1].upper() + place[1:])
        panels[0].set_ylabel("agree with the counterfactual")
        panels[-1].legend(loc="lower right", fontsize=8)
