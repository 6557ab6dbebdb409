"""Sparsely-gated mixtures of experts: noisy top-k gating, and the two losses that keep all experts at work."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import count_parameters
from paperworks.nn import MLP, Experts, Feedforward, NoisyTopKRouter
from paperworks.nn.feedforward.experts.routers import smooth_load

paper = Paper(
    key="sparse-moe",
    title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    authors="Shazeer, Mirhoseini, Maziarz, Davis, Le, Hinton, Dean",
    year=2017,
    ref="arXiv:1701.06538",
    family="experts",
    summary=(
        "A learned gate sends each token to k of many expert networks, so that capacity grows without computation; "
        "noise on the gate and two small losses keep the experts evenly used."
    ),
    implements=(
        "paperworks.nn.feedforward.experts.routers.NoisyTopKRouter",
        "paperworks.nn.feedforward.experts.mixture.Experts",
    ),
)

COUNT, TOP, DIM = 8, 2, 16
HIDDEN = 16  # units of an expert: as many as inputs, so that two clusters do not fit into one expert
BATCH = 256
LR = 0.01

Draw = Callable[[int, int], tuple[Tensor, Tensor]]


@paper.claim(
    "k experts at most work on a token, the gates begin uniform, and the load loss counts what it should",
    paper="Equations 3 to 5 (noisy top-k gating), Appendix A: Equations 8 to 10 and the initialization with zeros",
    kind="exact",
    control="the threshold of the load taken among all experts, the token's own included",
)
@torch.no_grad()
def gating_is_the_papers(lab: Lab) -> Verdict:
    """Compare with a dense sum over all experts, and the smooth load with draws of fresh noise."""
    draws = torch.Generator().manual_seed(lab.seed)
    torch.manual_seed(lab.seed)
    sparse, sums = _layer(TOP), _layer(COUNT)
    x = torch.randn(512, DIM, dtype=torch.float64, generator=draws)
    gates = _gates(sparse, x)
    dense = sum(gates[:, index, None] * expert(x) for index, expert in enumerate(sparse.experts))
    everyone = sums.router.logits(x).softmax(-1)
    mixture = sum(everyone[:, index, None] * expert(x) for index, expert in enumerate(sums.experts))
    from_zero = _uniform(lab)

    clean = torch.randn(1, COUNT, dtype=torch.float64, generator=draws)
    spread = torch.randn(1, COUNT, dtype=torch.float64, generator=draws).exp()
    noisy = clean + spread * torch.randn(1, COUNT, dtype=torch.float64, generator=draws)
    frequencies = _frequencies(lab, clean, spread, noisy, draws)
    load = smooth_load(clean, spread, noisy, TOP)[0]
    threshold = noisy.topk(TOP, -1).values[:, -1:]
    own_included = torch.special.ndtr((clean - threshold) / spread)[0]
    errors = {
        "sparse dispatch against the dense sum": float((sparse(x) - dense).abs().max()),
        "k = n against the dense softmax mixture": float((sums(x) - mixture).abs().max()),
        "load against the frequency of being chosen": float((load - frequencies).abs().max()),
        "share of tokens that an expert gets at first, most": from_zero,
    }
    wrong = float((own_included - frequencies).abs().max())
    return lab.judge(
        checks={
            "the load is the frequency to 0.002": errors["load against the frequency of being chosen"] < 0.002,
            "k gates of a token are not zero": bool(((gates > 0).sum(-1) == TOP).all()),
            "sparse dispatch is the dense sum to 1e-12": errors["sparse dispatch against the dense sum"] < 1e-12,
            "k = n is the dense mixture to 1e-12": errors["k = n against the dense softmax mixture"] < 1e-12,
            "at first all experts get as much, to a tenth": abs(from_zero * COUNT / TOP - 1) < 0.1,
            "the threshold must leave the expert itself out": wrong > 0.02,
        },
        measured=errors,
        control={"load with its own threshold, against the frequency": wrong},
        note="8 experts, k = 2, float64. The frequency is of a million draws an expert: its standard deviation is "
        "0.0005 at most.",
    )


def _layer(top: int) -> Any:
    """A layer whose gate has been drawn, not zero, without noise."""
    spec = Experts(expert=MLP(hidden=HIDDEN, activation="relu"), count=COUNT, top=top, router=NoisyTopKRouter())
    layer: Any = spec.build(DIM).double().eval()
    nn.init.normal_(layer.router.logits.weight)
    return layer


def _gates(layer: Any, x: Tensor) -> Tensor:
    """Return G(x) written out from Equations 3 to 5: all but the k largest at minus infinity, then a softmax."""
    logits = layer.router.logits(x)
    smallest = logits.sort(-1, descending=True).values[:, TOP - 1 : TOP]
    return logits.where(logits >= smallest, -torch.inf).softmax(-1)


def _uniform(lab: Lab) -> float:
    """Return the largest share of tokens that any expert gets of a fresh gate, in training."""
    spec = Experts(expert=MLP(hidden=2), count=COUNT, top=TOP, router=NoisyTopKRouter())
    layer: Any = spec.build(DIM).train()
    tokens = lab.pick(smoke=20_000, small=200_000)
    experts = layer.router(torch.randn(tokens, DIM)).experts
    return float(torch.bincount(experts.flatten(), minlength=COUNT).max() / tokens)


def _frequencies(lab: Lab, clean: Tensor, spread: Tensor, noisy: Tensor, draws: torch.Generator) -> Tensor:
    """Return how often each expert is among the k largest when its own noise is drawn afresh, the others' kept."""
    times = lab.pick(smoke=20_000, small=1_000_000)
    found = []
    for index in range(COUNT):
        others = torch.cat((noisy[0, :index], noisy[0, index + 1 :]))
        fresh = clean[0, index] + spread[0, index] * torch.randn(times, dtype=torch.float64, generator=draws)
        found.append(((others > fresh[:, None]).sum(1) < TOP).double().mean())
    return torch.stack(found)


