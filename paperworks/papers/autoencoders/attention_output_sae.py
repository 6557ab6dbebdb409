"""Autoencoders on attention's output: features that say which head and which token they come from."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks import train
from paperworks.interpret import record, sae
from paperworks.lab import AtLeast, AtMost, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.testbeds.induction_model import (
    BLOCK,
    HEADS,
    RepeatedBlocks,
    head_marks,
    induction_model,
    repeated,
    untrained,
)
from paperworks.testbeds.planted_features import settings

paper = Paper(
    key="attention-output-sae",
    title="Interpreting Attention Layer Outputs with Sparse Autoencoders",
    authors="Kissane, Krzyzanowski, Bloom, Conmy, Nanda",
    year=2024,
    ref="arXiv:2406.17759; alignmentforum.org/posts/EGvtgB7ctifzxZg6v",
    family="autoencoders",
    summary=(
        "An autoencoder on the heads' outputs side by side, before the output projection, has features whose "
        "activation splits exactly into heads, source tokens and, with patterns frozen, what stood at those tokens."
    ),
    implements=(
        "paperworks.interpret.sae.attention_output.attribute_to_heads",
        "paperworks.interpret.sae.attention_output.through_values",
        "paperworks.interpret.sae.attention_output.head_shares",
        "paperworks.interpret.sae.attention_output.merged_heads",
    ),
    equation=r"(W_{\mathrm{enc}} z)_i = \sum_{\mathrm{head}\ h} \sum_{\mathrm{source}\ s} A^h_{ts} \, "
    r"W_{\mathrm{enc},i}^{h} \cdot v^h_s",
    usage="""
import torch
from paperworks.interpret import record, sae
from paperworks.testbeds.induction_model import untrained

model, tokens = untrained(), torch.randint(50, (1, 12))  # any decoder model
with torch.no_grad(), record(model, ["blocks.1.mixer.pattern", "blocks.1.mixer.value"]) as seen:
    model(tokens)
