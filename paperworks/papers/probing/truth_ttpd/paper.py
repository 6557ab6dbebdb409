"""Truth is universal? Probes for true and false statements, on other topics than they were found on, and negated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from paperworks.interpret.probing.probes import logistic, random_probe
from paperworks.interpret.probing.separation import Estimate, accuracy, auroc, bootstrap, wilson
from paperworks.interpret.probing.truth import centered_by, truth_directions, ttpd
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.papers.probing.truth_ttpd.left_out_topics import PENALTY, PROBES, Reading, both_polarities, held_out
from paperworks.papers.probing.truth_ttpd.planted_truth import planted
from paperworks.papers.probing.truth_ttpd.statement_judge import (
    FALSE,
    TOPICS,
    TRUE,
    World,
    at_periods,
    draw_world,
    learn,
    small_model,
)
from paperworks.testbeds import statements
from paperworks.testbeds.statements import Seen

paper = Paper(
    key="truth-ttpd",
    title="Truth is Universal: Robust Detection of Lies in LLMs",
    authors="Buerger, Hamprecht, Nadler",
    year=2024,
    ref="arXiv:2407.12831; GitHub sciai-lab/Truth_is_Universal",
    family="probing",
    summary=(
        "True and false statements differ in two directions: one that negation leaves alone and one that it turns "
        "round. A probe that saw no negation mixes them and is wrong about negations; TTPD separates them."
    ),
    implements=(
        "paperworks.interpret.probing.truth.ttpd",
        "paperworks.interpret.probing.truth.truth_directions",
        "paperworks.interpret.probing.probes.logistic",
        "paperworks.interpret.probing.probes.mass_mean",
        "paperworks.interpret.probing.probes.lda",
    ),
)

# ---------------------------------------------------------------- planted directions


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(normalize(one, dim=0) @ normalize(other, dim=0))


@paper.claim(
    "Where truth has two directions, a probe that saw no negation is wrong about negations; TTPD is not",
    paper="Section 3: a direction trained on affirmative statements fails on negated ones because of the "
    "polarity-sensitive direction; Section 5: TTPD generalises",
    control="logistic regression on the affirmative statements of the same topics",
)
def planted_negations(lab: Lab) -> Verdict:
    """Hold every topic out once, in several draws, and score both polarities of it."""
    seeds, per_cell = lab.pick(smoke=1, small=5), lab.pick(smoke=20, small=100)
    right: dict[str, list[float]] = {"ttpd": [], "ttpd negated": [], "plain": [], "plain negated": [], "order": []}
    cosines: list[float] = []
    for seed in lab.track(seeds, "planted directions"):
        data = planted(lab.seed + seed, per_cell)
        for topic in range(6):
            known, held = data[data.topic != topic], data[data.topic == topic]
            found = ttpd(known.states, known.true, known.affirmative, known.groups)
            plain = logistic(known[known.affirmative].states, known[known.affirmative].true, penalty=1e-6)
            assert found.truth is not None
            assert found.truth.polar is not None
            cosines += [_cosine(found.truth.general, data.general), _cosine(found.truth.polar, data.polar)]
            for name, probe in (("ttpd", found), ("plain", plain)):
                for suffix, part in (("", held[held.affirmative]), (" negated", held[~held.affirmative])):
                    right[name + suffix].append(accuracy(probe.score(part.states), part.true).value)
            negated = held[~held.affirmative]
            right["order"].append(auroc(plain.score(negated.states), negated.true))
    mean = {name: sum(values) / len(values) for name, values in right.items()}
    cases = seeds * 6 * 2 * per_cell
    return lab.judge(
        checks={
            "TTPD is right about more than 95% of both polarities": min(mean["ttpd"], mean["ttpd negated"]) > 0.95,
            "the affirmative probe about less than 40% of negations": mean["plain negated"] < 0.4,
            "and orders them the wrong way round: AUROC below 0.2": mean["order"] < 0.2,
            "it is right about affirmative statements, to 95%": mean["plain"] > 0.95,
            "both planted directions are found: cosine above 0.99": min(cosines) > 0.99,
        },
        measured={
            "TTPD, affirmative": mean["ttpd"],
            "TTPD, negated": mean["ttpd negated"],
            "TTPD, worst topic and draw": min(right["ttpd"] + right["ttpd negated"]),
            "least cosine with a planted direction": min(cosines),
            "n of each polarity": cases,
        },
        control={
            "affirmative logistic regression, affirmative": mean["plain"],
            "affirmative logistic regression, negated": mean["plain negated"],
            "its AUROC on negations": mean["order"],
        },
        note="64 dimensions, noise 0.3; the held-out topic is not centred, as in the paper: an offset of the topic "
        "along t_G can move all its scores across zero, which is what happens in the worst case.",
    )


@paper.claim(
    "In a balanced design the least-squares directions are plain means; one polarity alone finds their sum or "
    "difference",
    paper="Section 3: t = (X^T X)^-1 X^T A with X = [tau, tau p]",
    kind="exact",
)
def directions_are_means(lab: Lab) -> Verdict:
    """Compare the fit with the means, and noiseless one-sided fits with t_G + t_P and t_G - t_P."""
    data = planted(lab.seed, 20, noise=1.0)
    found = truth_directions(data.states, data.true, data.affirmative, data.groups)
    assert found.polar is not None
    centred = centered_by(data.states, data.groups)
    tau, sign = data.true.double() * 2 - 1, data.affirmative.double() * 2 - 1
    general, polar = (tau[:, None] * centred).mean(0), ((tau * sign)[:, None] * centred).mean(0)
    apart = max((found.general - general).abs().max().item(), (found.polar - polar).abs().max().item())
    clean = planted(lab.seed, 2, noise=0.0)
    sides = {}
    for name, part, wanted in (
        ("affirmative", clean[clean.affirmative], clean.general + clean.polar),
        ("negated", clean[~clean.affirmative], clean.general - clean.polar),
    ):
        alone = truth_directions(part.states, part.true, part.affirmative, part.groups)
        sides[name] = (alone.general - wanted).abs().max().item()
    # Sums of some hundred float64 numbers below 10.
    return lab.judge(
        checks={
            "t_G = mean(tau a) and t_P = mean(tau p a), to 1e-12": apart < 1e-12,
            "affirmative statements alone find t_G + t_P": sides["affirmative"] < 1e-12,
            "negated statements alone find t_G - t_P": sides["negated"] < 1e-12,
        },
        measured={"largest difference from the means": apart, "largest difference from the sum": max(sides.values())},
    )


# ---------------------------------------------------------------- statements in SmolLM2


def _ordered(reading: Reading, draws: int, seed: int) -> Estimate:
    return bootstrap(reading.order, len(reading.true), draws=draws, seed=seed)


@paper.claim(
    "A truth probe found on five topics reads the sixth, affirmative and negated, and TTPD reads it best",
    paper="Section 5: leave-one-topic-out, TTPD generalises to negations better than logistic regression and CCS; 94% "
    "on facts against falsehoods in models of 7B to 13B",
    control="labels shuffled before the fit, and random directions",
)
def reads_other_topics(lab: Lab) -> Verdict:
    """Fit every probe on five of six topics of real statements in SmolLM2, and score the sixth."""
    seen = statements.read_statements(lab)
    middle = seen.layers[len(seen.layers) // 2]
    draws = lab.pick(smoke=20, small=300)
    readings = {}
    for name in lab.track(list(PROBES), f"probes after block {middle + 1}"):
        readings[name] = held_out(lab, seen, middle, PROBES[name][1])
    right = {
        name: {polarity: accuracy(part.scores, part.true) for polarity, part in both.items()}
        for name, both in readings.items()
    }
    random = _random_accuracies(lab, seen, middle)
    _tabulate(lab, readings, right, random, draws, middle)
    curves = _curves(lab, seen)
    _draw_curves(lab, curves)
    together = {
        name: sum(estimate.value for estimate in both.values()) / 2
        for name, both in right.items()
        if PROBES[name][0] != "control"
    }
    best = max(together, key=lambda name: together[name])
    found, shuffled = right["TTPD"], right["logistic regression, labels shuffled"]
    return lab.judge(
        checks={
            "TTPD is above chance on the negations of unseen topics (95%)": found["negated"].low > 0.5,
            "and on their affirmative statements": found["affirmative"].low > 0.5,
            "TTPD is right about more than 90% of both": min(e.value for e in found.values()) > 0.9,
            "TTPD is the best probe over both polarities": best == "TTPD",
            "shuffled labels are at chance": all(e.low <= 0.5 <= e.high for e in shuffled.values()),
        },
        measured={
            "TTPD, affirmative": str(found["affirmative"]),
            "TTPD, negated": str(found["negated"]),
            "best over both polarities": best,
            **{f"{name}, both polarities": value for name, value in together.items()},
            "seed": lab.seed,
        },
        control={
            "labels shuffled, affirmative": str(shuffled["affirmative"]),
            "labels shuffled, negated": str(shuffled["negated"]),
            "random directions, 5% to 95%": random,
        },
        note="SmolLM2-135M-Instruct, residual stream at the last token after the middle block, six topics left out in "
        "turn; each data set's scores are centred by their own mean. Across topics this model knows the truth of "
        "affirmative statements only, and weakly: what distinguishes true from false turns round under negation. "
        "The statements of a topic resemble each other, so the intervals are too narrow: see random directions.",
    )


def _random_accuracies(lab: Lab, seen: Seen, layer: int) -> list[float]:
    """Return the 5% and 95% quantiles of the accuracy of random directions on affirmative statements of all topics."""
    names = [name for name in seen.sets if not name.startswith("neg_")]
    states, true = centered_by(seen.at(names, layer), seen.groups(names)), seen.true(names)
    found = [
        accuracy(random_probe(states.shape[1], lab.seed + draw).score(states), true).value
        for draw in range(lab.pick(smoke=20, small=200))
    ]
    ends = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    return [float(end) for end in ends]


def _tabulate(
    lab: Lab,
    readings: dict[str, dict[str, Reading]],
    right: dict[str, dict[str, Estimate]],
    random: list[float],
    draws: int,
    layer: int,
) -> None:
    n = len(next(iter(readings.values()))["affirmative"].true)
    rows: list[list[object]] = []
    for name, both in readings.items():
        row: list[object] = [name, PROBES[name][0]]
        for polarity, part in both.items():
            estimate, order = right[name][polarity], _ordered(part, draws, lab.seed)
            row += [
                f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]",
                f"{order.value:.3f} [{order.low:.3f}, {order.high:.3f}]",
                accuracy(part.raw, part.true).value,
            ]
        rows.append(row)
    blank = ["", "", "", "", ""]
    rows.append(["random directions", "control", f"5% to 95%: {random[0]:.3f} to {random[1]:.3f}", *blank])
    columns = [
        f"{polarity}: {what}"
        for polarity in ("affirmative", "negated")
        for what in ("accuracy [95%]", "AUROC [95%]", "accuracy, not centred")
    ]
    lab.table(
        f"Statements of topics left out of the fit, after block {layer + 1} (n = {n} a polarity, seed {lab.seed})",
        ["probe", "fitted on", *columns],
        rows,
    )


def _curves(lab: Lab, seen: Seen) -> dict[str, tuple[list[int], dict[str, list[float]]]]:
    """Return, for some probes, blocks (counted from 1) and accuracy in each polarity."""
    shown = ("TTPD", "logistic regression", "logistic regression, affirmative", "CCS")
    curves = {}
    for name in shown:
        layers = seen.layers[1::3] if name == "CCS" else seen.layers  # CCS is trained: a third of the layers
        values: dict[str, list[float]] = {"affirmative": [], "negated": []}
        for layer in lab.track(layers, f"{name}, layer by layer"):
            for polarity, part in held_out(lab, seen, layer, PROBES[name][1]).items():
                values[polarity].append(accuracy(part.scores, part.true).value)
        curves[name] = ([layer + 1 for layer in layers], values)
    return curves


def _draw_curves(lab: Lab, curves: dict[str, tuple[list[int], dict[str, list[float]]]]) -> None:
    with lab.figure("layers", figsize=(9.2, 3.8)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, polarity in zip(panels, ("affirmative", "negated"), strict=True):
            for color, (name, (blocks, values)) in zip(COLORS, curves.items(), strict=False):
                axes.plot(blocks, values[polarity], color=color, marker="o", markersize=3.5, label=name)
            axes.axhline(0.5, color=CONTROL, linewidth=1.0, linestyle=":")
            axes.set_title(f"{polarity} statements of unseen topics")
            axes.set_xlabel("block of SmolLM2")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panels[0].set_ylabel("accuracy")
        panels[0].set_ylim(0.3, 0.82)
        panels[1].legend(loc="upper left", fontsize=8.5)


@paper.claim(
    "In SmolLM2 the polarity-sensitive direction dominates: a probe of affirmative statements is inverted on negations",
    paper="Section 3: the truth direction of affirmative statements alone fails on negated ones",
    control="affirmative statements of the same topic that the probe did not see",
)
def negation_turns_truth_round(lab: Lab) -> Verdict:
    """Fit on a topic's affirmative statements, and score their negations, other negations, and other statements."""
    seen = statements.read_statements(lab)
    topics = [name for name in seen.sets if not name.startswith("neg_")]
    layers = lab.pick(smoke=seen.layers[1:], small=(13, 17, 21))
    kept, same, others, ratios = [], [], [], []
    for layer in lab.track(layers, "affirmative statements"):
        hits: dict[str, list[Tensor]] = {"kept": [], "same": [], "others": []}
        for topic in topics:
            states, negated, true = seen.at([topic], layer), seen.at([f"neg_{topic}"], layer), seen.sets[topic].true
            states, negated = states.double() - states.double().mean(0), negated.double() - negated.double().mean(0)
            whole = logistic(states, true, penalty=PENALTY)
            hits["same"].append(whole.predict(negated) == ~true)
            first = torch.arange(len(true)) % 2 == 0  # rows come true first, then false: both halves are balanced
            for rows in (first, ~first):
                probe = logistic(states[rows], true[rows], penalty=PENALTY)
                hits["kept"].append(probe.predict(states[~rows]) == true[~rows])
                hits["others"].append(probe.predict(negated[~rows]) == ~true[~rows])
        kept.append(_share(hits["kept"]))
        same.append(_share(hits["same"]))
        others.append(_share(hits["others"]))
        names = both_polarities(topics)
        found = truth_directions(seen.at(names, layer), seen.true(names), seen.affirmative(names), seen.groups(names))
        assert found.polar is not None
        ratios.append(float(found.polar.norm() / found.general.norm()))
    return lab.judge(
        checks={
            "on the negations of its own statements it is below 35% in every layer": max(e.value for e in same) < 0.35,
            "on negations of statements it did not see it is below chance (95%)": max(e.high for e in others) < 0.5,
            "on affirmative statements it did not see it is above chance (95%)": min(e.low for e in kept) > 0.5,
            "|t_P| is more than 1.5 times |t_G| in every layer": min(ratios) > 1.5,
        },
        measured={
            "blocks, counted from 1": [layer + 1 for layer in layers],
            "right about negations of its own statements": [str(e) for e in same],
            "right about other negations": [str(e) for e in others],
            "|t_P| / |t_G|": ratios,
            "seed": lab.seed,
        },
        control={"right about other affirmative statements": [str(e) for e in kept]},
        note="Six topics, each data set centred. Other statements are the half of the topic that was not fitted on, "
        "both halves in turn. Part of the inversion on its own statements is that the probe remembers their words.",
    )


