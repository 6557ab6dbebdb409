"""Singular directions of attention heads, read as words, and removed one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from paperworks.data.text.texts import load_text
from paperworks.interpret import record
from paperworks.interpret.circuits.circuits import ov_circuit
from paperworks.interpret.weights import svd
from paperworks.lab import Beats, Lab, Paper, Verdict
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
    equation=r"W_V W_O = \sum_i s_i\, u_i v_i^\top, \qquad \text{words of direction } i:\ "
    r"\text{largest entries of } \pm v_i W_U; \qquad W' = W - s_i u_i v_i^\top",
    usage="""
import paperworks as pw
from paperworks.interpret.weights import svd

model = pw.load("smollm2")
directions = svd.ov_directions(model, 22, 3)               # layer 22, head 3
raised, lowered = svd.top_tokens(directions.writes[:3], svd.vocabulary(model), 6)
for index in range(3):
    words = [model.tokenizer.decode([token]) for token in raised[index].tolist()]
    print(f"strength {float(directions.strengths[index]):.2f}:", words)
with svd.without_direction(model, 22, 3, 0):               # inside, the head no longer writes the first one
    print(pw.generate(model, "The capital of France is", max_new_tokens=5, temperature=0.0))
""",
    notes="The feed-forward matrices are read by the same functions, but only heads are judged here.",
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
    """Coherence and tokens of both ends of each direction: the raised ones first, then the lowered ones."""
    raised, lowered = svd.top_tokens(directions, svd.vocabulary(model), WORDS)
    tokens = torch.cat((raised, lowered))
    return svd.coherence(tokens, model.embedding.weight.detach()), tokens


def _spell(model: DecoderModel, tokens: Tensor) -> str:
    tokenizer: Any = model.tokenizer
    return " ".join(repr(tokenizer.decode([token])) for token in tokens.tolist())


@paper.claim(
    "What heads write along their top singular vectors are groups of related words",
    paper="Most top singular vectors of OV matrices of GPT-2 medium decode to coherent clusters",
    control="random directions of the residual stream",
    reach="real",
)
def directions_are_groups_of_words(lab: Lab) -> Verdict:
    """Measure how alike the top tokens of the first five directions of half of the heads are."""
    model = smollm2(lab, smoke_depth=2)
    sources = _all_directions(model)

    def arm(choose: Callable[[svd.Directions, torch.Generator], Tensor]) -> Callable[[int], dict[str, float]]:
        def coherence(seed: int) -> dict[str, float]:
            draws = lab.generator(seed)
            heads = torch.randperm(len(sources), generator=draws)[: len(sources) // 2].tolist()
            found, tokens = _ends(model, torch.cat([choose(sources[head], draws) for head in heads]))
            if choose is singular and seed == lab.seed:
                _tell_clusters(lab, model, [sources[head].name for head in heads], found, tokens)
            return {"mean cosine of ten words": found.mean().item()}

        return coherence

    def singular(source: svd.Directions, draws: torch.Generator) -> Tensor:
        return source.writes[:FIRST]

    def mixed(source: svd.Directions, draws: torch.Generator) -> Tensor:
        weights = torch.randn(FIRST, len(source.writes), generator=draws).to(source.writes)
        return functional.normalize(weights @ source.writes, dim=-1)

    def random(source: svd.Directions, draws: torch.Generator) -> Tensor:
        drawn = torch.randn(FIRST, source.writes.shape[1], generator=draws).to(source.writes)
        return functional.normalize(drawn, dim=-1)

    ours, theirs, on = "top singular vectors", "random directions", "mean cosine of ten words"
    verdict = lab.compare(
        arms={ours: arm(singular), "random mixtures of the head's directions": arm(mixed), theirs: arm(random)},
        main=Beats(ours, theirs, on=on, by=0.03),
        also=[Beats(ours, "random mixtures of the head's directions", on=on)],
        seeds=3,
        note=f"{FIRST} directions of half of the heads, both ends, {WORDS} tokens each; embeddings centred and of unit "
        "length. The seed draws the heads and the random directions.",
    )
    lab.points(on, name="coherence", title="How alike a direction's words are")
    return verdict


def _tell_clusters(lab: Lab, model: DecoderModel, names: list[str], found: Tensor, tokens: Tensor) -> None:
    half = len(found) // 2  # the raised ends, then the lowered ones
    lab.table(
        "The ten most coherent clusters",
        ["head", "direction", "end", "cosine", "words"],
        [
            [
                names[(index % half) // FIRST],
                index % FIRST,
                "+" if index < half else "-",
                found[index].item(),
                _spell(model, tokens[index]),
            ]
            for index in found.argsort(descending=True)[:10].tolist()
        ],
    )


@paper.claim(
    "Taking one direction out of a head lowers its words and hardly any others",
    paper="Rank-one edits of the weights suppress a cluster's tokens with little collateral change",
    control="random tokens under the same edits",
    reach="real",
)
def removal_is_selective(lab: Lab) -> Verdict:
    """Remove coherent directions of late heads that are in use, one at a time, where their words are likely."""
    model = smollm2(lab, smoke_depth=2)
    depth = len(model.blocks)
    sources = [source for source in _all_directions(model) if int(source.name.split(".")[0]) >= 2 * depth // 3]

    @cache
    def removed(seed: int) -> dict[str, float]:
        """Fall of the logits, relative to all tokens' mean, by what is removed and whose logits are read."""
        text, draws = _text(lab, model, seed), lab.generator(seed)
        with record(model, "blocks.*.mixer.heads") as seen, torch.no_grad():
            plain = model(text)
        falls: dict[str, list[float]] = {"own": [], "others": [], "blind": []}
        rows = []
        for used in _in_use(model, sources, seen, plain, lab.pick(smoke=1, small=8)):
            some = torch.randint(plain.shape[-1], (1000,), generator=draws).to(used.cluster)
            random = torch.randn(len(used.direction), generator=draws).to(used.direction)
            changes = []
            for direction in (used.direction, random):
                with svd.without_write(model, used.layer, used.head, direction), torch.no_grad():
                    change = (model(text) - plain).flatten(0, 1)[used.places]
                changes.append(change - change.mean(-1, keepdim=True))  # a shift of all logits changes nothing
            falls["own"].append(-changes[0][:, used.cluster].mean().item())
            falls["others"].append(changes[0][:, some].mean(0).abs().mean().item())
            falls["blind"].append(-changes[1][:, used.cluster].mean().item())
            rows.append([used.name, *(values[-1] for values in falls.values()), _spell(model, used.cluster)])
        if seed == lab.seed:
            columns = [
                "head and direction",
                "fall of its words",
                "change of random tokens",
                "random direction",
                "words",
            ]
            lab.table("Logits where a direction is written and its words are likely (20 positions)", columns, rows)
        return {name: sum(values) / len(values) for name, values in falls.items()}

    own, others, blind = "its words", "random tokens", "its words, random direction removed"
    verdict = lab.compare(
        arms={
            own: lambda seed: {"fall of the logits": removed(seed)["own"]},
            others: lambda seed: {"fall of the logits": removed(seed)["others"]},
            blind: lambda seed: {"fall of the logits": removed(seed)["blind"]},
        },
        main=Beats(own, others, on="fall of the logits", by_ratio=4.0),  # five times as much
        also=[Beats(own, blind, on="fall of the logits", by=0.05)],
        seeds=3,
        note=f"Of the {COHERENT:.0%} most coherent ends of the directions of the last third of the blocks, the eight "
        "that are written most where their words are likely, on 384 tokens of text a seed. Of random tokens the "
        "absolute change counts; changes are relative to the mean of all tokens. Directions that move much of the "
        "vocabulary beside their own words decide the mean; the table has each.",
    )
    lab.points("fall of the logits", name="removal", title="Logits after a direction's removal")
    return verdict


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
    """Coherent directions that are written where their words are likely.

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


def _text(lab: Lab, model: DecoderModel, seed: int) -> Int[Tensor, "rows 128"]:
    """Rows of Python's language reference; every seed has its own."""
    tokens = _prose(model.tokenizer)
    starts = torch.randperm(len(tokens) // 128, generator=lab.generator(1000 + seed))[: lab.pick(smoke=1, small=3)]
    return torch.stack([tokens[start : start + 128] for start in (128 * starts).tolist()]).to(model.device)


@cache
def _prose(tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer.encode(load_text("python-docs").text[:150_000]))


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
