"""MoRA: with the parameters of two thin matrices, one square one, whose update has a far higher rank."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import adapt, train
from paperworks.adapt.contract import Adapter
from paperworks.adapt.mora import SquareDelta
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL

paper = Paper(
    key="mora",
    title="MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning",
    authors="Jiang, Huang, Luo, Zhang, Huang, Wei, Deng, Sun, Zhang, Wang, Zhuang",
    year=2024,
    ref="arXiv:2405.12130",
    family="adaptation",
    summary=(
        "Low-rank updates learn tasks but struggle to memorize. A square matrix of as many parameters, between two "
        "operators without any, gives an update of high rank that still merges into the weight."
    ),
    implements=(
        "paperworks.adapt.mora.MoRA",
        "paperworks.adapt.mora.SquareDelta",
        "paperworks.adapt.mora.remora",
    ),
)

LENGTH, DIGITS = 8, 16  # keys and values of eight hexadecimal digits, as pieces of UUIDs
RATES = (3e-3, 1e-2, 3e-2)  # each method has the best of these
ENOUGH = 0.9  # the accuracy whose first step is compared


@dataclass(frozen=True)
class Pairs:
    """Random keys, one-hot, and the digits of their values."""

    keys: Float[Tensor, "pairs 128"]
    values: Int[Tensor, "pairs 8"]


def _pairs(count: int, seed: int) -> Pairs:
    draws = torch.Generator().manual_seed(seed)
    keys = torch.randint(DIGITS, (count, LENGTH), generator=draws)
    values = torch.randint(DIGITS, (count, LENGTH), generator=draws)
    return Pairs(functional.one_hot(keys, DIGITS).flatten(1).float(), values)


def _base(seed: int) -> nn.Sequential:
    """A random network that nobody trained: 128-256-256-128."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128))


@dataclass
class Run:
    """The course of one training: accuracy of the digits before each step, or the error where there are none."""

    curve: list[float] = field(default_factory=list)

    @property
    def last(self) -> float:
        """Where it ended."""
        return self.curve[-1]

    def steps_to(self, accuracy: float) -> int | None:
        """The first step at which so many digits were right."""
        return next((step for step, value in enumerate(self.curve) if value >= accuracy), None)


def _memorize(lab: Lab, adapter: Adapter, rate: float, pairs: Pairs, steps: int, *, stop: bool) -> Run:
    """Train an adapter on all pairs at once; stop where enough are known, if asked to."""
    model, run = _base(lab.seed), Run()
    adapt.apply(model, adapter, "all-linear")

    def loss(model: nn.Module, batch: Pairs) -> Tensor:
        logits = model(batch.keys).unflatten(1, (LENGTH, DIGITS))
        run.curve.append((logits.argmax(-1) == batch.values).float().mean().item())
        return functional.cross_entropy(logits.flatten(0, 1), batch.values.flatten())

    _fit(model, loss, pairs, steps, rate, lambda _: stop and run.last >= ENOUGH)
    return run