@paper.claim(
    "With both losses all experts are used evenly, and the mixture learns more",
    paper="Table 6 (Appendix A): without losses CV(load) 3.01 and perplexity 39.8, with both at 0.1 0.05 and 35.6",
    control="the same layer with both weights zero; a dense layer that computes as much a token",
)
def losses_balance(lab: Lab) -> Verdict:
    """Eight clusters of points, a linear map for each: 800 steps, three seeds."""
    relu = MLP(hidden=HIDDEN, activation="relu")
    arms: dict[str, Feedforward] = {
        "with both losses": Experts(expert=relu, count=COUNT, top=TOP, router=NoisyTopKRouter()),
        "without": Experts(expert=relu, count=COUNT, top=TOP, router=NoisyTopKRouter(importance=0.0, load=0.0)),
        "dense": MLP(hidden=TOP * HIDDEN, activation="relu"),
    }
    seeds = lab.pick(smoke=(lab.seed,), small=(lab.seed, lab.seed + 1, lab.seed + 2))
    errors: dict[str, list[float]] = {name: [] for name in arms}
    loads: dict[str, list[Tensor]] = {name: [] for name in arms}
    for seed in seeds:
        draw = _clusters(seed)
        test = draw(4096, 10**6)
        for name, spec in arms.items():
            model = _trained(lab, spec, draw, seed, f"{name}, seed {seed}")
            with torch.no_grad():
                errors[name].append(float(_squared(model, test)))
                if isinstance(spec, Experts):
                    experts = model.router(test[0]).experts
                    loads[name].append(torch.bincount(experts.flatten(), minlength=COUNT).double() / experts.numel())
    even, uneven = loads["with both losses"], loads["without"]
    _draw_loads(lab, even[0], uneven[0])
    means = {name: statistics.fmean(values) for name, values in errors.items()}
    return lab.judge(
        checks={
            "with: CV(load) under 0.1": max(map(_variation, even)) < 0.1,
            "with: largest load under 1.2 of the mean": max(map(_largest, even)) < 1.2,
            "without: CV(load) above 0.3": min(map(_variation, uneven)) > 0.3,
            "without: largest load at least 1.5 of the mean": min(map(_largest, uneven)) >= 1.5,
            "without: higher test error": means["without"] > means["with both losses"],
            "dense: higher test error": means["dense"] > means["with both losses"],
        },
        measured={
            "CV(load) by seed": [_variation(load) for load in even],
            "largest load / mean, by seed": [_largest(load) for load in even],
            "test error by seed": errors["with both losses"],
        },
        control={
            "CV(load) by seed, no losses": [_variation(load) for load in uneven],
            "largest load / mean, by seed, no losses": [_largest(load) for load in uneven],
            "test error by seed, no losses": errors["without"],
            "test error by seed, dense": errors["dense"],
            "parameters that a dense token meets / a sparse one's": count_parameters(arms["dense"].build(DIM))
            / (TOP * count_parameters(relu.build(DIM))),
        },
        note="8 experts of 16 ReLU units, k = 2, 16 dimensions; loads on 4,096 new points, without noise. Gates that "
        "begin at zero, and noise, keep every expert alive at this size even without the losses: how uneven they "
        "become is a matter of the seed.",
    )


