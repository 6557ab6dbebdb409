"""TTT layers: what is read trains a small model inside the layer, whose weights are the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks import train
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT
from paperworks.models import Block, count_parameters
from paperworks.nn import GatedMLP, LayerNorm, Mixer, Placement
from paperworks.nn.recurrent.ttt import TTT
from paperworks.nn.recurrent.ttt_inner import InnerNorm, State, fresh_state, inner_step, inner_weights
from paperworks.testbeds.characters import LENGTH, character_llama, held_out_loss, trained

paper = Paper(
    key="ttt-layers",
    title="Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
    authors="Sun, Li, Dalal, Xu, Vikram, Zhang, Dubois, Chen, Wang, Koyejo, Hashimoto, Guestrin",
    year=2024,
    ref="arXiv:2407.04620",
    family="recurrent",
    summary=(
        "The hidden state is itself a model, and reading is training it: each token is a step of gradient descent on "
        "saying its value from its key. A fixed state, as in a recurrent network, that corrects its own errors."
    ),
    implements=("paperworks.nn.recurrent.ttt.TTT", "paperworks.nn.recurrent.ttt_inner.inner_step"),
)

Tokens = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # query, key, value (rows, heads, tokens, size), rate (rows, heads, tokens)


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


@paper.claim(
    "The dual form is gradient descent token by token, and one mini-batch of a bare linear map is linear attention",
    paper="Section 2.5 and Appendix A (dual form); Theorem 1 (linear attention); Section 2.4 (b = 1: online descent)",
    kind="exact",
    control="gradients that do not go through the inner norm; W moved on after each token of a mini-batch",
)
def dual_is_descent(lab: Lab) -> Verdict:
    """Compare, for both inner models and mini-batches of 16 and of 1, with each W_t made by autograd's gradients."""
    draws = torch.Generator().manual_seed(lab.seed)
    heads, size, time = 2, 6, lab.pick(smoke=6, small=40)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draws)

    query, key, value = (drawn(1, heads, time, size) for _ in range(3))
    tokens = query, key, value, drawn(1, heads, time).sigmoid() / size
    norm = InnerNorm(heads, size).double()
    with torch.no_grad():
        norm.gain.add_(drawn(heads, 1, size), alpha=0.3)
        norm.shift.add_(drawn(heads, 1, size), alpha=0.3)
    dual: dict[str, float] = {}
    stale = through = 0.0
    for inner in ("linear", "mlp"):
        first = {name: 0.3 * drawn(*weight.shape) for name, weight in inner_weights(inner, heads, size).items()}
        for batch in (16, 1):
            found = _by_mini_batches(tokens, first, norm, batch)
            dual[f"{inner}, mini-batch of {batch}"] = _largest(found - _by_descent(tokens, first, norm, batch))
        if inner == "linear":
            found = _by_mini_batches(tokens, first, norm, 16)
            stale = _largest(found - _by_descent(tokens, first, norm, 16, moving=True))
            through = _largest(found - _by_descent(tokens, first, norm, 16, through_norm=False))
    nothing = {name: torch.zeros_like(w).double() for name, w in inner_weights("linear", heads, size).items()}
    ones = torch.ones(time, dtype=torch.float64)
    answers = inner_step(query, key, value, ones.expand(1, heads, time), ones, fresh_state(nothing, 1), None)[0]
    attention = (query @ key.transpose(-1, -2)).tril() @ value + value.cumsum(2)  # the bias: a key that is always 1
    worst = max(dual.values())
    return lab.judge(
        checks={
            "equal to 1e-10 for both inner models, mini-batches of 16 and of 1": worst < 1e-10,
            "linear attention to 1e-10": _largest(answers - attention) < 1e-10,
            "a gradient past the norm differs": through > 1e-3,
            "a W that moves inside the mini-batch differs": stale > 1e-3,
        },
        measured={f"largest difference, {name}": value for name, value in dual.items()}
        | {"largest difference from linear attention": _largest(answers - attention)},
        control={"difference past the norm": through, "difference of a moving W": stale},
        note=f"{time} tokens, float64. Theorem 1 counts the whole squared error and halves the rate.",
    )


def _by_mini_batches(tokens: Tokens, first: State, norm: InnerNorm, size: int) -> Tensor:
    """Return f(q_t; W_t) by the dual form, mini-batch by mini-batch."""
    state, outputs = fresh_state(first, 1), []
    for query, key, value, rate in zip(*(part.split(size, 2) for part in tokens), strict=True):
        places = 1 / torch.arange(1, query.shape[2] + 1, dtype=query.dtype)
        out, state = inner_step(query, key, value, rate, places, state, norm)
        outputs.append(out)
    return torch.cat(outputs, 2)


