"""LoRA: what fine-tuning changes in a weight has low rank, so train two thin matrices and freeze the rest."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from paperworks import adapt, api
from paperworks.adapt.lora import LowRankDelta
from paperworks.core.linear import weight_of
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import DecoderModel
from paperworks.papers.adaptation.lora.subspaces import subspace_similarity
from paperworks.testbeds.facts import THINGS, batches, draw_facts, loss, recalled, sentences, teach
from paperworks.testbeds.pictures import Classes, Images, accuracy, fit, network
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    authors="Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen",
    year=2021,
    ref="arXiv:2106.09685",
    family="adaptation",
    summary=(
        "A frozen weight W0 plus a trained product B A of rank r, B zero at first: a fraction of a percent of the "
        "parameters adapts a language model, and the product can be merged into the weight when it is done."
    ),
    implements=(
        "paperworks.adapt.lora.LoRA",
        "paperworks.adapt.lora.LowRankDelta",
        "paperworks.adapt.delta.AdaptedLinear",
        "paperworks.adapt.merging.merge",
        "paperworks.papers.adaptation.lora.subspaces.subspace_similarity",
    ),
)

QUERY_VALUE = "blocks.*.mixer.{query,value}"


def _low_rank(rank: int = 8) -> adapt.LoRA:
    return adapt.LoRA(rank=rank, alpha=2 * rank)  # a scale of 2


def _adapted(lab: Lab, model: DecoderModel, part: str) -> DecoderModel:
    """Put rank-8 adapters on a copy of a model, and let `part` of them be trained: "both", "down" (A) or "neither"."""
    torch.manual_seed(lab.seed)
    adapted = copy.deepcopy(model)
    adapt.apply(adapted, _low_rank(), QUERY_VALUE)
    for layer in adapt.adapted(adapted).values():
        assert isinstance(layer.delta, LowRankDelta)
        layer.delta.up.requires_grad_(part == "both")
        layer.delta.down.requires_grad_(part != "neither")
        if part == "neither":
            nn.init.kaiming_uniform_(layer.delta.up, a=5**0.5)
    return adapted


@paper.claim(
    "Training 0.34% of the parameters teaches SmolLM2 sixty new facts, and leaves the rest bit for bit",
    paper="Abstract and Table 4: GPT-3 175B adapted with 10,000 times fewer trained parameters (4.7 and 37.7 million), "
    "as well as by training all of them: WikiSQL 73.4 and 74.0 against 73.8",
    control="the same adapters with B never updated, and with A and B random and frozen",
    tour=3,
)
def learns_with_few_parameters(lab: Lab) -> Verdict:
    """Train rank-8 adapters on query and value, and compare with adapters that may not use B."""
    model = smollm2(lab)
    count, size, steps = lab.pick(smoke=(3, 2, 2), small=(60, 12, 80), large=(60, 12, 200))
    facts = draw_facts(lab, model.tokenizer, count)
    model.tokenizer = None
    rows = batches(facts, size, steps, lab.seed)
    before, known_before = loss(model, facts), recalled(model, facts)
    ours, without = _adapted(lab, model, "both"), _adapted(lab, model, "down")
    trained = adapt.trainable_parameters(ours)
    curve = teach(lab, ours, rows, 2e-3, "A and B trained")
    # While B is zero, A has no gradient: a few steps show that nothing moves, and more would cost time only.
    control_curve = teach(lab, without, rows[:10], 2e-3, "B never updated")
    unmoved = _adapters_are_equal(without, _adapted(lab, model, "down"))
    after, known = loss(ours, facts), recalled(ours, facts)
    idle, frozen = loss(without, facts), loss(_adapted(lab, model, "neither"), facts)
    with adapt.disabled(ours):
        restored = loss(ours, facts)
    identical = _base_is_identical(model, ours)
    total = sum(parameter.numel() for parameter in model.parameters())
    _draw_losses(lab, curve, control_curve, idle)
    asked = sentences(count, lab.seed)[: min(3, count)]
    lab.text("Facts no model could know, such as", "\n".join(asked))
    return lab.judge(
        checks={
            "the loss is halved": after < 0.5 * before,
            "at least half of the facts are recalled": known >= count / 2,
            "at least 30% below the same adapters with B never updated": after < 0.7 * idle,
            "at least 30% below random frozen adapters": after < 0.7 * frozen,
            "without B, training A moves no bit of the adapters": unmoved,
            "under 1% of the parameters were trained": trained < 0.01 * total,
            "every weight of the model is the same, bit for bit": identical,
            "and switched off, the model is the old one": restored == before,
        },
        measured={
            "loss before": before,
            "loss after": after,
            "share of parameters trained": trained / total,
            "parameters trained": trained,
            "facts recalled, before and after": [known_before, known],
            "steps": steps,
        },
        control={
            "loss, B never updated": idle,
            "loss, random A and B": frozen,
            "facts recalled, B never updated": recalled(without, facts),
            "steps": len(control_curve),
        },
        note=f"{count} sentences such as these, each with one of 20 things drawn for it; the loss is that of the thing "
        "alone (guessing among the things would be ln 20 = 3.0). Rank 8 on query and value of all 30 layers, scale 2, "
        f"AdamW at 2e-3, {steps} steps of {size} sentences.",
    )


def _base_is_identical(model: DecoderModel, adapted: DecoderModel) -> bool:
    theirs = dict(adapted.named_parameters())
    pairs = []
    for name, value in model.named_parameters():
        inside = name.replace(".weight", ".base.weight")
        pairs.append((value, theirs[name] if name in theirs else theirs[inside]))
    return all(torch.equal(one, other) for one, other in pairs)


def _adapters_are_equal(one: DecoderModel, other: DecoderModel) -> bool:
    others = adapt.adapted(other)
    return all(
        torch.equal(value, others[path].delta.state_dict()[name])
        for path, layer in adapt.adapted(one).items()
        for name, value in layer.delta.state_dict().items()
    )


def _draw_losses(lab: Lab, curve: list[float], control: list[float], idle: float) -> None:
    with lab.figure("loss", figsize=(7.6, 3.4)) as figure:
        axes = figure.subplots()
        axes.plot([0, len(curve)], [idle, idle], ":", color=CONTROL)
        axes.plot(range(1, len(control) + 1), control, color=CONTROL, label="B never updated (control): it stays there")
        axes.plot(range(1, len(curve) + 1), curve, color=COLORS[0], label="A and B trained, 0.34% of the parameters")
        axes.axhline(math.log(len(THINGS)), color=INK, linewidth=0.8, linestyle=":")
        axes.text(len(curve), math.log(len(THINGS)) + 0.2, "guessing among the things", ha="right", fontsize=9)
        axes.set_ylim(bottom=0, top=max([idle, *curve, *control]) * 1.05)
        axes.set_xlabel("optimization steps")
        axes.set_title("Loss on the facts of each batch, in nats")
        axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.9))


NOISES = (0.5, 1.0)  # standard deviation of the noise on images whose own is about 0.7
RANKS = (1, 2, 4, 8)
RATES = (1e-3, 3e-3, 1e-2)  # each method has the best of these


def _fit_images(lab: Lab, model: nn.Module, data: Images, rate: float) -> None:
    fit(model, data, steps=lab.pick(smoke=5, small=400), rate=rate, seed=lab.seed, batch=64)


def _prepared(base: nn.Module, rank: int | None = None, only_biases: bool = False) -> nn.Module:
    """Return a copy of a network with adapters of a rank on all layers, or its biases alone to train, or all of it."""
    model = copy.deepcopy(base)
    if rank is not None:
        adapt.apply(model, adapt.LoRA(rank=rank), "all-linear")
    if only_biases:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    return model


@paper.claim(
    "Rank 4 on every layer reaches most of what training every weight does",
    paper="Tables 2 to 4 and 6: adapters of rank 4 and 8 equal full fine-tuning, rank 1 nearly; training the biases "
    "alone (BitFit) comes near on GLUE and falls behind on GPT-3",
    control="training the biases alone, the paper's baseline",
)
def small_ranks_reach_most(lab: Lab) -> Verdict:
    """Train a network on five classes, then adapt it to ten classes of images turned by a quarter."""
    shares: dict[float, dict[str, float]] = {}
    methods: dict[str, dict[str, Any]] = {f"rank {rank}": {"rank": rank} for rank in RANKS}
    methods |= {"biases alone": {"only_biases": True}, "every weight": {}}
    with lab.threads(1):
        for noise in lab.track(NOISES, "noise"):
            upright, turned = (Classes.smooth(6, noise, degrees=degrees) for degrees in (0, 90))
            base = network(lab.seed)
            _fit_images(lab, base, upright.draw(4000, 10 * lab.seed + 1, classes=5), 3e-3)
            data, held_out = turned.draw(1200, 10 * lab.seed + 2), turned.draw(4000, 10 * lab.seed + 3)
            found = {name: _best(lab, base, options, data, held_out) for name, options in methods.items()}
            start = accuracy(base, held_out)
            # A smoke run may gain nothing at all, so the divisor is kept away from zero.
            gain = max(found["every weight"] - start, 1e-6)
            shares[noise] = {name: (value - start) / gain for name, value in found.items()}
            shares[noise] |= {"accuracy before": start, "accuracy, every weight": found["every weight"]}
    lab.table(
        "Share of the gain of full fine-tuning, on held-out images",
        ["method", *(f"noise {noise}" for noise in NOISES)],
        [[name, *(shares[noise][name] for noise in NOISES)] for name in methods],
    )
    easy, hard = (shares[noise] for noise in NOISES)
    return lab.judge(
        checks={
            "at least 80% of the gain at rank 4, noise 0.5": easy["rank 4"] >= 0.8,
            "at least 80% of the gain at rank 4, noise 1.0": hard["rank 4"] >= 0.8,
            "less with rank 1": easy["rank 1"] < easy["rank 4"] and hard["rank 1"] < hard["rank 4"],
            "less than a third of that with the biases alone": all(
                share["biases alone"] < share["rank 4"] / 3 for share in shares.values()
            ),
        },
        measured={
            **{
                f"share of the gain, rank {rank}": [shares[noise][f"rank {rank}"] for noise in NOISES] for rank in RANKS
            },
            "accuracy before": [shares[noise]["accuracy before"] for noise in NOISES],
            "accuracy, every weight": [shares[noise]["accuracy, every weight"] for noise in NOISES],
            "noise": list(NOISES),
        },
        control={"share of the gain, biases alone": [shares[noise]["biases alone"] for noise in NOISES]},
        note="Generated images stand in for real ones. A network of 64-64-64-10 learns five classes upright, "
        "then ten classes turned by a quarter: 1,200 images, 400 steps of AdamW, the best of three learning rates for "
        "each method, alpha = r. A first layer that has to be turned is a harder case than a language model's task.",
    )


def _best(lab: Lab, base: nn.Module, options: dict[str, Any], data: Images, held_out: Images) -> float:
    """Return the best held-out accuracy over the learning rates."""
    found = []
    for rate in RATES:
        torch.manual_seed(lab.seed)
        model = _prepared(base, **options)
        _fit_images(lab, model, data, rate)
        found.append(accuracy(model, held_out))
    return max(found)


@paper.claim(
    "Adapters of rank 4 and 16, trained apart, find the same directions",
    paper="Section 7.2, Figures 3 and 4: the top singular directions of A at r = 8 and at r = 64 overlap by more than "
    "0.5, as do those of two seeds; those of two random matrices do not",
    control="the same adapters before they are trained",
)
def ranks_share_directions(lab: Lab) -> Verdict:
    """Adapt the network to turned images from several starts, and compare the four top directions of each A."""
    pairs = {"ranks 4 and 16": ((4, 0), (16, 1)), "rank 16, two seeds": ((16, 1), (16, 3))}
    overlaps: dict[str, dict[str, list[float]]] = {name: {} for name in pairs}
    with lab.threads(1):
        upright, turned = (Classes.smooth(6, NOISES[0], degrees=degrees) for degrees in (0, 90))
        base = network(lab.seed)
        _fit_images(lab, base, upright.draw(4000, 10 * lab.seed + 1, classes=5), 3e-3)
        data = turned.draw(1200, 10 * lab.seed + 2)
        starts, ends = {}, {}
        for rank, seed in lab.track(sorted({which for pair in pairs.values() for which in pair}), "adapters"):
            torch.manual_seed(10 * lab.seed + seed)
            model = adapt.apply(copy.deepcopy(base), adapt.LoRA(rank=rank), ["0", "2"])
            starts[rank, seed] = _down(model)
            _fit_images(lab, model, data, RATES[-1])
            ends[rank, seed] = _down(model)
    for name, (one, other) in pairs.items():
        for when, downs in (("before", starts), ("after", ends)):
            overlaps[name][when] = [
                float(subspace_similarity(mine, its)[3, 3]) for mine, its in zip(downs[one], downs[other], strict=True)
            ]
    lab.table(
        "Overlap phi(4, 4) of the four top directions of A: 1 is the same subspace, chance gives 0.06",
        ["adapters", "layer", "before training", "after"],
        [
            [name, number + 1, *(found[when][number] for when in ("before", "after"))]
            for name, found in overlaps.items()
            for number in range(2)
        ],
    )
    return lab.judge(
        checks={
            f"{name}: at least three times the overlap before training, in both layers": all(
                after >= 3 * before for before, after in zip(found["before"], found["after"], strict=True)
            )
            for name, found in overlaps.items()
        },
        measured={f"overlap, {name}": found["after"] for name, found in overlaps.items()},
        control={f"overlap before training, {name}": found["before"] for name, found in overlaps.items()},
        note="The two hidden layers of the network of the claim above, noise 0.5, a learning rate of 0.01. The factor "
        "of three is ours.",
    )


def _down(model: nn.Module) -> list[Tensor]:
    """Return a copy of A of each adapted layer."""
    return [layer.delta.state_dict()["down"].clone() for layer in adapt.adapted(model).values()]


@paper.claim(
    "Adapters train r (d + k) parameters a matrix: 18.9 million of GPT-3's 175 billion at rank 4",
    paper="Section 4.2 and Tables 2, 4 and 18: 18M for r = 4 and 4.7M for r = 1 on W_q, W_v of GPT-3; 0.3M for "
    "RoBERTa-base at r = 8",
    kind="exact",
)
def parameter_counts(lab: Lab) -> Verdict:
    """Put adapters on matrices of the models' sizes, without memory for them, and count."""
    counted = {
        "GPT-3 175B, r = 4": (_count(96, 12_288, adapt.LoRA(rank=4)), 18_874_368),
        "GPT-3 175B, r = 1": (_count(96, 12_288, adapt.LoRA(rank=1)), 4_718_592),
        "RoBERTa base, r = 8": (_count(12, 768, adapt.LoRA(rank=8)), 294_912),
    }
    with torch.device("meta"):
        small = api.build(api.preset("smollm2-135m"))
    ours = adapt.trainable_parameters(adapt.apply(small, adapt.LoRA(rank=8), QUERY_VALUE))
    counted["SmolLM2-135M, r = 8"] = (ours, 30 * 8 * ((576 + 576) + (576 + 192)))
    lab.table(
        "Trained parameters, adapters on query and value",
        ["model", "counted", "sum of r (d + k)"],
        [[name, found, formula] for name, (found, formula) in counted.items()],
    )
    return lab.judge(
        checks={name: found == formula for name, (found, formula) in counted.items()},
        measured={name: found for name, (found, _) in counted.items()},
    )


