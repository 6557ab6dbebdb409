"""Sparsely-gated mixtures of experts: noisy top-k gating, and the two losses that keep all experts at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict
from paperworks.nn import MLP, Experts, Feedforward, NoisyTopKRouter
from paperworks.nn.feedforward.experts.routers import smooth_load
from paperworks.testbeds.training import fit

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
    equation=(
        r"y = \sum_i G(x)_i E_i(x), \quad G(x) = \operatorname{softmax}(\operatorname{top}_k("
        r"x W_g + \epsilon \odot \operatorname{softplus}(x W_n)))"
    ),
    usage="""
import torch
from paperworks.nn import auxiliary
from paperworks.nn import MLP, Experts, NoisyTopKRouter

spec = Experts(expert=MLP(hidden=64), count=8, top=2, router=NoisyTopKRouter(importance=0.1, load=0.1))
layer = spec.build(32)  # a part like any other: Block(mixer, feedforward=spec) puts it into a model
with auxiliary.collecting() as losses:
    out = layer(torch.randn(4, 16, 32))
print(tuple(out.shape), "balance losses:", float(losses.total().detach()))
""",
)

COUNT, TOP, DIM = 8, 2, 16
HIDDEN = 16  # units of an expert: as many as inputs, so that two clusters do not fit into one expert
BATCH = 256
LR = 0.01

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@paper.claim(
    "k experts at most work on a token, the gates begin uniform, and the load loss counts what it should",
    paper="Equations 3 to 5 (noisy top-k gating), Appendix A: Equations 8 to 10 and the initialization with zeros",
    kind="exact",
    control="the threshold of the load taken among all experts, the token's own included",
)
@torch.no_grad()
def gating_is_the_papers(lab: Lab) -> Verdict:
    """Compare with a dense sum over all experts, and the smooth load with draws of fresh noise."""
    draws = lab.generator(lab.seed)
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
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)  # outputs near 1, on which a tolerance says something
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
    """Train each on eight clusters of points, a linear map for each; count choices and errors on other points."""
    steps = lab.pick(smoke=3, small=800)
    relu = MLP(hidden=HIDDEN, activation="relu")
    specs: dict[str, Feedforward] = {
        "both losses": Experts(expert=relu, count=COUNT, top=TOP, router=NoisyTopKRouter()),
        "no losses": Experts(expert=relu, count=COUNT, top=TOP, router=NoisyTopKRouter(importance=0.0, load=0.0)),
        "dense": MLP(hidden=TOP * HIDDEN, activation="relu"),
    }

    def arm(spec: Feedforward) -> Callable[[int], dict[str, float | list[float]]]:
        def measures(seed: int) -> dict[str, float | list[float]]:
            draw = _clusters(lab.generator(seed))
            model: Any = spec.build(DIM)
            adam = train.AdamW(weight_decay=0.0)
            batches = [draw(BATCH, lab.generator(steps * seed + step)) for step in range(steps)]
            with lab.threads(1):
                fit(
                    model, _squared, batches, steps=steps, lr=LR, seed=seed,
                    optimizer=adam, schedule="constant", warmup=0, clip=None,
                )  # fmt: skip
            test = draw(4096, lab.generator(10**6 + seed))
            model.eval()
            with torch.no_grad():
                error = float(_squared(model, test))
                chosen = model.router(test[0]).experts.flatten() if isinstance(spec, Experts) else torch.arange(COUNT)
            load = torch.bincount(chosen, minlength=COUNT).double()
            return {
                "CV(load)": float(load.std(unbiased=False) / load.mean()),
                "largest load / mean": float(load.max() / load.mean()),
                "test error": error,
                "load / mean, most used first": sorted((load / load.mean()).tolist(), reverse=True),
            }

        return measures

    verdict = lab.compare(
        arms={name: arm(spec) for name, spec in specs.items()},
        main=Beats("both losses", "no losses", on="CV(load)", by=0.1, lower=True),
        also=[
            AtMost("both losses", 0.1, on="CV(load)"),
            AtMost("both losses", 1.2, on="largest load / mean"),
            Beats("both losses", "no losses", on="test error", lower=True),
            Beats("both losses", "dense", on="test error", lower=True),
        ],
        seeds=3,
        note=f"{COUNT} experts of {HIDDEN} ReLU units, k = 2, {DIM} dimensions, {steps} steps of {BATCH} points; loads "
        "on 4,096 other points, without noise. The dense layer has as many units as a token meets, and no load. Gates "
        "that begin at zero, and noise, keep every expert alive at this size even without the losses.",
    )
    lab.curves("load / mean, most used first", arms=["both losses", "no losses"], name="loads", title="Load by expert")
    return verdict


def _clusters(world: torch.Generator) -> Draw:
    """A function (rows, generator) -> (points, targets): eight clusters, the targets of each a linear map."""
    centres = torch.randn(COUNT, DIM, generator=world)
    maps = torch.randn(COUNT, DIM, DIM, generator=world) / DIM**0.5

    def draw(rows: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        cluster = torch.randint(COUNT, (rows,), generator=draws)
        points = centres[cluster] + 0.3 * torch.randn(rows, DIM, generator=draws)
        return points, torch.einsum("noi,ni->no", maps[cluster], points)

    return draw


def _squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()