def _by_descent(
    tokens: Tokens, first: State, norm: InnerNorm, size: int, *, moving: bool = False, through_norm: bool = True
) -> Tensor:
    """Return the same with every W_t made, each gradient by autograd, one token after the other."""
    query, key, value, rate = tokens

    def layers(weights: State, x: Tensor) -> Tensor:
        z = x @ weights["w1"] + weights["b1"]
        return z if "w2" not in weights else F.gelu(z, approximate="tanh") @ weights["w2"] + weights["b2"]

    weights = {name: weight[None].clone() for name, weight in first.items()}
    summed: State = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    outputs = []
    for t in range(query.shape[2]):
        q, k, v = (part[:, :, t : t + 1] for part in (query, key, value))
        place = t % size
        base = weights
        if moving and place:
            base = {name: weights[name] - summed[name] / place for name in weights}
        leaves = {name: weight.detach().requires_grad_() for name, weight in base.items()}
        z = layers(leaves, k)
        if through_norm:
            gradients = torch.autograd.grad(0.5 * (k + norm(z) - v).square().sum(), list(leaves.values()))
        else:
            gradients = torch.autograd.grad(z, list(leaves.values()), (k + norm(z) - v).detach())
        for name, gradient in zip(leaves, gradients, strict=True):
            summed[name] = summed[name] + rate[:, :, t, None, None] * gradient
        present = {name: weights[name] - summed[name] / (place + 1) for name in weights}
        outputs.append(q + norm(layers(present, q)))
        if place == size - 1:
            weights, summed = present, {name: torch.zeros_like(weight) for name, weight in weights.items()}
    return torch.cat(outputs, 2)


@dataclass(frozen=True)
class Regression:
    """Rows of examples of a fresh linear map: at each token a question x and the answer to the one before.

    Attributes:
        inputs, outputs: sizes of x and y; y = W x with W from N(0, 1 / inputs), so y has variance 1.
        length: examples of a row.
    """

    inputs: int = 8
    outputs: int = 4
    length: int = 64

    def draw(self, rows: int, draws: torch.Generator) -> dict[str, Tensor]:
        """Return "x" (rows, length, inputs + outputs) and "y" (rows, length, outputs)."""
        x = torch.randn(rows, self.length, self.inputs, generator=draws)
        maps = torch.randn(rows, self.inputs, self.outputs, generator=draws) / self.inputs**0.5
        y = x @ maps
        return {"x": torch.cat((x, F.pad(y[:, :-1], (0, 0, 1, 0))), -1), "y": y}