def _clusters(seed: int) -> Draw:
    """Return a function (rows, seed) -> (points, targets): eight clusters, the targets of each a linear map."""
    world = torch.Generator().manual_seed(seed)
    centres = torch.randn(COUNT, DIM, generator=world)
    maps = torch.randn(COUNT, DIM, DIM, generator=world) / DIM**0.5

    def draw(rows: int, seed: int) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(seed)
        cluster = torch.randint(COUNT, (rows,), generator=draws)
        points = centres[cluster] + 0.3 * torch.randn(rows, DIM, generator=draws)
        return points, torch.einsum("noi,ni->no", maps[cluster], points)

    return draw


def _squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def _trained(lab: Lab, spec: Feedforward, draw: Draw, seed: int, description: str) -> Any:
    steps = lab.pick(smoke=3, small=800)
    torch.manual_seed(seed)
    model: Any = spec.build(DIM)
    batches = [draw(BATCH, steps * seed + step) for step in range(steps)]
    settings = train.Settings(
        steps=steps,
        lr=LR,
        schedule="constant",
        warmup=0,
        optimizer=train.AdamW(weight_decay=0.0),
        clip=None,
        seed=seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress(description, steps) as advance:
        train.fit(model, _squared, batches, settings, on_step=lambda _: advance(1))
    return model.eval()


def _variation(load: Tensor) -> float:
    return float(load.std(unbiased=False) / load.mean())


def _largest(load: Tensor) -> float:
    return float(load.max() / load.mean())


def _draw_loads(lab: Lab, even: Tensor, uneven: Tensor) -> None:
    with lab.figure("loads", figsize=(7.0, 2.8)) as figure:
        axes = figure.subplots()
        for shift, load, color, label in ((-0.2, even, COLORS[0], "both losses"), (0.2, uneven, CONTROL, "no losses")):
            places = [place + shift for place in range(COUNT)]
            axes.bar(places, sorted(load.tolist(), reverse=True), width=0.38, color=color, label=label)
        axes.axhline(1 / COUNT, color=COLORS[1], linewidth=1.2)
        axes.text(COUNT - 0.5, 1 / COUNT, "even", color=COLORS[1], va="bottom", ha="right")
        axes.set(title="Share of choices, by expert", xlabel="experts, most used first", xticks=[])
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right", ncols=2)
        axes.set_ylim(0, 1.35 * float(uneven.max()))
