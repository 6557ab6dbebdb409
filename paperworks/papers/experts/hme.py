"""Hierarchical mixtures of experts: a tree of gates fitted by EM learns piecewise maps in a few passes."""

from __future__ import annotations

import itertools
import statistics

import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import count_parameters
from paperworks.models.classic.hierarchical_mixture import HME, Fit, HMEModel, fit_hme, fit_multinomial

paper = Paper(
    key="hme",
    title="Hierarchical Mixtures of Experts and the EM Algorithm",
    authors="Jordan, Jacobs",
    year=1994,
    ref="Neural Computation 6(2), 181-214",
    family="experts",
    summary=(
        "A tree of soft splits with a linear model at each leaf is a likelihood, so EM fits it: weighted least squares "
        "for the experts, weighted logistic regressions for the gates, and no learning rate."
    ),
    implements=(
        "paperworks.models.classic.hierarchical_mixture.HME",
        "paperworks.models.classic.hierarchical_mixture.fit_hme",
        "paperworks.models.classic.hierarchical_mixture.fit_multinomial",
    ),
)

NOISE = 0.05
PASSES = 40
TREE = HME(inputs=2, outputs=1, branching=(2, 2))
STARTS = 5

Rows = tuple[Tensor, Tensor]


def _quadrants(world: int, rows: int, seed: int) -> Rows:
    """Points of a square; each quadrant has a linear map of its own, and the target some noise."""
    maps = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(world))
    draws = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(rows, 2, dtype=torch.float64, generator=draws) - 1
    quadrant = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    y = (maps[quadrant] * torch.cat((x, torch.ones_like(x[:, :1])), 1)).sum(1, keepdim=True)
    return x, y + NOISE * torch.randn(rows, 1, dtype=torch.float64, generator=draws)


def _train_and_test(lab: Lab, world: int) -> tuple[Rows, Rows]:
    return _quadrants(world, lab.pick(smoke=60, small=800), 1000 + world), _quadrants(world, 2000, 2000 + world)


@torch.no_grad()
def _explained(model: nn.Module, rows: Rows) -> float:
    """R^2: the share of the variance explained."""
    x, y = rows
    return float(1 - (model(x) - y).square().sum() / (y - y.mean()).square().sum())


def _largest_fall(trace: list[float]) -> float:
    return max(before - after for before, after in itertools.pairwise(trace))


@paper.claim(
    "Likelihood never falls, siblings' posteriors add up to their parent's, and one leaf is least squares",
    paper="Section 4 and Equations 21 to 24 (EM); Equations 14 to 16 (posteriors)",
    kind="exact",
    control="gates of the lower level fitted without the posterior of their node",
)
def em_is_exact(lab: Lab) -> Verdict:
    """Follow EM on trees of one, two and three levels; compare leaves and posteriors with what they should be."""
    x, y = _quadrants(lab.seed, lab.pick(smoke=60, small=400), 1)
    iterations = lab.pick(smoke=3, small=PASSES)
    falls, rises = {}, {}
    for name, branching in (("one level", (4,)), ("two levels", (2, 2)), ("three levels", (2, 2, 2))):
        spec = HME(inputs=2, outputs=1, branching=branching)
        traces = [
            trace
            for world in range(lab.pick(smoke=1, small=3))
            for trace in fit_hme(
                spec, *_quadrants(lab.seed + world, len(x), 1), iterations=iterations, starts=3
            ).objective
        ]
        falls[name] = max(_largest_fall(trace) for trace in traces)
        rises[name] = min(trace[-1] - trace[0] for trace in traces)
    single = fit_hme(HME(inputs=2, outputs=1, branching=(), ridge=1e-10), x, y, iterations=1, starts=1).model
    wide = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    tree = fit_hme(TREE, x, y, iterations=2, starts=1, seed=lab.seed).model
    unweighted = max(
        _largest_fall(_unweighted_trace(*_quadrants(lab.seed + world, len(x), 1), iterations, start))
        for world in range(lab.pick(smoke=1, small=3))
        for start in range(lab.pick(smoke=1, small=3))
    )
    with torch.no_grad():
        least_squares = float((single.experts[0] - torch.linalg.lstsq(wide, y).solution.t()).abs().max())
        siblings = float((tree.posterior(x, y).view(-1, 2, 2).sum(-1) - _by_recursion(tree, x, y)).abs().max())
    rounding = 1e-8  # sums of hundreds of float64 log-likelihoods of a few units
    return lab.judge(
        checks={
            "likelihood with prior never falls": max(falls.values()) < rounding,
            "and rises": min(rises.values()) > 1,
            "siblings add up to their parent": siblings < 1e-12,
            "one leaf is ordinary least squares": least_squares < 1e-8,
            "without the node's posterior it falls somewhere": unweighted > 0.01,
        },
        measured={
            "largest fall in one iteration, by depth": list(falls.values()),
            "smallest rise, by depth": list(rises.values()),
            "siblings against their parent": siblings,
            "one leaf against least squares": least_squares,
        },
        control={"largest fall, lower gates without h_i": unweighted},
        note="The objective is the log-likelihood plus the log prior of the ridge, in nats over all points; "
        "three problems and three starts each. Without h_i it falls in some of them only: most points are "
        "nearly all one node's.",
    )


