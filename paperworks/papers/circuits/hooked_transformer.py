"""A transformer with every intermediate value in reach: record, edit, take the logits apart, simplify the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from paperworks import interpret, models
from paperworks.data.text.texts import load_text
from paperworks.interpret.lenses.logit_lens import direct_logit_attribution, logit_lens
from paperworks.interpret.residual import decompose
from paperworks.interpret.weights import folding
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
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
    equation=r"\text{logit}_t = W_U[t] \cdot \frac{g \odot \sum_c x_c}{\lVert x \rVert / \sqrt{d}} = "
    r"\sum_c W_U[t] \cdot \frac{g \odot x_c}{\lVert x \rVert / \sqrt{d}}, \qquad x = \sum_c x_c",
    usage="""
import paperworks as pw
import torch
from paperworks import interpret
from paperworks.interpret.lenses.logit_lens import direct_logit_attribution

model = pw.load("smollm2")
ids = model.tokenizer.encode("The capital of France is the city of")
with interpret.record(model, "*.pattern") as seen:  # every attention pattern, by its path
    model(torch.tensor([ids]))
print(len(seen), "patterns of", seen["blocks.0.mixer.pattern"].shape)
right, wrong = (torch.tensor(model.tokenizer.encode(city)[:1]) for city in (" Paris", " Rome"))
for part, logits in direct_logit_attribution(model, torch.tensor([ids]), right, wrong).ranked(5):
    print(f"{part}: {logits:+.2f}")
""",
)

COUNTRIES = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Poland": "Warsaw",
}


def _capitals(lab: Lab, model: DecoderModel) -> list[tuple[Int[Tensor, "1 time"], Tensor, Tensor]]:
    """(Prompt, first token of the right capital, first token of the next country's) for each country."""
    tokenizer: Any = model.tokenizer
    names = list(COUNTRIES.items())
    rows = []
    for index, (country, city) in enumerate(lab.pick(smoke=names[:2], small=names)):
        other = names[(index + 1) % len(names)][1]
        prompt = torch.tensor([tokenizer.encode(f"The capital of {country} is the city of")], device=model.device)
        right, wrong = (torch.tensor(tokenizer.encode(f" {name}")[:1], device=model.device) for name in (city, other))
        rows.append((prompt, right, wrong))
    return rows


ROW = 128  # tokens


@cache
def _prose(tokenizer: Any) -> Tensor:
    """The first 150,000 characters of Python's language reference, as tokens."""
    return torch.tensor(tokenizer.encode(load_text("python-docs").text[:150_000]))


def _text(lab: Lab, model: DecoderModel, seed: int) -> Int[Tensor, "rows 128"]:
    """Rows of prose; every seed has its own."""
    tokens = _prose(model.tokenizer)
    starts = torch.randperm(len(tokens) // ROW, generator=lab.generator(seed))[: lab.pick(smoke=1, small=8)] * ROW
    return torch.stack([tokens[start : start + ROW] for start in starts.tolist()]).to(model.device)


@paper.claim(
    "Listening changes no bit of a model, and simplified weights compute the same",
    paper="TransformerLens: hooks see or replace every activation; fold_ln, center_unembed and the like leave the "
    "function unchanged",
    kind="exact",
)
def listening_is_free(lab: Lab) -> Verdict:
    """Record and edit everything with the identity, and compare folded copies with the model."""
    model = smollm2(lab, smoke_depth=2)
    tokens = _text(lab, model, lab.seed)[:4, :32]
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
    kind="exact",
    control="each part normalized by its own size instead of the whole stream's",
)
def logits_are_sums(lab: Lab) -> Verdict:
    """Attribute the logit difference between a country's capital and another to all 301 parts."""
    model = smollm2(lab, smoke_depth=2)
    errors, own_errors, values, ahead = [], [], [], []
    names: tuple[str, ...] = ()
    for prompt, right, wrong in lab.track(_capitals(lab, model), "capitals"):
        found = direct_logit_attribution(model, prompt, right, wrong)
        names, total = found.names, found.total.item()
        values.append(found.values[:, 0])
        errors.append(abs(found.values.sum().item() - total) / abs(total))
        own_errors.append(abs(_normalized_alone(model, prompt, right, wrong) - total) / abs(total))
        ahead.append(total > 0)
    mean = torch.stack(values).mean(0)
    lab.table(
        "What adds most to the right capital's logit over a wrong one's, mean of all prompts",
        ["part", "logits"],
        [[names[index], mean[index].item()] for index in mean.abs().argsort(descending=True)[:8].tolist()],
    )
    return lab.judge(
        checks={
            "the parts add up to the logit difference within 0.1%": max(errors) < 1e-3,
            "parts normalized alone are off by more than 10% of it": sum(own_errors) / len(own_errors) > 0.1,
        },
        measured={
            "largest relative error": max(errors),
            "prompts with the right capital ahead": f"{sum(ahead)} of {len(ahead)}",
            "parts": len(names),
        },
        control={"mean relative error": sum(own_errors) / len(own_errors)},
    )


@torch.no_grad()
def _normalized_alone(model: DecoderModel, prompt: Tensor, right: Tensor, wrong: Tensor) -> float:
    """Sum of what parts would give if the norm were applied to each of them."""
    parts = decompose(model, prompt, heads=True).parts[:, 0, -1]
    assert model.norm is not None
    direction = (model.unembedding.weight[right] - model.unembedding.weight[wrong])[0]
    return float((model.norm(parts) @ direction).sum())


@paper.claim(
    "Read through the final norm and unembedding, the stream holds the answer only in the last blocks",
    paper="Logit lens (nostalgebraist 2020): the states of later layers decode to the output",
    control="the model's top tokens at other positions of the same rows, drawn at random",
    reach="real",
)
def the_answer_comes_late(lab: Lab) -> Verdict:
    """Compare the top token after each number of blocks with the final one, on 1,024 tokens of text a seed."""
    model = smollm2(lab, smoke_depth=30)

    @cache
    def tops(seed: int) -> tuple[Tensor, ...]:
        return tuple(logit_lens(model, _text(lab, model, seed), lambda logits: logits.argmax(-1)))

    def arm(elsewhere: bool) -> Callable[[int], dict[str, float | list[float]]]:
        def agreement(seed: int) -> dict[str, float | list[float]]:
            final = tops(seed)[-1]
            if elsewhere:
                final = final[:, torch.randperm(ROW, generator=lab.generator(seed)).to(final.device)]
            curve = [(top == final).float().mean().item() for top in tops(seed)]
            return {
                "agreement after 25 blocks": curve[25],
                "agreement after 20 blocks": curve[20],
                "blocks": [float(blocks) for blocks in range(len(curve))],
                "agreement of the top token": curve,
            }

        return agreement

    same, another = "same position", "another position"
    verdict = lab.compare(
        arms={same: arm(False), another: arm(True)},
        main=Beats(same, another, on="agreement after 25 blocks", by=0.2),
        also=[
            AtLeast(same, 0.3, on="agreement after 25 blocks"),
            AtMost(same, 0.1, on="agreement after 20 blocks"),
        ],
        seeds=3,
        note=f"{lab.pick(smoke=1, small=8) * ROW} tokens of Python's language reference a seed. Of tinyshakespeare's "
        "first 1,024 tokens 0.21 agree after 20 blocks, so the early share depends on the text.",
    )
    lab.curves("agreement of the top token", x="blocks", name="lens")
    _tell_lens(lab, model)
    return verdict


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
