"""Handwriting synthesis: a mixture density says where the pen goes next, a soft window which character it is at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from paperworks import train
from paperworks.interpret import record
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models.classic.handwriting import (
    Handwriting,
    HandwritingModel,
    handwriting_loss,
    stroke_nats,
    synthesize,
)
from paperworks.nn import LSTM, Placement
from paperworks.nn.mixture_density import StrokeDensity, StrokeMixture
from paperworks.testbeds.strokes import Hand, Strokes
from paperworks.testbeds.training import fit

paper = Paper(
    key="graves-lstm",
    title="Generating Sequences With Recurrent Neural Networks",
    authors="Graves",
    year=2013,
    ref="arXiv:1308.0850",
    family="recurrent",
    summary=(
        "LSTMs with peepholes, one on the other, predict a density over where a pen goes next; a window that they move "
        "along a text themselves makes them write it."
    ),
    implements=(
        "paperworks.nn.recurrent.classic.LSTM",
        "paperworks.nn.mixture_density.StrokeMixture",
        "paperworks.nn.mixture_density.StrokeDensity",
        "paperworks.models.classic.handwriting.Handwriting",
        "paperworks.models.classic.handwriting.synthesize",
        "paperworks.train.optim.rmsprop_graves.RMSPropGraves",
        "paperworks.models.classic.clipped_backward.clipped_backward",
    ),
    equation=(
        r"\Pr(x_{t+1} \mid y_t) = \sum_j \pi^j_t \, \mathcal N(x_{t+1} \mid \mu^j_t, \sigma^j_t, \rho^j_t) \cdot "
        r"\text{Bernoulli}(e_t)"
    ),
    usage="""
import torch
from paperworks.models.classic.handwriting import Handwriting, synthesize
from paperworks.nn.mixture_density import StrokeMixture

model = Handwriting(characters=10, hidden=64, layers=2, window=3, mixture=StrokeMixture(components=8)).build().eval()
strokes, window, ended = synthesize(model, torch.tensor([2, 0, 1, 3]), most=50, bias=1.0)  # untrained: a scribble
print(tuple(strokes.shape), "dx, dy, pen lifted; the window over the text:", tuple(window.shape))
""",
)

HAND = Hand(missed=0.3, shake=0.01)
CELLS, LAYERS, WINDOW, COMPONENTS = 64, 2, 3, 8
ROWS, RATE = 32, 7e-4  # the paper's rate, 1e-4, is for days


@paper.claim(
    "The density integrates to 1, a product where nothing correlates; windows move forward; a bias leaves modes",
    paper="Section 2.1 (the cells), 4 (the density), 5.1 (the window) and 5.4 (the bias)",
    kind="exact",
    control="the density without sqrt(1 - rho^2)",
)
@torch.no_grad()
def density_window_and_bias(lab: Lab) -> Verdict:
    """Sum densities over a grid; look at windows of random models; draw with an endless bias; compare with torch."""
    torch.manual_seed(lab.seed)
    outputs = torch.randn(4, 6 * 3 + 1, dtype=torch.float64)
    density = StrokeDensity(outputs)
    side = torch.linspace(-30, 30, lab.pick(smoke=601, small=1501), dtype=torch.float64)
    grid, cell = torch.cartesian_prod(side, side)[:, None], float(side[1] - side[0]) ** 2
    up, down = (density.log_prob(grid, torch.full((4,), lifted)).exp().sum(0) * cell for lifted in (True, False))
    total = float((up + down - 1).abs().max())
    parts = (density.log_weights + density.log_components(grid)).exp()
    # sqrt(1 - rho^2) = 1 / cosh(r) is what log_components divides by
    unnormalised = float(((parts / density.twist.cosh()).sum(-1).sum(0) * cell - 1).abs().max())
    alone = torch.randn(50, 7, dtype=torch.float64)
    alone[:, 5] = 0.0
    offset = torch.randn(50, 2, dtype=torch.float64)
    product = torch.distributions.Normal(alone[:, 1:3], alone[:, 3:5].exp()).log_prob(offset).sum(-1)
    factors = float((StrokeDensity(alone).log_offset(offset) - product).abs().max())
    drawn, _ = StrokeDensity(outputs, bias=1e5).sample(lab.generator(lab.seed))
    mode = float((drawn - density.mode()).abs().max())
    slowest = min(_slowest_window(seed) for seed in range(5))
    ours, theirs = LSTM(peepholes=True).build(6).double(), torch.nn.LSTM(6, 6, batch_first=True, dtype=torch.float64)
    difference = _difference(ours, theirs)
    checks = {
        "the density with its bit integrates to 1": total < 1e-4,
        "rho = 0: a product of two normals": factors < 1e-12,
        "the window moves forward at every step": slowest > 0,
        "endless bias: the mean of the heaviest component": mode < 1e-12,
        "peepholes of 0: torch's LSTM": difference < 1e-14,
        "without its root the density is none": unnormalised > 0.1,
    }
    measured = {"integral off by": total, "product off by": factors, "smallest move of the window": slowest}
    return lab.judge(checks, measured, {"integral without the root off by": unnormalised})


def _slowest_window(seed: int) -> float:
    torch.manual_seed(seed)
    model = Handwriting(characters=10, hidden=8, layers=1, window=4).build().double()
    with record(model, ["kappa"]) as seen:
        model(torch.randn(3, 40, 3, dtype=torch.float64), torch.randint(10, (3, 5)))
    return float(torch.cat((seen["kappa"][:, :1], seen["kappa"].diff(dim=1)), 1).min())


def _difference(ours: Any, theirs: Any) -> float:
    theirs.weight_ih_l0.copy_(ours.input.weight)
    theirs.weight_hh_l0.copy_(ours.recurrent.weight)
    theirs.bias_ih_l0.copy_(ours.input.bias)
    theirs.bias_hh_l0.zero_()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    return float((ours(x, Placement().resolve(2, 9, x.device)) - theirs(x)[0]).abs().max())


def _fitted(lab: Lab, components: int, steps: int, seed: int) -> HandwritingModel:
    mixture = StrokeMixture(components=components)
    model = Handwriting(characters=10, hidden=CELLS, layers=LAYERS, window=WINDOW, mixture=mixture).build()

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        draws = lab.generator(1_000 * seed + epoch)
        return (HAND.draw(ROWS, (2, 4), draws).batch() for _ in range(steps))

    with lab.threads(1):
        fit(
            model, handwriting_loss, batches, steps=steps, lr=RATE, seed=seed,
            optimizer=train.RMSPropGraves(), clip=None,
        )  # fmt: skip
    return model.eval()


@torch.no_grad()
def _read(model: HandwritingModel, strokes: Strokes) -> dict[str, float]:
    """Return nats a step; the share of steps where the window's peak does not go back; of characters it stands at."""
    with record(model, ["phi"]) as seen:
        nats = stroke_nats(model, strokes.batch())
    real, forward, moves, visited = strokes.real[:, 1:], 0, 0, 0
    for row, length in enumerate(strokes.lengths.tolist()):
        peak = seen["phi"][row, real[row], : length + 1].argmax(-1)
        forward, moves = forward + int((peak.diff() >= 0).sum()), moves + len(peak) - 1
        place = -1
        for at in peak.tolist():  # characters count only in order: one passed over cannot be visited later
            if at == place + 1 and at < length:
                visited, place = visited + 1, at
    return {
        "nats a step": float(nats.sum() / real.sum()),
        "steps that do not go back": forward / moves,
        "characters visited in order": visited / int(strokes.lengths.sum()),
    }


