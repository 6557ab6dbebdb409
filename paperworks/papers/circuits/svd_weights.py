"""Singular directions of attention heads, read as words, and removed one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.data.text.texts import load_text
from paperworks.interpret import record
from paperworks.interpret.circuits.circuits import ov_circuit
from paperworks.interpret.weights import svd
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL
from paperworks.models import DecoderModel
from paperworks.testbeds.smollm2 import smollm2

paper = Paper(
    key="svd-weights",
    title="The Singular Value Decompositions of Transformer Weight Matrices are Highly Interpretable",
    authors="Millidge, Black",
    year=2022,
    ref="lesswrong.com/posts/mkbGjzxD8d8XqKHzA",
    family="circuits",
    summary=(
        "The top singular vectors of what a head writes, read through the unembedding, are often groups of related "
        "words; taking one direction out of the weights lowers those words and little else."
    ),
    implements=(
        "paperworks.interpret.weights.svd.ov_directions",
        "paperworks.interpret.weights.svd.top_tokens",
        "paperworks.interpret.weights.svd.coherence",
        "paperworks.interpret.weights.svd.without_direction",
    ),
)

FIRST = 5  # singular vectors of each head
WORDS = 10  # tokens of a cluster
COHERENT = 0.05  # share of the directions' ends, the most coherent, among which those in use are looked for


def _all_directions(model: DecoderModel) -> list[svd.Directions]:
    attention: Any = model.blocks[0].mixer
    return [
        svd.ov_directions(model, layer, head)
        for layer in range(len(model.blocks))
        for head in range(attention.spec.heads)
    ]


def _ends(
    model: DecoderModel, directions: Float[Tensor, "count dim"]
) -> tuple[Float[Tensor, " ends"], Int[Tensor, "ends 10"]]:
    """Return the coherence and tokens of both ends of each direction: the raised ones first, then the lowered ones."""
    raised, lowered = svd.top_tokens(directions, svd.vocabulary(model), WORDS)
    tokens = torch.cat((raised, lowered))
    return svd.coherence(tokens, model.embedding.weight.detach()), tokens


def _spell(model: DecoderModel, tokens: Tensor) -> str:
    tokenizer: Any = model.tokenizer
    return " ".join(repr(tokenizer.decode([token])) for token in tokens.tolist())


@paper.claim(
    "What heads write along their top singular vectors are groups of related words",
    paper="Most top singular vectors of OV matrices of GPT-2 medium decode to coherent clusters; for SmolLM2 measured "
    "before: mean cosine 0.259 +- 0.006 against 0.195 +- 0.007 for random directions",
    control="random directions of the residual stream",
)
def directions_are_groups_of_words(lab: Lab) -> Verdict:
    """Measure how alike the top tokens of the first five directions of all heads are."""
    model = smollm2(lab, smoke_depth=2)
    sources = _all_directions(model)
    writes = torch.cat([source.writes[:FIRST] for source in sources])
    draws = torch.Generator().manual_seed(lab.seed)
    random = torch.randn(writes.shape, generator=draws).to(writes)
    with lab.progress("reading directions as words", 2) as advance:
        ours, tokens = _ends(model, writes)
        advance(1)
        theirs, _ = _ends(model, random / random.norm(dim=-1, keepdim=True))
        advance(1)
    # a direction's two ends are read together, so the error is that of directions
    both, chance = ours.view(2, -1).mean(0), theirs.view(2, -1).mean(0)
    error = ((both.var() / len(both)) + (chance.var() / len(chance))).sqrt().item()
    gap = (both.mean() - chance.mean()).item()
    depth = len(model.blocks)
    by_layer = both.view(depth, -1).mean(1)
    _draw(lab, by_layer, chance.mean().item())
    best = ours.argsort(descending=True)[:10].tolist()
    lab.table(
        "The ten most coherent clusters",
        ["head", "direction", "end", "cosine", "words"],
        [
            [
                sources[(index % len(writes)) // FIRST].name,
                index % FIRST,
                "+" if index < len(writes) else "-",
                ours[index].item(),
                _spell(model, tokens[index]),
            ]
            for index in best
        ],
    )
    return lab.judge(
        checks={
            "more coherent than random directions by more than 5 standard errors": gap > 5 * error,
            "the coherence is above 0.2": both.mean() > 0.2,
        },
        measured={
            "mean cosine": both.mean(),
            "standard error of the difference": error,
            "standard errors apart": gap / error,
            "block with the highest": int(by_layer.argmax()),
            "its mean cosine": by_layer.max(),
            "blocks below random": int((by_layer < chance.mean()).sum()),
        },
        control={"mean cosine of random directions": chance.mean()},
        note=f"{len(both)} directions, both ends, {WORDS} tokens each; embeddings centred and of unit length.",
    )


def _draw(lab: Lab, by_layer: Tensor, chance: float) -> None:
    with lab.figure("coherence", figsize=(7.4, 3.3)) as figure:
        axes = figure.subplots()
        axes.bar(range(len(by_layer)), by_layer.tolist(), color=COLORS[0])
        axes.axhline(chance, color=CONTROL, linewidth=2, label="random directions (control)")
        axes.legend(loc="upper right")
        axes.set_xlabel("block")
        axes.set_title("How alike the words of a head's five strongest directions are (mean cosine)")


@paper.claim(
    "Taking one direction out of a head lowers its words and hardly any others",
    paper="Rank-one edits of the weights suppress a cluster's tokens with little collateral change",
    control="random tokens under the same edits; and edits along random directions",
)
def removal_is_selective(lab: Lab) -> Verdict:
    """Remove coherent directions of late heads that are in use, one at a time, where their words are likely."""
    model = smollm2(lab, smoke_depth=2)
    sources = [
        source for source in _all_directions(model) if int(source.name.split(".")[0]) >= 2 * len(model.blocks) // 3
    ]
    text = _text(lab, model)
    draws = torch.Generator().manual_seed(lab.seed)
    with record(model, "blocks.*.mixer.heads") as seen, torch.no_grad():
        plain = model(text)
    rows = []
    for used in lab.track(_in_use(model, sources, seen, plain, lab.pick(smoke=1, small=8)), "directions"):
        some = torch.randint(plain.shape[-1], (1000,), generator=draws).to(used.cluster)
        random = torch.randn(len(used.direction), generator=draws).to(used.direction)
        changes = []
        for direction in (used.direction, random):
            with svd.without_write(model, used.layer, used.head, direction), torch.no_grad():
                changes.append((model(text) - plain).flatten(0, 1)[used.places])
        own, others = changes[0][:, used.cluster].mean().item(), changes[0][:, some].mean(0).abs().mean().item()
        rows.append([used.name, own, others, changes[1][:, used.cluster].mean().item(), _spell(model, used.cluster)])
    lab.table(
        "Change of logits where a direction is written and its words are likely (mean of 20 positions)",
        ["head and direction", "its words", "random tokens, absolute", "its words, random direction removed", "words"],
        rows,
    )
    fall, collateral, blind = (sum(float(row[column]) for row in rows) / len(rows) for column in (1, 2, 3))
    return lab.judge(
        checks={
            "its words fall by more than 5 times the mean change of random tokens": -fall > 5 * collateral,
            "every cluster falls": max(float(row[1]) for row in rows) < 0,
            "a random direction moves them less than a fifth as much": abs(blind) < 0.2 * abs(fall),
        },
        measured={
            "mean change of a cluster's logits": fall,
            "times the change of random tokens": -fall / collateral,
            "each": [row[1] for row in rows],
            "directions above 5 times": sum(-float(row[1]) > 5 * float(row[2]) for row in rows),
        },
        control={"random tokens, absolute change": collateral, "its words, random direction removed": blind},
        note=f"Of the {COHERENT:.0%} most coherent ends of the directions of the last third of the blocks, the eight "
        "that are written most where their words are likely. The mean is decided by "
        "directions that move most of the vocabulary as much as their own words; the table has each.",
    )


@dataclass(frozen=True)
class _Used:
    """A direction of a head, the words it writes, and where it writes them."""

    name: str
    layer: int
    head: int
    direction: Float[Tensor, " dim"]
    cluster: Int[Tensor, " words"]
    places: Int[Tensor, " positions"]


def _in_use(
    model: DecoderModel, sources: list[svd.Directions], seen: Mapping[str, Tensor], logits: Tensor, most: int
) -> list[_Used]:
    """Return the coherent directions that are written where their words are likely.

    Ranked by the mean, over their 20 best positions, of what the head writes along them times the probability of their
    words. The most coherent clusters of all are halves of rare words that no prompt asks for.
    """
    chances = logits.softmax(-1).flatten(0, 1)
    writes = torch.cat([source.writes[:FIRST] for source in sources])
    coherent, tokens = _ends(model, writes)
    least = coherent.topk(max(1, round(COHERENT * len(coherent)))).values[-1]
    found: list[tuple[float, _Used]] = []
    for number, source in enumerate(sources):
        layer, head = (int(part) for part in source.name.split("."))
        attention: Any = model.blocks[layer].mixer
        own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        written = seen[f"blocks.{layer}.mixer.heads"][:, :, head] @ attention.output.weight[:, own].detach().mT
        for index in range(FIRST):
            place = number * FIRST + index
            amount = (written @ writes[place]).flatten()
            for end, sign in ((place, 1), (place + len(writes), -1)):
                active = (sign * amount * chances[:, tokens[end]].sum(-1)).topk(20)
                used = _Used(f"{source.name}, {index}", layer, head, writes[place], tokens[end], active.indices)
                if coherent[end] >= least:
                    found.append((active.values.mean().item(), used))
    return [used for _, used in sorted(found, key=lambda each: -each[0])[:most]]


def _text(lab: Lab, model: DecoderModel) -> Int[Tensor, "rows 128"]:
    tokenizer: Any = model.tokenizer
    rows = lab.pick(smoke=1, small=3)
    ids = tokenizer.encode(load_text("python-docs").text[: 1000 * rows])
    return torch.tensor(ids[: 128 * rows], device=model.device).view(rows, 128)


@paper.claim(
    "Thin factors give the decomposition of the whole matrix, and a removed direction is gone",
    paper="SVD of W_V W_O; rank at most the head's dimension; a rank-one update leaves all other directions",
    kind="exact",
)
def decomposition_is_exact(lab: Lab) -> Verdict:
    """Compare with the dense decomposition in float64, and remove a direction."""
    model = smollm2(lab, smoke_depth=2)
    attention: Any = model.blocks[1].mixer
    found = svd.ov_directions(model, 1, 4)
    whole = torch.linalg.svd(ov_circuit(attention, 4).dense().double())
    rank = len(found.strengths)
    values = ((found.strengths - whole.S[:rank]).abs().max() / whole.S[0]).item()
    u, v = found.reads[0], found.writes[0]
    with svd.without_direction(model, 1, 4, 0):
        edited = ov_circuit(attention, 4).dense()
    left = (u @ edited @ v).abs().item() / found.strengths[0].item()
    others = (
        ((found.reads[1:] @ edited @ found.writes[1:].mT).diagonal() - found.strengths[1:]).abs().max()
        / found.strengths[0]
    ).item()
    raised, lowered = svd.top_tokens(found.writes[:3], svd.vocabulary(model), 10)
    other_raised, other_lowered = svd.top_tokens(-found.writes[:3], svd.vocabulary(model), 10)
    return lab.judge(
        checks={
            "singular values to 1e-5": values < 1e-5,
            "rank is the head's dimension": bool(whole.S[rank:].max() < 1e-6 * whole.S[0])
            and rank == attention.head_dim,
            "the removed direction is gone, to 1e-5": left < 1e-5,
            "all others stay, to 1e-5": others < 1e-5,
            "a flipped sign swaps the two ends": torch.equal(raised, other_lowered)
            and torch.equal(lowered, other_raised),
        },
        measured={"error of singular values": values, "what is left": left, "change of others": others, "rank": rank},
    )