def _share(hits: list[Tensor]) -> Estimate:
    joined = torch.cat(hits)
    return wilson(int(joined.sum()), len(joined))


# ---------------------------------------------------------------- a small model that must know the truth


def _left_out(states: Tensor, world: World, *, affirmative_only: bool) -> tuple[Estimate, Estimate]:
    """Hold each topic out once; return the share right of its affirmative, and of its negated statements."""
    hits: dict[bool, list[Tensor]] = {True: [], False: []}
    groups = 2 * world.topic + world.affirmative
    for topic in range(TOPICS):
        known = world.topic != topic
        if affirmative_only:
            known = known & world.affirmative
        probe = ttpd(states[known], world.true[known], world.affirmative[known], groups[known], penalty=1e-3)
        for plain in (True, False):
            test = (world.topic == topic) & (world.affirmative == plain)
            scores = probe.score(states[test])
            hits[plain].append(((scores - scores.mean()) > 0) == world.true[test])
    return _share(hits[True]), _share(hits[False])


@paper.claim(
    "In a model that has to say whether statements are true, TTPD reads topics and negations it never saw",
    paper="Section 5: TTPD generalises across topics and polarities, in models that know the facts",
    control="the same model before training, and the same probe of affirmative statements only",
)
def reads_a_model_that_knows(lab: Lab) -> Verdict:
    """Train a small transformer on statements with their verdict, and leave each topic out of the probe once."""
    world = draw_world(lab.seed)
    model = small_model(lab)
    before = _left_out(at_periods(model, world)[0][-1].double(), world, affirmative_only=False)
    losses = learn(lab, model, world)
    states, logits = at_periods(model.eval(), world)
    knows = ((logits[:, TRUE] > logits[:, FALSE]) == world.true).double().mean().item()
    both = [_left_out(layer.double(), world, affirmative_only=False) for layer in states]
    plain = [_left_out(layer.double(), world, affirmative_only=True) for layer in states]
    best = max(range(len(both)), key=lambda layer: min(e.value for e in both[layer]))
    _draw_small_model(lab, both, plain)
    return lab.judge(
        checks={
            "TTPD is right about more than 90% of both polarities in some layer": min(e.value for e in both[best])
            > 0.9,
            "the model itself is right about more than 98%": knows > 0.98,
            "before training TTPD is below 65%": max(e.value for e in before) < 0.65,
            "in some layer the affirmative probe is below 50% on negations": min(e[1].value for e in plain) < 0.5,
        },
        measured={
            "TTPD, affirmative, by block": [str(e[0]) for e in both],
            "TTPD, negated, by block": [str(e[1]) for e in both],
            "the model's own verdicts": knows,
            "last loss": losses[-1],
            "seed": lab.seed,
        },
        control={
            "before training, affirmative and negated": [str(e) for e in before],
            "affirmative probe on negations, by block": [str(e[1]) for e in plain],
        },
        note="Four blocks of 64 dimensions, 6 topics of 16 subjects and 6 answers; read at the period, before the "
        "verdict; four in five statements are followed by it in training. Each held-out set is centred. A probe of "
        "affirmative statements does as well here: a model that only has to give the verdict keeps one truth, not two.",
    )


def _draw_small_model(lab: Lab, both: list[tuple[Estimate, Estimate]], plain: list[tuple[Estimate, Estimate]]) -> None:
    with lab.figure("small-model", figsize=(7.2, 3.4)) as figure:
        axes = figure.subplots()
        blocks = list(range(1, len(both) + 1))
        for values, index, color, style, name in (
            (both, 0, COLORS[0], "-", "TTPD, affirmative"),
            (both, 1, COLORS[1], "-", "TTPD, negated"),
            (plain, 1, CONTROL, "--", "fitted on affirmative only, negated"),
        ):
            axes.plot(
                blocks, [pair[index].value for pair in values], style, color=color, marker="o", markersize=4, label=name
            )
        axes.axhline(0.5, color=CONTROL, linewidth=1.0, linestyle=":")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xticks(blocks)
        axes.set_xlabel("block of the small model")
        axes.set_ylabel("accuracy on unseen topics")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_title("A model trained to judge statements")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