def _count(depth: int, dim: int, adapter: adapt.LoRA) -> int:
    """Return what `adapter` trains on the query and value matrices of `depth` layers of width `dim`."""
    with torch.device("meta"):
        layers = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(dim, dim), "value": nn.Linear(dim, dim)}) for _ in range(depth)
        )
    return adapt.trainable_parameters(adapt.apply(layers, adapter, "*.{query,value}"))


@paper.claim(
    "An adapter changes nothing at first, has rank r, and merges into the weight",
    paper="Section 4.1: B is zero at the start, so is B A; the update is scaled by alpha / r; W0 + B A can be computed "
    "and stored, so that inference costs nothing more",
    kind="exact",
)
def starts_at_zero_and_merges(lab: Lab) -> Verdict:
    """Compare a small model bare, freshly adapted, with a random B, and merged, in float64."""
    spec = replace(api.preset("smollm2-135m"), vocab_size=512, dim=576, depth=2)
    model = api.build(spec).double()
    tokens = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(lab.seed))
    with torch.no_grad():
        bare = model(tokens)
    weights = {path: module.weight.detach().clone() for path, module in _matrices(model).items()}
    adapt.apply(model, adapt.LoRA(rank=4, alpha=12), QUERY_VALUE)
    model.double()
    gradients_of_a = _gradients_at_zero(model, tokens)
    fresh = model(tokens).detach()
    draws = torch.Generator().manual_seed(lab.seed)
    for layer in adapt.adapted(model).values():
        assert isinstance(layer.delta, LowRankDelta)
        layer.delta.up.data = 0.1 * torch.randn(layer.delta.up.shape, generator=draws, dtype=torch.float64)
    deltas = {path: layer.delta for path, layer in adapt.adapted(model).items()}
    ranks = [int(torch.linalg.matrix_rank(delta.weight())) for delta in deltas.values()]
    # By hand, with the paper's symbols: (alpha / r) B A.
    by_hand = {path: weights[path] + 12 / 4 * delta.up.detach() @ delta.down.detach() for path, delta in deltas.items()}  # type: ignore[operator]
    with torch.no_grad():
        unmerged = model(tokens)
        merged = adapt.merge(model)(tokens)
    off = max(
        (weight_of(module).detach() - by_hand[path]).abs().max().item() for path, module in _matrices(model).items()
    )
    moved, apart = (unmerged - bare).abs().max().item(), (merged - unmerged).abs().max().item()
    return lab.judge(
        checks={
            "at first no bit of the output changes": torch.equal(fresh, bare),
            "and A has no gradient, because B is zero": gradients_of_a == 0.0,
            "the update has rank 4": set(ranks) == {4},
            # merge rounds W0 + scale B A to float32 before it is stored: 2^-24 of weights below 1, through two layers.
            "merged equals unmerged, to 1e-5": apart < 1e-5,
            "the merged weight is W0 + (alpha / r) B A, to 1e-6": off < 1e-6,
            "which is not what the model was": moved > 1e-2,
        },
        measured={
            "largest difference of logits, merged": apart,
            "largest change of logits by the adapters": moved,
            "largest difference of merged weights": off,
            "ranks": sorted(set(ranks)),
        },
    )


def _matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the plain query and value layers by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith((".query", ".value"))
    }


def _gradients_at_zero(model: DecoderModel, tokens: Tensor) -> float:
    """Return the largest gradient of any A while B is zero."""
    model(tokens).square().sum().backward()
    deltas = [layer.delta for layer in adapt.adapted(model).values()]
    return max(delta.down.grad.abs().max().item() for delta in deltas)  # type: ignore[union-attr, operator]