@paper.claim(
    "A mixture predicts the pen far better than one Gaussian, and the window walks along the text by itself",
    paper="Section 4: mixture densities; Section 5: the window finds the characters by itself",
    control="the same network with a single Gaussian for the offset",
)
def writes_digits(lab: Lab) -> Verdict:
    """Strings of 2 to 4 digits as polylines, 30% of the points missed by the tablet; scored on unseen hands."""
    steps, judged = lab.pick(smoke=(2, 4), small=(300, 200))
    models: dict[str, HandwritingModel] = {}  # of the last seed

    def arm(name: str, components: int) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            models[name] = _fitted(lab, components, steps, seed)
            with lab.threads(1):
                return _read(models[name], HAND.draw(judged, (3, 4), lab.generator(10**6 + seed)))

        return measures

    verdict = lab.compare(
        arms={"mixture": arm("mixture", COMPONENTS), "one Gaussian": arm("one Gaussian", 1)},
        main=Beats("mixture", "one Gaussian", on="nats a step", by=1.0, lower=True),
        also=[
            AtLeast("mixture", 0.9, on="characters visited in order"),
            AtLeast("mixture", 0.99, on="steps that do not go back"),
        ],
        seeds=2,
        note=NOTE,
    )
    text, most = torch.tensor([2, 0, 1, 3]), lab.pick(smoke=5, small=120)
    with lab.threads(1):
        _show_window(lab, models["mixture"], text, most)
        _show_writing(lab, models, text, most)
    return verdict


NOTE = (
    f"{LAYERS} layers of {CELLS} cells, {WINDOW} Gaussians in the window, where the paper has 3 of 400 and 10. In a "
    "first design no points were missed: given the text, the next offset was then nearly certain, and the mixture won "
    "0.44 nats a step (-1.17 against -0.73). With 30% missed, one offset or two joined may come at any step, as from a "
    "real tablet; a steadier hand (a shake of 0.01 instead of 0.015) makes the two cases lie apart more clearly."
)


def _show_window(lab: Lab, model: HandwritingModel, text: Tensor, most: int) -> None:
    _, phi, _ = synthesize(model, text, most=most, bias=1.0, generator=lab.generator(lab.seed))
    with lab.figure("window", figsize=(7.2, 2.4)) as figure:
        axes = figure.subplots()
        axes.imshow(phi.T.numpy(), aspect="auto", cmap="Blues", interpolation="nearest", rasterized=True)
        axes.set_yticks(range(phi.shape[1]), [*map(str, text.tolist()), "end"])
        axes.grid(visible=False)
        axes.set(title="Where the window stands while it writes", xlabel="step", ylabel="character")


def _show_writing(lab: Lab, models: dict[str, HandwritingModel], text: Tensor, most: int) -> None:
    rows = [("mixture", 0.0), ("mixture", 1.0), ("one Gaussian", 0.0)]
    with lab.figure("writing", figsize=(7.2, 4.2)) as figure:
        for axes, (name, bias) in zip(figure.subplots(len(rows), 2).tolist(), rows, strict=True):
            for column, axis in enumerate(axes):
                draws = torch.Generator().manual_seed(lab.seed + column)
                written, _, _ = synthesize(models[name], text, most=most, bias=bias, generator=draws)
                _draw(axis, written, COLORS[0] if name == "mixture" else CONTROL)
            axes[0].set_title(f"{name}, bias {bias:g}")


def _draw(axes: Any, written: Tensor, color: str) -> None:
    written = torch.cat((written.new_zeros(1, 3), written))  # the pen is put down where it all begins
    points, begin = written[:, :2].cumsum(0), 0
    for lift in [*(written[:-1, 2] > 0.5).nonzero()[:, 0].tolist(), len(written) - 1]:
        axes.plot(points[begin : lift + 1, 0], points[begin : lift + 1, 1], color=color, lw=1.6)
        begin = lift + 1
    axes.set_aspect("equal")
    axes.axis("off")