class Predictor(nn.Module):
    """Vectors in, two blocks of one mixer, vectors out."""

    def __init__(self, mixer: Mixer, task: Regression, dim: int = 32) -> None:
        super().__init__()
        self.input = nn.Linear(task.inputs + task.outputs, dim)
        block = Block(norm=LayerNorm(), mixer=mixer, feedforward=GatedMLP(hidden=2 * dim))
        self.blocks = nn.ModuleList([block.build(dim) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, task.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, time, outputs)."""
        read = self.input(x)
        stream = Placement().resolve(len(x), x.shape[1], x.device)
        for block in self.blocks:
            read = block(read, stream)
        return self.output(self.norm(read))


@paper.claim(
    "Learning in the forward pass fits a map it has never seen, at least twice as closely as linear attention",
    paper="Table 1: perplexity 15.91 of linear attention falls to 11.09 by norm and residual in f, mini-batches, "
    "learned rates and the backbone; the inner loss falls along the sequence",
    control="the same layer as linear attention: f a bare linear map, one mini-batch for the whole row (Theorem 1)",
)
def fits_fresh_maps(lab: Lab) -> Verdict:
    """In-context regression: 64 examples of a linear map of 8 numbers to 4, a fresh one in each row."""
    task = Regression(length=lab.pick(smoke=24, small=64))
    steps, rows = lab.pick(smoke=(3, 8), small=(1000, 512))
    layers: dict[str, Mixer] = {
        "TTT-Linear": TTT(heads=2),
        "linear attention": TTT(heads=2, norm=False, mini_batch=task.length),
    }
    test = task.draw(rows, torch.Generator().manual_seed(lab.seed + 99))
    errors: dict[str, Tensor] = {}
    for name, mixer in layers.items():
        torch.manual_seed(lab.seed)
        model = Predictor(mixer, task)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            return (model(batch["x"]) - batch["y"]).square().sum(), batch["y"].numel()

        draws = torch.Generator().manual_seed(lab.seed)

        def batches(epoch: int, draws: torch.Generator = draws) -> Iterator[dict[str, Tensor]]:
            return (task.draw(32, draws) for _ in range(steps))

        settings = train.Settings(
            steps=steps,
            lr=3e-3,
            warmup=0.05,
            optimizer=train.AdamW(weight_decay=0.0),
            seed=lab.seed,
            save_every=None,
            log_every=steps,
            progress=False,
        )
        with lab.threads(1), lab.progress(f"{name}, regression", steps) as advance:

            def step(number: int) -> None:
                advance(1)

            train.fit(model, loss, batches, settings, on_step=step)
            with torch.no_grad():
                errors[name] = (model(test["x"]) - test["y"]).square().mean((0, 2))
    with lab.figure("error-by-place") as figure:
        axes = figure.subplots()
        for (name, error), color in zip(errors.items(), (COLORS[0], CONTROL), strict=True):
            axes.plot(range(task.length), error.tolist(), color=color, label=name)
        axes.axhline(1.0, color=FAINT, linestyle=":", label="saying 0")
        axes.set(title="A fresh linear map in each row", xlabel="examples seen", ylabel="squared error")
        axes.set_yscale("log")
        axes.legend(loc="lower left")
    half, quarter = task.length // 2, task.length // 4
    # the median: at one place the control's learned rate has been seen to fall to its bound, 0, and stay there
    late = {name: float(error[half:].median()) for name, error in errors.items()}
    quarters = [float(part.mean()) for part in errors["TTT-Linear"].split(quarter)]
    return lab.judge(
        checks={
            "in the second half of a row at most half the error of linear attention": late["TTT-Linear"]
            <= 0.5 * late["linear attention"],
            "the error falls from quarter to quarter": sorted(quarters, reverse=True) == quarters,
        },
        measured={
            "squared error, median over the second half": late["TTT-Linear"],
            "squared error by quarter of the row": quarters,
            "steps": steps,
        },
        control={"squared error, median over the second half": late["linear attention"]},
        note=(
            "Both have two blocks of width 32 and a state as large; the variance of the answers is 1. A first run took "
            "the mean over places, 0.083 against 0.187; but one place of the control, where its learned rate had died, "
            "made a seventh of that, so the median decides."
        ),
    )


@paper.claim(
    "As a language model it is worth a transformer of the same size",
    paper="Section 3: perplexity on the Pile at 2,000 tokens is that of Mamba and of a transformer, also with the "
    "transformer's backbone",
    control="the same layers with learning in the forward pass switched off (inner rates of 1e-9)",
)
def learns_text(lab: Lab) -> Verdict:
    """Four layers of width 64 on characters of Shakespeare, windows of 64, equal steps."""
    steps = lab.pick(smoke=2, small=600)
    base = character_llama()
    assert isinstance(base.block, Block)
    learning = TTT(heads=4)
    specs = {
        "TTT-Linear": replace(base, block=replace(base.block, mixer=learning)),
        "transformer": base,
        # one mini-batch a window: the same outputs where nothing is learned, and faster
        "not learning": replace(
            base, block=replace(base.block, mixer=replace(learning, base_rate=1e-9, mini_batch=LENGTH))
        ),
    }
    losses, sizes = {}, {}
    for name, spec in specs.items():
        model = trained(lab, spec, steps, lab.seed, f"{name} on characters")
        losses[name], sizes[name] = held_out_loss(lab, model), count_parameters(model)
    with lab.figure("losses", figsize=(6.4, 2.4)) as figure:
        axes = figure.subplots()
        names = list(losses)[::-1]
        axes.barh(names, [losses[name] for name in names], color=[CONTROL, COLORS[1], COLORS[0]])
        for index, name in enumerate(names):
            axes.text(losses[name], index, f" {losses[name]:.3f}", va="center")
        axes.set(title=f"Held-out loss after {steps} steps", xlabel="nats a character")
        axes.set_xlim(1.0, 1.12 * max(losses.values()))
        axes.grid(axis="y", visible=False)
    return lab.judge(
        checks={
            "within 0.08 nats of the transformer": losses["TTT-Linear"] <= losses["transformer"] + 0.08,
            "without learning at least 0.1 worse": losses["not learning"] >= losses["TTT-Linear"] + 0.1,
        },
        measured={"held-out loss": losses["TTT-Linear"], "parameters": sizes["TTT-Linear"], "steps": steps},
        control={
            "held-out loss, not learning": losses["not learning"],
            "held-out loss, transformer": losses["transformer"],
            "parameters, transformer": sizes["transformer"],
        },
        note=(
            "All have LLaMA's feed-forward and norms. The layers have the paper's own backbone, with convolutions over "
            "4 characters; without learning these are all that is seen. A first run had the transformer's backbone, "
            "where all memory is what the layer learns: 0.144 from the transformer after 400 steps, 2.498 without "
            "learning."
        ),
    )