@torch.no_grad()
def _by_recursion(tree: HMEModel, x: Tensor, y: Tensor) -> Tensor:
    """Return h_i = g_i sum_j g_{j|i} P_ij / sum_i (the same), from the paper's equations."""
    wide = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    top = (wide @ tree.gates[0][0].t()).softmax(-1)
    lower = torch.stack([(wide @ gate.t()).softmax(-1) for gate in tree.gates[1]], 1)
    below = (lower * tree.log_density(x, y).exp().view(-1, 2, 2)).sum(-1)
    return top * below / (top * below).sum(-1, keepdim=True)


@torch.no_grad()
def _unweighted_trace(x: Tensor, y: Tensor, iterations: int, seed: int) -> list[float]:
    """Return the objective when lower gates are fitted to h_{j|i} alone, as if every point were all theirs."""
    torch.manual_seed(seed)
    tree = TREE.build().double()
    wide = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    trace = []
    for _ in range(iterations):
        within = tree.posterior(x, y).view(-1, 2, 2)
        within = within / within.sum(-1, keepdim=True)
        before = tree.gates[1].clone()
        trace.append(tree.em_step(x, y))
        for node in range(2):
            tree.gates[1][node] = fit_multinomial(wide, within[:, node], before[node], ridge=TREE.ridge, steps=3)
    return trace


@paper.claim(
    "EM with restarts finds four regions in 40 passes, where back-propagation does not",
    paper="Table 1 (robot dynamics): error 0.10 after 35 passes, back-propagation 0.09 after 5,500, linear 0.31",
    control="a network with as many parameters and passes, by gradient descent at its best rate; one linear model",
)
def em_finds_regions(lab: Lab) -> Verdict:
    """Piecewise-linear regression over four quadrants, 800 points, three problems; five starts of each method."""
    worlds = [lab.seed + offset for offset in range(lab.pick(smoke=1, small=3))]
    passes = lab.pick(smoke=2, small=PASSES)
    starts = lab.pick(smoke=1, small=STARTS)
    trees: list[float] = []
    every: list[float] = []
    networks: list[float] = []
    lines: list[float] = []
    fits: list[Fit] = []
    with lab.threads(1):
        for world in lab.track(worlds, "problems"):
            seen, unseen = _train_and_test(lab, world)
            fit = fit_hme(TREE, *seen, iterations=passes, starts=starts, seed=lab.seed)
            fits.append(fit)
            trees.append(_explained(fit.model, unseen))
            every.extend(_explained(model, unseen) for model in fit.models)
            line = fit_hme(HME(inputs=2, outputs=1, branching=()), *seen, iterations=2, starts=1).model
            lines.append(_explained(line, unseen))
            networks.append(_explained(_best_network(lab, seen, passes, starts), unseen))
    _draw_fits(lab, fits[0])
    network = _network()
    return lab.judge(
        checks={
            "R^2 at least 0.97 in every problem": min(trees) >= 0.97,
            "better than the network in every problem": all(t > n for t, n in zip(trees, networks, strict=True)),
            "better than a line": all(t > one for t, one in zip(trees, lines, strict=True)),
            "some starts fail, so restarts are part of it": min(every) < 0.97,
        },
        measured={
            "R^2 by problem": trees,
            "R^2 of every start": every,
            "passes": passes,
            "free parameters": _free(TREE),
        },
        control={
            "R^2 by problem, network": networks,
            "R^2 by problem, linear": lines,
            "parameters, network": count_parameters(network),
        },
        note=f"Best of {starts} starts by training likelihood (tree) or training error (network, also over three "
        f"rates, steps of 16 points). The median R^2 over single starts of EM is {statistics.median(every):.3f}.",
    )


def _free(spec: HME) -> int:
    """Return the parameters that count: a softmax over b classes has b - 1 free rows."""
    width = spec.inputs + 1
    gates, nodes = 0, 1
    for children in spec.branching:
        gates += nodes * (children - 1) * width
        nodes *= children
    return gates + spec.leaves * spec.outputs * (width + 1)


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def _squared(model: nn.Module, batch: Rows) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def _best_network(lab: Lab, rows: Rows, passes: int, starts: int) -> nn.Module:
    """Return the network with the smallest training error of all starts and rates."""
    x, y = rows
    trained: list[tuple[float, int, nn.Module]] = []
    for rate in lab.pick(smoke=(0.1,), small=(0.03, 0.1, 0.3)):
        for start in range(starts):
            torch.manual_seed(start)
            model = _network()
            draws = torch.Generator().manual_seed(start)
            orders = [torch.randperm(len(x), generator=draws).split(16) for _ in range(passes)]
            batches = [(x[chosen], y[chosen]) for order in orders for chosen in order]
            settings = train.Settings(
                steps=len(batches),
                lr=rate,
                optimizer=train.AdamW(weight_decay=0.0),
                log_every=len(batches),
                save_every=None,
                progress=False,
            )
            train.fit(model, _squared, batches, settings)
            with torch.no_grad():
                trained.append((float(_squared(model, rows)), len(trained), model))
    return min(trained)[2]


def _draw_fits(lab: Lab, fit: Fit) -> None:
    with lab.figure("likelihood", figsize=(6.6, 3.0)) as figure:
        axes = figure.subplots()
        best = max(range(len(fit.models)), key=lambda start: fit.log_likelihood[start])
        for start, trace in enumerate(fit.objective):
            chosen = start == best
            axes.plot(
                trace, color=COLORS[0] if chosen else CONTROL, zorder=2 + chosen, linewidth=2.4 if chosen else 1.4
            )
        axes.plot([], [], color=COLORS[0], label="likeliest start")
        axes.plot([], [], color=CONTROL, label="the other starts")
        axes.set(title="EM from several starts", xlabel="iteration", ylabel="log-likelihood + log prior")
        axes.legend(loc="lower right")
