"""ALiBi: scores fall linearly with the distance, so a model trained on short texts reads long ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import AtMost, Beats, Lab, Paper, Verdict, Within
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import (
    MLP,
    AbsolutePositions,
    ALiBi,
    Attention,
    LayerNorm,
    Placement,
    RelativePosition,
    SinusoidalPositions,
)
from paperworks.nn.position.relative import alibi_slopes
from paperworks.testbeds.characters import play
from paperworks.testbeds.training import fit
from paperworks.train.losses import IGNORED

paper = Paper(
    key="alibi",
    title="ALiBi: Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
    authors="Press, Smith, Lewis",
    year=2021,
    ref="arXiv:2108.12409",
    family="attention",
    summary=(
        "No positions are added to the embeddings; each head takes its own slope times the distance from the scores. "
        "Nothing is learned, and texts longer than those of the training are read as well."
    ),
    implements=("paperworks.nn.position.relative.ALiBi", "paperworks.nn.position.relative.alibi_slopes"),
    equation=r"\operatorname{softmax}\left(q_i K^\top / \sqrt{d} + m \cdot [-(i-1), \dots, -2, -1, 0]\right)",
    usage="""
import torch
from paperworks.models import Block, Decoder
from paperworks.nn import MLP, ALiBi, Attention, LayerNorm

block = Block(norm=LayerNorm(), mixer=Attention(heads=4, position=ALiBi()), feedforward=MLP(hidden=128))
model = Decoder(vocab_size=100, dim=32, depth=2, block=block, norm=LayerNorm()).build()
for length in (64, 512):  # nothing is learned for a place, so any length will do
    print(length, tuple(model(torch.randint(100, (1, length))).shape))
