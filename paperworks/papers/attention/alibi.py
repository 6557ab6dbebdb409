"""ALiBi: scores fall linearly with the distance, so a model trained on short texts reads long ones."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import (
    MLP,
    AbsolutePositions,
    ALiBi,
    Attention,
    LayerNorm,
    LearnedPositions,
    Placement,
    RelativePosition,
    SinusoidalPositions,
)
from paperworks.nn.position.relative import alibi_slopes
from paperworks.testbeds.characters import play
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
)

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
    """Four layers of width 128, as GPT-2's are, that differ only in their positions."""
    return Decoder(
        vocab_size=play().tokenizer.vocab_size,
        dim=128,
        depth=lab.pick(smoke=1, small=4),
        norm=LayerNorm(),
        block=Block(
            norm=LayerNorm(), mixer=Attention(heads=4, position=attention, bias=True), feedforward=MLP(hidden=512)
        ),
        position=embedded,
        embedding_std=1.0,  # sinusoids are as large
    )


def _trained(lab: Lab, name: str, spec: Decoder) -> DecoderModel:
    steps = lab.pick(smoke=2, small=900, large=6000)
    torch.manual_seed(lab.seed)
    model = spec.build()
    batches = play().train_windows(length=TRAINED, batch=16, count=steps, seed=lab.seed)
    settings = train.Settings(
        steps=steps,
        lr=2e-3,
        warmup=0.1,
        optimizer=train.AdamW(weight_decay=0.1, betas=(0.9, 0.95)),
        seed=lab.seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress(name, steps) as advance:
        train.fit(model, train.next_token_loss, batches, settings, on_step=lambda _: advance(1))
    return model.eval()


@cache
def _ends(count: int) -> tuple[Tensor, Tensor]:
    """Return windows of the longest length from the held-out text, and what follows each of their characters."""
    windows = play().held_out_windows(length=LENGTHS[-1], batch=count, count=count)[0]
    return windows["tokens"], windows["targets"]


def _losses(lab: Lab, model: DecoderModel) -> dict[int, float]:
    """Return the loss on the same last characters, with so many characters in view."""
    tokens, targets = _ends(lab.pick(smoke=4, small=200))
    found = {}
    with lab.threads(1):
        for length in LENGTHS:
            asked = targets[:, -length:].clone()
            asked[:, :-SCORED] = IGNORED
            seen = tokens[:, -length:]
            batches = [
                {"tokens": some, "targets": wanted}
                for some, wanted in zip(seen.split(20), asked.split(20), strict=True)
            ]
            found[length] = train.evaluate(model, train.next_token_loss, batches)["loss"]
    return found


@paper.claim(
    "Trained on 64 characters, it reads 512 without loss",
    paper="Figure 4 and Section 4: trained on 512 tokens of WikiText-103, better at 3,072 than sinusoidal models "
    "trained at that length, while those break right after the trained length",
    control="sinusoidal positions, trained alike; learned ones cannot be asked at all",
)
def reads_longer_texts(lab: Lab) -> Verdict:
    """Train both on windows of 64 and score the same characters with 64 to 512 in view."""
    play()  # before the bars: it may have to be fetched
    linear = _losses(lab, _trained(lab, "ALiBi", _model(lab, ALiBi(), None)))
    sinusoidal = _losses(lab, _trained(lab, "sinusoidal positions", _model(lab, None, SinusoidalPositions())))
    learned = _model(lab, None, LearnedPositions(length=TRAINED)).build()
    try:
        learned(_ends(1)[0])
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    with lab.figure("lengths", figsize=(6.8, 3.2)) as figure:
        axes = figure.subplots()
        axes.plot(LENGTHS, [sinusoidal[length] for length in LENGTHS], color=CONTROL, marker="o", label="sinusoidal")
        axes.plot(LENGTHS, [linear[length] for length in LENGTHS], color=COLORS[0], marker="o", label="ALiBi")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, map(str, LENGTHS))
        axes.set_ylim(bottom=min(linear.values()) - 0.15)
        axes.set_xlabel("characters in view")
        axes.set_ylabel("nats a character")
        axes.set_title(f"Trained on windows of {TRAINED} characters")
        axes.legend()
    first, last = LENGTHS[0], LENGTHS[-1]
    return lab.judge(
        checks={
            "ALiBi: at 512 at most 0.02 nats above 64": linear[last] <= linear[first] + 0.02,
            "sinusoidal: at 512 at least 0.5 above 64": sinusoidal[last] >= sinusoidal[first] + 0.5,
            "at the trained length ALiBi is within 0.1 of sinusoidal": linear[first] <= sinusoidal[first] + 0.1,
            "learned positions refuse": "beyond" in refusal,
        },
        measured={"in view": list(LENGTHS), "loss, ALiBi": [linear[length] for length in LENGTHS]},
        control={
            "loss, sinusoidal": [sinusoidal[length] for length in LENGTHS],
            "learned positions say": refusal,
        },
        note=f"Four layers of width 128, characters of tinyshakespeare; the last {SCORED} characters of 200 held-out "
        "windows, the same ones at every length, in nats.",
    )