pattern = seen["blocks.1.mixer.pattern"][0]               # (heads, query, source)
values = seen["blocks.1.mixer.value"][0].unflatten(-1, (len(pattern), -1))
autoencoder = sae.TopK(latents=256, k=8).build(values.flatten(1).shape[1])
parts = sae.attribute_to_heads(autoencoder, latent=0, position=11, pattern=pattern, values=values)
print("of latent 0 at the last token, by head:", parts.heads, "by source:", parts.sources.sum(dim=0))
""",
    notes=(
        "A two-layer attention-only model trained on repeated random tokens, where what a feature should come from is "
        "known. Recursive attribution goes one step up, to embedding and first layer, with patterns frozen."
    ),
)

TAP = "blocks.1.mixer.heads"
INDUCTION = 0.3  # prefix matching above which a head counts as an induction head (chance is 1/50)


def _dictionary(lab: Lab, model: DecoderModel, seed: int) -> sae.SparseAutoencoder:
    """Train a TopK autoencoder of 256 latents, 8 of them on, on the second layer's heads."""
    steps = lab.pick(smoke=4, small=800)
    batches = RepeatedBlocks(lab.pick(smoke=4, small=120), seed=seed + 1)
    rows = sae.Activations(model, TAP, batches, size=512, capacity=65_536, read=sae.merged_heads)
    data = rows.normalized(64.0, rows=16_384).gather(lab.pick(smoke=1024, small=250_000))
    torch.manual_seed(seed)
    autoencoder = sae.TopK(latents=256, k=8, aux_k=32, dead_after=50_000).build(64)
    training = sae.Training(autoencoder, steps)

    def shuffled(epoch: int) -> list[Tensor]:
        order = torch.randperm(len(data), generator=lab.generator(1000 * seed + epoch))
        return [data[part] for part in order[: len(order) // 512 * 512].split(512)]

    with lab.threads(1), lab.progress("features of attention's output", steps) as advance:

        def after_step(step: int) -> None:
            training.after_step(step)
            advance(1)

        train.fit(autoencoder, training.loss, shuffled, settings(steps, clip=1.0), on_step=after_step)
    factor = (64.0 / rows.mean_square(16_384)) ** 0.5
    autoencoder.rescale(1 / factor)
    return autoencoder.eval()


@dataclass
class Shares:
    """Of each examined feature's positive direct attribution, the share that comes from somewhere."""

    answer: list[float] = field(default_factory=list)  # the token after the earlier copy of the present one
    matched: list[float] = field(default_factory=list)  # the earlier copy itself
    induction: list[float] = field(default_factory=list)  # induction heads, of what comes from the answer
    embedding: list[float] = field(default_factory=list)  # one step up: the answer's own embedding ...
    same_place: list[float] = field(default_factory=list)  # ... and the first layer's heads looking at itself


@dataclass(frozen=True)
class Seen:
    """One sequence as the model saw it."""

    tokens: Int[Tensor, " time"]
    latents: Float[Tensor, "time latents"]
    pattern: Float[Tensor, "heads query source"]
    values: Float[Tensor, "source heads head_dim"]
    embedding: Float[Tensor, "time dim"]
    first: Float[Tensor, "time dim"]  # what the first layer adds
    first_itself: Float[Tensor, "time dim"]  # the part of it that each position's heads take from that position


@torch.no_grad()
def _see(model: DecoderModel, autoencoder: sae.SparseAutoencoder, tokens: Int[Tensor, " time"]) -> Seen:
    targets = [TAP, "blocks.{0,1}.mixer.pattern", "blocks.{0,1}.mixer.value", "blocks.0.mixer", "embedding"]
    with record(model, targets) as seen:
        model(tokens[None])
    mixer: Any = model.blocks[0].mixer
    itself = seen["blocks.0.mixer.pattern"][0].diagonal(dim1=1, dim2=2).T  # (time, heads)
    values = seen["blocks.0.mixer.value"][0].unflatten(-1, (HEADS, -1))
    return Seen(
        tokens=tokens,
        latents=autoencoder.encode(sae.merged_heads(seen[TAP]))[0],
        pattern=seen["blocks.1.mixer.pattern"][0],
        values=seen["blocks.1.mixer.value"][0].unflatten(-1, (HEADS, -1)),
        embedding=seen["embedding"][0],
        first=seen["blocks.0.mixer"][0],
        first_itself=(itself[:, :, None] * values).flatten(1) @ mixer.output.weight.T,
    )


@torch.no_grad()
def _favourites(model: DecoderModel, autoencoder: sae.SparseAutoencoder) -> Int[Tensor, " latents"]:
    """The token whose logit each feature raises most: W_U W_O d_i."""
    mixer: Any = model.blocks[1].mixer
    return (autoencoder.decoder @ mixer.output.weight.T @ model.unembedding.weight.T).argmax(dim=1)


def _examine(
    lab: Lab, model: DecoderModel, autoencoder: sae.SparseAutoencoder, heads: Tensor, seed: int, *, as_seen: bool
) -> Shares:
    """Attribute, in repeated blocks, every feature that is on and raises the right next token.

    With `as_seen` false every query looks at all tokens up to itself alike, as if patterns did not matter.
    """
    favourites = _favourites(model, autoencoder)
    rows = repeated(lab.pick(smoke=1, small=12), BLOCK, 2, lab.generator(seed + 9))
    shares = Shares()
    mixer: Any = model.blocks[1].mixer
    for tokens in lab.track(list(rows), "attributions"):
        seen = _see(model, autoencoder, tokens)
        if not as_seen:
            even = torch.ones_like(seen.pattern).tril()
            seen = replace(seen, pattern=even / even.sum(dim=-1, keepdim=True))
        for position in range(BLOCK, 2 * BLOCK - 1):
            answer = position - BLOCK + 1
            right = (favourites == tokens[position + 1]) & (seen.latents[position] > 0)
            for latent in right.nonzero().flatten().tolist():
                parts = sae.attribute_to_heads(autoencoder, latent, position, seen.pattern, seen.values)
                positive = parts.sources.clamp_min(0)
                total = float(positive.sum())
                if total <= 0:
                    continue
                shares.answer.append(float(positive[:, answer].sum()) / total)
                shares.matched.append(float(positive[:, answer - 1].sum()) / total)
                from_answer = float(positive[:, answer].sum())
                if from_answer > 0:
                    shares.induction.append(float(positive[heads, answer].sum()) / from_answer)
                components = {
                    "embedding": seen.embedding,
                    "itself": seen.first_itself,
                    "others": seen.first - seen.first_itself,
                }
                up = sae.through_values(autoencoder, latent, position, seen.pattern, mixer.value.weight, components)
                mass = {name: float(part[:, answer].clamp_min(0).sum()) for name, part in up.items()}
                if sum(mass.values()) > 0:
                    shares.embedding.append(mass["embedding"] / sum(mass.values()))
                    shares.same_place.append((mass["embedding"] + mass["itself"]) / sum(mass.values()))
    return shares


def _middle(values: list[float]) -> float:
    return float(torch.tensor(values).median()) if values else 0.0


@cache
def _trained(lab: Lab, seed: int) -> tuple[DecoderModel, sae.SparseAutoencoder]:
    there = copy(lab)
    there.seed = seed  # which the testbed draws weights and tokens from
    model = induction_model(there)
    return model, _dictionary(lab, model, seed)


@paper.claim(
    "Features of an induction layer come from the token after the earlier copy of the present one",
    paper="'Direct feature attribution' and the induction features of GPT-2 small: such a feature is on because its "
    "head attends to the earlier occurrence of the token that it predicts",
    control="the same attribution in an untrained model; and with patterns that look at every token alike",
)
def induction_features(lab: Lab) -> Verdict:
    """Train an autoencoder in a two-layer induction model, and attribute the features that raise the right token."""

    def arm(*, trained: bool = True, as_seen: bool = True) -> Callable[[int], dict[str, float]]:
        def run(seed: int) -> dict[str, float]:
            if trained:
                model, autoencoder = _trained(lab, seed)
            else:
                model = untrained(seed=seed)
                autoencoder = _dictionary(lab, model, seed)
            marks = torch.tensor(head_marks(model)[0][1])
            heads = (marks > INDUCTION).nonzero().flatten() if trained else torch.arange(HEADS)
            shares = _examine(lab, model, autoencoder, heads, seed, as_seen=as_seen)
            return {
                "share from the token after the copy": _middle(shares.answer),
                "share from the copy itself": _middle(shares.matched),
                "of it through induction heads": _middle(shares.induction),
                "one step up, embedding alone": _middle(shares.embedding),
                "one step up, same place": _middle(shares.same_place),
                "features examined": len(shares.answer),
                "prefix matching of the best head": float(marks.max()),
            }

        return run

    ours, blank, even = "induction model", "untrained model", "every token looked at alike"
    verdict = lab.compare(
        arms={ours: arm(), blank: arm(trained=False), even: arm(as_seen=False)},
        main=Beats(ours, blank, on="share from the token after the copy", by=0.6),
        also=[
            Beats(ours, even, on="share from the token after the copy", by=0.6),
            AtLeast(ours, 0.8, on="share from the token after the copy"),
            AtMost(ours, 0.2, on="share from the copy itself"),
            AtLeast(ours, 0.5, on="one step up, same place"),
        ],
        seeds=3,
        note="Two attention-only layers trained on repeated random tokens; TopK with 256 latents and k = 8 on the "
        "second layer's heads; features on in the second copy that raise the right next token above all others. "
        "Shares are of positive attribution, medians over features and positions; 0 where no feature is found. All "
        "of the layer's four heads become induction heads, so it says nothing that attribution goes through them. One "
        "step up: the token's own embedding, or that and what the first layer's heads take from it.",
    )
    lab.points("share from the token after the copy", name="sources")
    return verdict


@paper.claim(
    "Attribution is exact: heads, sources and components add up",
    paper="DFA by head and by source position are linear in the heads' outputs with the pattern frozen; recursive DFA "
    "goes on into the residual stream",
    kind="exact",
)
def attribution_adds_up(lab: Lab) -> Verdict:
    """Check the sums on an untrained model in float64."""
    model = untrained(seed=lab.seed).double()
    torch.manual_seed(lab.seed)
    autoencoder = sae.Standard(latents=256, penalty=1.0).build(64).double()
    with torch.no_grad():
        autoencoder.encoder_bias.normal_()
        autoencoder.decoder_bias.normal_()
    tokens = repeated(1, BLOCK, 2, torch.Generator().manual_seed(1))[0]
    seen = _see(model, autoencoder, tokens)
    with record(model, TAP) as heads, torch.no_grad():
        model(tokens[None])
    z = sae.merged_heads(heads[TAP])[0]
    with torch.no_grad():
        before = (z - autoencoder.decoder_bias) @ autoencoder.encoder.T + autoencoder.encoder_bias
    mixer: Any = model.blocks[1].mixer
    components = {"embedding": seen.embedding, "first layer": seen.first}
    sums, ups = 0.0, 0.0
    for latent, position in ((0, 49), (17, 30), (255, 3)):
        parts = sae.attribute_to_heads(autoencoder, latent, position, seen.pattern, seen.values)
        sums = max(sums, abs(float(parts.heads.sum()) + parts.constant - float(before[position, latent])))
        up = sae.through_values(autoencoder, latent, position, seen.pattern, mixer.value.weight, components)
        ups = max(ups, float((sum(up.values()) - parts.sources).abs().max()))
    shares = float((sae.head_shares(autoencoder, HEADS).sum(dim=1) - 1).abs().max())
    return lab.judge(
        checks={
            "heads and sources add up to the pre-activation, to 1e-12": sums < 1e-12,
            "components of the stream add up to every source's part, to 1e-12": ups < 1e-12,
            "shares of heads add up to 1, to 1e-12": shares < 1e-12,
        },
        measured={"missing from the pre-activation": sums, "missing one step up": ups, "missing from shares": shares},
    )