def _fit(model: nn.Module, loss: Any, batch: Any, steps: int, rate: float, on_step: Any = None) -> None:
    settings = train.Settings(
        steps=steps,
        lr=rate,
        optimizer=train.AdamW(weight_decay=0.0),
        warmup=0,
        schedule="constant",
        clip=None,
        seed=None,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    train.fit(model, loss, [batch], settings, on_step=on_step)


def _parameters(adapter: Adapter) -> int:
    return adapt.trainable_parameters(adapt.apply(_base(0), adapter, "all-linear"))


@paper.claim(
    "At rank 8, MoRA memorizes 300 pairs in half of LoRA's steps; at rank 2, with too few parameters, it knows more",
    paper="Section 3 and Figure 2: 10,000 pairs of UUIDs; LoRA at rank 8 stays far from full fine-tuning, MoRA at rank "
    "8 comes close with the same number of parameters",
    control="LoRA with as many parameters; and MoRA that truncates its input",
)
def memorizes_faster(lab: Lab) -> Verdict:
    """Let both memorize random pairs of keys and values on a frozen random network, each at its best rate."""
    pairs = _pairs(lab.pick(smoke=30, small=300), lab.seed)
    steps = lab.pick(smoke=4, small=700)
    rates = lab.pick(smoke=RATES[:1], small=RATES)
    tried: dict[tuple[str, int], Adapter] = {
        ("MoRA", 8): adapt.MoRA(rank=8),
        ("LoRA", 8): adapt.LoRA(rank=8, alpha=16),
        ("MoRA", 2): adapt.MoRA(rank=2),
        ("LoRA", 2): adapt.LoRA(rank=2, alpha=4),
        ("truncation", 2): adapt.MoRA(rank=2, kind="truncation"),
    }
    best: dict[tuple[str, int], Run] = {}
    with lab.threads(1):
        for (name, rank), adapter in lab.track(list(tried.items()), "adapters"):
            runs = [_memorize(lab, adapter, rate, pairs, steps, stop=rank == 8) for rate in rates]
            best[name, rank] = max(runs, key=lambda run: (-(run.steps_to(ENOUGH) or steps + 1), run.last))
    ours, theirs = (best[name, 8].steps_to(ENOUGH) for name in ("MoRA", "LoRA"))
    limit = steps if theirs is None else theirs  # a run that never came so far took at least all the steps
    _draw(lab, best)
    lab.table(
        f"{len(pairs.keys)} pairs: steps until 90% of the digits are known, and what is known after {steps} steps",
        ["adapter", "rank", "parameters", "steps to 90%", "digits known at the end"],
        [
            [name, rank, _parameters(tried[name, rank]), run.steps_to(ENOUGH) or "never", run.last]
            for (name, rank), run in best.items()
        ],
    )
    return lab.judge(
        checks={
            "at rank 8, at most half of LoRA's steps to 90%": ours is not None and ours <= 0.5 * limit,
            "at rank 2, at least 15 points more digits than LoRA": best["MoRA", 2].last >= best["LoRA", 2].last + 0.15,
            "at rank 2, more than by truncation": best["MoRA", 2].last > best["truncation", 2].last,
            "with as many parameters, up to the rounding of the side": all(
                abs(_parameters(tried["MoRA", rank]) / _parameters(tried["LoRA", rank]) - 1) < 0.05 for rank in (2, 8)
            ),
        },
        measured={
            "steps to 90%, MoRA, rank 8": ours if ours is not None else f"over {steps}",
            "digits known, MoRA, rank 2": best["MoRA", 2].last,
            "parameters, rank 8": _parameters(tried["MoRA", 8]),
        },
        control={
            "steps to 90%, LoRA, rank 8": theirs if theirs is not None else f"over {steps}",
            "digits known, LoRA, rank 2": best["LoRA", 2].last,
            "digits known, truncation, rank 2": best["truncation", 2].last,
            "parameters, rank 8": _parameters(tried["LoRA", 8]),
        },
        note="Keys and values are eight random hexadecimal digits, keys one-hot, on a frozen random network of "
        "128-256-256-128 with ReLU; all pairs in every step, the best of three rates for each. LoRA's scale is 2.",
    )


def _draw(lab: Lab, best: dict[tuple[str, int], Run]) -> None:
    colors = {"MoRA": COLORS[0], "LoRA": CONTROL, "truncation": COLORS[1]}
    with lab.figure("digits-known", figsize=(8.0, 3.2)) as figure:
        for axes, rank in zip(figure.subplots(1, 2, sharey=True), (8, 2), strict=True):
            for (name, which), run in best.items():
                if which == rank:
                    axes.plot(range(1, len(run.curve) + 1), run.curve, color=colors[name], label=name)
            axes.set_xscale("log")
            axes.set_ylim(0, 1)
            axes.set_xlabel("optimization steps")
            axes.set_title(f"Digits known, rank {rank}")
            axes.legend(loc="upper left")


@paper.claim(
    "Where the target itself has low rank, LoRA is at least as good",
    paper="Sections 1 and 5: on instruction tuning, where little has to be memorized, MoRA only equals LoRA",
    control="LoRA of the same number of parameters, which here must win",
)
def low_rank_targets_suit_lora(lab: Lab) -> Verdict:
    """Fit a network to a copy of it that was changed by updates of rank 2."""
    torch.manual_seed(lab.seed)
    teacher = adapt.apply(_base(lab.seed), adapt.LoRA(rank=2), "all-linear")
    for layer in adapt.adapted(teacher).values():
        nn.init.normal_(layer.deltas["default"].up, std=0.3)  # type: ignore[arg-type]
    x = torch.randn(512, 128)
    with torch.no_grad():
        goal, start = teacher(x), _base(lab.seed)(x)
    steps = lab.pick(smoke=3, small=400)
    found: dict[str, float] = {}
    adapters: dict[str, Adapter] = {"LoRA": adapt.LoRA(rank=2), "MoRA": adapt.MoRA(rank=2)}
    with lab.threads(1):
        for name, adapter in lab.track(list(adapters.items()), "adapters"):
            found[name] = min(_mimic(lab, adapter, x, goal, steps, rate) for rate in RATES)
    scale = functional.mse_loss(start, goal).item()
    return lab.judge(
        checks={
            "LoRA's error is no larger than MoRA's": found["LoRA"] <= found["MoRA"],
            "and it removes nine tenths of what there was": found["LoRA"] < 0.1 * scale,
        },
        measured={"error left, MoRA": found["MoRA"] / scale},
        control={"error left, LoRA": found["LoRA"] / scale},
        note=f"Mean squared error on 512 random inputs after {steps} steps over that before, best of three rates.",
    )


def _mimic(lab: Lab, adapter: Adapter, x: Tensor, goal: Tensor, steps: int, rate: float) -> float:
    model = adapt.apply(_base(lab.seed), adapter, "all-linear")
    _fit(model, lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]), (x, goal), steps, rate)
    with torch.no_grad():
        return functional.mse_loss(model(x), goal).item()


