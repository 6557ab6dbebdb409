"""A transformer with every intermediate value in reach: record, edit, take the logits apart, simplify the weights."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks import interpret, models
from paperworks.data.text.texts import load_text
from paperworks.interpret.lenses.logit_lens import LogitAttribution, direct_logit_attribution, logit_lens
from paperworks.interpret.residual import decompose
from paperworks.interpret.weights import folding
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, INK
from paperworks.models import DecoderModel
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="hooked-transformer",
    title="ARENA 3.0 chapter 1.1: Transformer from Scratch, with hooks, activation cache and weight processing",
    authors="Nanda; McDougall; ARENA",
    year=2024,
    ref="ARENA 3.0 [1.1]; TransformerLens; Nanda, What is a Transformer?",
    family="circuits",
    summary=(
        "Every value inside a model can be recorded or replaced by name. The residual stream is a sum of what parts "
        "wrote, so a logit is a sum over parts too, once the scale of the final norm is held fixed."
    ),
    implements=(
        "paperworks.interpret.taps.record",
        "paperworks.interpret.taps.edit",
        "paperworks.interpret.residual.decompose",
        "paperworks.interpret.lenses.logit_lens.logit_lens",
        "paperworks.interpret.lenses.logit_lens.direct_logit_attribution",
        "paperworks.interpret.weights.folding.fold_norms",
    ),
)

COUNTRIES = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "England": "London",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Poland": "Warsaw",
    "Cuba": "Havana",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Kenya": "Nairobi",
    "Peru": "Lima",
}


def _capitals(lab: Lab, model: DecoderModel) -> list[tuple[Int[Tensor, "1 time"], Tensor, Tensor]]:
    """Return (prompt, first token of the right capital, first token of the next country's) for each country."""
    tokenizer: Any = model.tokenizer
    names = list(COUNTRIES.items())
    rows = []
    for index, (country, city) in enumerate(lab.pick(smoke=names[:2], small=names)):
        other = names[(index + 1) % len(names)][1]
        prompt = torch.tensor([tokenizer.encode(f"The capital of {country} is the city of")], device=model.device)
        right, wrong = (torch.tensor(tokenizer.encode(f" {name}")[:1], device=model.device) for name in (city, other))
        rows.append((prompt, right, wrong))
    return rows


def _text(lab: Lab, model: DecoderModel) -> Int[Tensor, "rows 128"]:
    """Return 1,024 tokens of English prose in rows of 128."""
    tokenizer: Any = model.tokenizer
    prose = load_text("python-docs").text
    rows = lab.pick(smoke=1, small=8)
    return torch.tensor(tokenizer.encode(prose[: 1000 * rows])[: 128 * rows], device=model.device).view(rows, 128)


@paper.claim(
    "Listening changes no bit of a model, and simplified weights compute the same",
    paper="TransformerLens: hooks see or replace every activation; fold_ln, center_unembed and the like leave the "
    "function unchanged",
    kind="exact",
)
def listening_is_free(lab: Lab) -> Verdict:
    """Record and edit everything with the identity, and compare folded copies with the model."""
    model = smollm2(lab, smoke_depth=2)
    tokens = _text(lab, model)[:, :32]
    with torch.no_grad():
        plain = model(tokens)
        with interpret.record(model, "*") as seen:
            recorded = model(tokens)
        with interpret.edit(model, {"*": lambda x: x}):
            edited = model(tokens)
        with interpret.edit(model, {"blocks.*.mixer.pattern": lambda p: p.clone()}):
            replaced = model(tokens)
        folded = folding.fold_norms(model)
        apart = (folded(tokens) - plain).abs().max().item()
        shifted = folding.centre_unembedding(folded)(tokens)
        apart_log = (shifted.log_softmax(-1) - plain.log_softmax(-1)).abs().max().item()
    patterns = [path for path in seen if path.endswith("pattern")]
    return lab.judge(
        checks={
            "recording every module leaves the logits bit-equal": torch.equal(recorded, plain),
            "so does editing every module with the identity": torch.equal(edited, plain),
            "patterns put in place of the fused kernel's give the same to 1e-3": bool(
                (replaced - plain).abs().max() < 1e-3
            ),
            "folding all norms changes no logit by 1e-3": apart < 1e-3,
            "centring the unembedding changes no log-probability by 1e-3": apart_log < 1e-3,
            "the model has the published 134,515,008 parameters": lab.scale == "smoke"
            or models.count_parameters(model) == 134_515_008,
        },
        measured={
            "values recorded": len(seen),
            "attention patterns among them": len(patterns),
            "largest change by replaced patterns": (replaced - plain).abs().max(),
            "largest change by folded norms": apart,
            "largest change of a log-probability by both": apart_log,
            "largest logit": plain.abs().max(),
        },
        note="float32 rounding through 30 blocks; the logits reach the size given.",
    )


@paper.claim(
    "A logit is the sum of what each head and each feed-forward layer adds to it",
    paper="Direct logit attribution: the logit difference is linear in the residual stream, given the scale of the "
    "final norm",
    control="each part normalized by its own size instead of the whole stream's",
)
def logits_are_sums(lab: Lab) -> Verdict:
    """Attribute the logit difference between a country's capital and another to all 301 parts."""
    model = smollm2(lab, smoke_depth=2)
    errors, own_errors, correct = [], [], []
    attributions: list[LogitAttribution] = []
    for prompt, right, wrong in lab.track(_capitals(lab, model), "capitals"):
        found = direct_logit_attribution(model, prompt, right, wrong)
        attributions.append(found)
        size = found.total.abs().item()
        errors.append(abs(found.values.sum().item() - found.total.item()) / size)
        own_errors.append(abs(_normalized_alone(model, prompt, right, wrong) - found.total.item()) / size)
        correct.append(found.total.item() > 0)
    mean = torch.stack([found.values[:, 0] for found in attributions]).mean(0)
    names = attributions[0].names
    _draw_attribution(lab, model, names, mean)
    order = mean.abs().argsort(descending=True)[:8].tolist()
    lab.table(
        "What adds most to the right capital's logit over a wrong one's, mean of all prompts",
        ["part", "logits"],
        [[names[index], mean[index].item()] for index in order],
    )
    half = int((mean.abs().sort(descending=True).values.cumsum(0) < mean.abs().sum() / 2).sum()) + 1
    return lab.judge(
        checks={
            "the parts add up to the logit difference within 0.1%": max(errors) < 1e-3,
            "parts normalized alone are off by more than 10% of it": sum(own_errors) / len(own_errors) > 0.1,
        },
        measured={
            "largest relative error": max(errors),
            "mean logit difference": sum(found.total.item() for found in attributions) / len(attributions),
            "prompts with the right capital ahead": f"{sum(correct)} of {len(correct)}",
            "parts": len(names),
            "parts that hold half of the absolute sum": half,
        },
        control={"mean relative error": sum(own_errors) / len(own_errors)},
    )


@torch.no_grad()
def _normalized_alone(model: DecoderModel, prompt: Tensor, right: Tensor, wrong: Tensor) -> float:
    """Return the sum of what parts would give if the norm were applied to each of them."""
    parts = decompose(model, prompt, heads=True).parts[:, 0, -1]
    assert model.norm is not None
    direction = (model.unembedding.weight[right] - model.unembedding.weight[wrong])[0]
    return float((model.norm(parts) @ direction).sum())


def _draw_attribution(lab: Lab, model: DecoderModel, names: tuple[str, ...], mean: Tensor) -> None:
    depth = len(model.blocks)
    attention: Any = model.blocks[0].mixer
    heads = torch.zeros(attention.spec.heads, depth)
    fed = torch.zeros(depth)
    for name, value in zip(names, mean.tolist(), strict=True):
        places = name.split(".")
        if "heads" in places:
            heads[int(places[-1]), int(places[1])] = value
        elif places[-1] == "feedforward":
            fed[int(places[1])] = value
    with lab.figure("attribution", figsize=(8.4, 4.6)) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.1, 1))
        limit = heads.abs().max().item()
        image = upper.imshow(heads.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", rasterized=True)
        upper.set_ylabel("head")
        upper.grid(False)
        upper.set_yticks(range(0, len(heads), 2))
        upper.set_title("Logits that each part adds to the right capital over a wrong one")
        figure.colorbar(image, ax=upper, label="logits", fraction=0.03)
        lower.bar(range(depth), fed.tolist(), color=[COLORS[0] if value > 0 else COLORS[1] for value in fed.tolist()])
        lower.axhline(0, color=INK, linewidth=0.8)
        lower.set_ylabel("feed-forward: logits")
        lower.set_xlabel("block")


@paper.claim(
    "Read through the final norm and unembedding, the stream holds the answer only in the last blocks",
    paper="Logit lens (nostalgebraist 2020): later layers' states decode to the output; for SmolLM2 measured before: "
    "agreement of the top token below 0.1 up to 20 blocks and above 0.3 from 25",
    control="the model's top tokens at other positions of the same rows, drawn at random",
)
def the_answer_comes_late(lab: Lab) -> Verdict:
    """Compare the top token after each number of blocks with the final one, on 1,024 tokens of text."""
    model = smollm2(lab, smoke_depth=30 if lab.scale == "smoke" else 1)
    tokens = _text(lab, model)
    tops = logit_lens(model, tokens, lambda logits: logits.argmax(-1))
    agreement = [(top == tops[-1]).float().mean().item() for top in tops]
    shuffle = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(lab.seed)).to(tokens.device)
    elsewhere = [(top == tops[-1][:, shuffle]).float().mean().item() for top in tops]
    _draw_lens(lab, agreement, elsewhere)
    _tell_lens(lab, model)
    return lab.judge(
        checks={
            "more than 0.3 agree after 25 blocks and later": min(agreement[25:]) > 0.3,
            "less than 0.1 after 20 and earlier": max(agreement[:21]) < 0.1,
            "all agree after the last": agreement[-1] == 1.0,
            "the control stays below 0.1 everywhere": max(elsewhere) < 0.1,
        },
        measured={
            "agreement by number of blocks run": [round(value, 3) for value in agreement],
            "after 20": agreement[20],
            "after 25": agreement[25],
            "after 29": agreement[29],
        },
        control={"after 25": elsewhere[25], "most, at any depth": max(elsewhere)},
        note=f"{tokens.numel()} tokens of Python's language reference. The last block still changes the top token at "
        "about half of all positions. Of tinyshakespeare's first 1,024 tokens 0.21 agree after 20 blocks and 0.40 "
        "after "
        "25, so the early share depends on the text.",
    )


def _draw_lens(lab: Lab, agreement: list[float], elsewhere: list[float]) -> None:
    with lab.figure("lens", figsize=(7.2, 3.4)) as figure:
        axes = figure.subplots()
        axes.plot(agreement, color=COLORS[0], marker="o", ms=4, label="same position")
        axes.plot(elsewhere, color=CONTROL, marker="s", ms=3, label="another position (control)")
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlabel("blocks run before reading")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_title("Positions whose top token is already the final one")
        axes.legend(loc="upper left")


def _tell_lens(lab: Lab, model: DecoderModel) -> None:
    tokenizer: Any = model.tokenizer
    prompt = torch.tensor([tokenizer.encode("The capital of France is the city of")], device=model.device)
    best = logit_lens(model, prompt, lambda logits: logits[0, -1].topk(5).indices.tolist())
    lab.table(
        "What follows 'The capital of France is the city of', read after each number of blocks",
        ["blocks run", "five likeliest tokens"],
        [
            [count, "  ".join(repr(tokenizer.decode([token])) for token in best[count])]
            for count in (0, 5, 10, 15, 20, *range(23, len(best)))
        ],
    )