""",
)

Metrics = dict[str, float | list[float]]

TRAINED = 64
LENGTHS = (64, 128, 256, 512)
SCORED = 16  # the last characters of a window; with 64 in view they still have 48 or more before them


@paper.claim(
    "Slopes are powers of two, the bias is one number a distance, and a row may be shifted",
    paper="Section 3 and Figure 3: slopes 1/2 ... 1/256 for 8 heads; footnote on other numbers of heads",
    kind="exact",
    control="the bias added with the opposite sign, or before the scores are scaled",
)
@torch.no_grad()
def bias_is_exact(lab: Lab) -> Verdict:
    """Compare slopes with the table and the module with the equation written out, in float64."""
    torch.manual_seed(lab.seed)
    powers = [2.0**-power for power in range(1, 9)]
    twelve = [*powers, *(2.0**-power for power in (0.5, 1.5, 2.5, 3.5))]
    heads, dim, time = 8, 32, 24
    module = Attention(heads=heads, position=ALiBi()).build(dim).double()
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=dim**-0.5)
    x = torch.randn(2, time, dim, dtype=torch.float64)
    out = module(x, Placement().resolve(2, time, x.device))
    at = torch.arange(time)
    distance = at - at[:, None]
    slopes = torch.tensor(powers, dtype=torch.float64)[:, None, None]
    bias = slopes * distance
    row_only = slopes * at  # by the key alone: each row of `bias` is this minus slope times its own position
    found = {
        "the equation": _attend(module, x, bias),
        "one row a head": _attend(module, x, row_only),
        "opposite sign": _attend(module, x, -bias),
        "before scaling": _attend(module, x, bias * (dim // heads) ** -0.5),
    }
    gaps = {name: float((value - out).abs().max()) for name, value in found.items()}
    diagonals = module.relative.scores(x[None], distance)[0]  # type: ignore[union-attr, operator]
    toeplitz = float((diagonals[:, 1:, 1:] - diagonals[:, :-1, :-1]).abs().max())
    return lab.judge(
        checks={
            "slopes of 8 heads": alibi_slopes(8).tolist() == powers,
            "slopes of 12 heads": torch.allclose(alibi_slopes(12), torch.tensor(twelve), rtol=1e-7, atol=0.0),
            "attention equals the equation": gaps["the equation"] < 1e-12,
            "adding slope times i to row i changes nothing": gaps["one row a head"] < 1e-12,
            "the bias is Toeplitz": toeplitz == 0.0,
            "the opposite sign is another function": gaps["opposite sign"] > 0.01,
            "so is a bias before scaling": gaps["before scaling"] > 0.01,
        },
        measured={
            "slopes, 8 heads": alibi_slopes(8).tolist(),
            "last four slopes, 12 heads": alibi_slopes(12)[8:].tolist(),
            **{f"largest gap, {name}": gaps[name] for name in ("the equation", "one row a head")},
        },
        control={f"largest gap, {name}": gaps[name] for name in ("opposite sign", "before scaling")},
        note=f"{heads} heads of {dim // heads} channels, {time} tokens, random weights.",
    )


def _attend(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, causal, from the module's own weights."""
    maps: dict[str, nn.Module] = dict(module.named_children())
    q, k, v = (maps[name](x).unflatten(-1, (bias.shape[0], -1)).transpose(1, 2) for name in ("query", "key", "value"))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return maps["output"]((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


def _model(lab: Lab, attention: RelativePosition | None, embedded: AbsolutePositions | None) -> Decoder:
    """Two layers of width 128, as GPT-2's are, that differ only in their positions."""
    return Decoder(
        vocab_size=play().tokenizer.vocab_size,
        dim=128,
        depth=lab.pick(smoke=1, small=2),
        norm=LayerNorm(),
        block=Block(
            norm=LayerNorm(), mixer=Attention(heads=4, position=attention, bias=True), feedforward=MLP(hidden=512)
        ),
        position=embedded,
        embedding_std=1.0,  # sinusoids are as large
    )


def _trained(lab: Lab, spec: Decoder, seed: int) -> DecoderModel:
    steps = lab.pick(smoke=2, small=450, large=6000)
    model = spec.build()
    batches = play().train_windows(length=TRAINED, batch=16, count=steps, seed=seed)
    adam = train.AdamW(weight_decay=0.1, betas=(0.9, 0.95))
    with lab.threads(1):
        fit(model, train.next_token_loss, batches, steps=steps, lr=2e-3, seed=seed, optimizer=adam, warmup=0.1)
    return model.eval()


@cache
def _ends(count: int) -> tuple[Tensor, Tensor]:
    """Windows of the longest length from the held-out text, and what follows each of their characters."""
    windows = play().held_out_windows(length=LENGTHS[-1], batch=count, count=count)[0]
    return windows["tokens"], windows["targets"]


def _losses(lab: Lab, model: DecoderModel) -> list[float]:
    """The loss on the same last characters, with each of LENGTHS in view."""
    tokens, targets = _ends(lab.pick(smoke=4, small=120))
    found = []
    with lab.threads(1):
        for length in LENGTHS:
            asked = targets[:, -length:].clone()
            asked[:, :-SCORED] = IGNORED
            seen = tokens[:, -length:]
            batches = [
                {"tokens": some, "targets": wanted}
                for some, wanted in zip(seen.split(20), asked.split(20), strict=True)
            ]
            found.append(train.evaluate(model, train.next_token_loss, batches)["loss"])
    return found


@paper.claim(
    "Trained on 64 characters, it reads 512 without loss",
    paper="Figure 4 and Section 4: trained on 512 tokens of WikiText-103, better at 3,072 than sinusoidal models "
    "trained at that length, while those break right after the trained length",
    control="sinusoidal positions, trained alike; no positions at all, which is ALiBi with slopes of 0",
    reach="real",
)
def reads_longer_texts(lab: Lab) -> Verdict:
    """Train each on windows of 64 and score the same characters with 64 to 512 in view."""
    play()  # before the bars: it may have to be fetched

    def arm(attention: RelativePosition | None, embedded: AbsolutePositions | None) -> Callable[[int], Metrics]:
        def measures(seed: int) -> Metrics:
            losses = _losses(lab, _trained(lab, _model(lab, attention, embedded), seed))
            return {
                "loss with 64 in view": losses[0],
                "loss with 512 in view": losses[-1],
                "rise from 64 to 512": losses[-1] - losses[0],
                "loss": losses,
                "characters in view": [float(length) for length in LENGTHS],
            }

        return measures

    verdict = lab.compare(
        arms={
            "ALiBi": arm(ALiBi(), None),
            "sinusoidal": arm(None, SinusoidalPositions()),
            "no positions": arm(None, None),
        },
        main=Beats("ALiBi", "sinusoidal", on="loss with 512 in view", by=0.5, lower=True),
        also=[
            AtMost("ALiBi", 0.02, on="rise from 64 to 512"),
            Within("ALiBi", "sinusoidal", on="loss with 64 in view", by=0.1, lower=True),
            Beats("ALiBi", "no positions", on="loss with 512 in view", by=0.05, lower=True),
        ],
        seeds=3,
        note=f"Two layers of width 128, characters of tinyshakespeare; the last {SCORED} characters of 120 held-out "
        "windows, the same ones at every length, in nats.",
    )
    lab.curves("loss", x="characters in view", name="lengths", title=f"Trained on {TRAINED} characters", log="x")
    return verdict