@paper.claim(
    "The square has LoRA's number of parameters and the rank that LoRA lacks, and merges into the weight",
    paper="Section 4 and Equations 4 to 9: r-hat = 256 where LoRA has r = 8 on 4096 x 4096",
    kind="exact",
)
def parameters_and_rank(lab: Lab) -> Verdict:
    """Count parameters, compute ranks of random updates, and compare with the layer before and after."""
    kinds = ("sharing", "grouped", "grouped-tiled", "tiled-grouped")
    shapes = lab.pick(smoke=[(96, 64)], small=[(256, 256), (256, 128), (128, 256)])
    square = adapt.LayerInfo(in_features=4096, out_features=4096)
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in adapter.build(square).parameters())
            for adapter in (adapt.MoRA(rank=8, kind="sharing"), adapt.LoRA(rank=8))
        ]
    off, ranks = 0.0, []
    rows: list[list[Any]] = []
    for shape in shapes:
        for kind in (*kinds, "rotation"):
            delta = _random_square(kind, shape, lab.seed)
            rank, side = int(torch.linalg.matrix_rank(delta.weight())), len(delta.square)
            wanted = min(shape) if kind == "rotation" else side
            ranks.append(rank == wanted)
            rows.append([f"{shape[1]} x {shape[0]}", kind, side, rank])
            off = max(off, _merge_difference(delta, shape))
    delta = _random_square("sharing", (128, 128), lab.seed, rank=4)  # side 32 divides 128
    i, j = torch.arange(128)[:, None] % 32, torch.arange(128) % 32
    tiles = bool((delta.weight() - delta.square[i, j]).abs().max() < 1e-12)
    lab.table(
        "Rank of an update with a random square, parameters of LoRA's rank 4", ["layer", "kind", "side", "rank"], rows
    )
    return lab.judge(
        checks={
            "65,536 parameters on 4096 x 4096, as LoRA's rank 8": sizes == [65_536, 65_536],
            "the rank is the square's side, with rotations the layer's": all(ranks),
            "sharing is a matrix of tiles": tiles,
            "merged equals unmerged, to 1e-12 in float64": off < 1e-12,
        },
        measured={"parameters": sizes, "largest relative difference, merged": off},
    )


def _random_square(kind: Any, shape: tuple[int, int], seed: int, rank: int = 4) -> SquareDelta:
    delta = (
        adapt.MoRA(rank=rank, kind=kind).build(adapt.LayerInfo(in_features=shape[0], out_features=shape[1])).double()
    )
    assert isinstance(delta, SquareDelta)
    with torch.no_grad():
        delta.square.normal_(generator=torch.Generator().manual_seed(seed))
    return delta


def _merge_difference(delta: SquareDelta, shape: tuple[int, int]) -> float:
    """Return how far the merged layer's outputs are from the unmerged one's, relative to the largest."""
    model = adapt.apply(nn.Sequential(nn.Linear(*shape)).double(), adapt.MoRA(rank=4, kind=delta.kind), "0")
    layer = adapt.adapted(model)["0"]
    layer.deltas["default"] = copy.deepcopy(delta)
    x = torch.randn(8, shape[0], dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        return ((adapt.merge(model)(x) - before).abs().max() / before.abs().max()).item()
