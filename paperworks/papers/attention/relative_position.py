"""Relative positions: attention learns a vector for each distance instead of one for each place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from paperworks import train
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict, Within
from paperworks.models import Block, Encoder
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions, Placement, RelativeVectors
from paperworks.testbeds.training import fit
from paperworks.train.losses import IGNORED

paper = Paper(
    key="relative-position",
    title="Self-Attention with Relative Position Representations",
    authors="Shaw, Uszkoreit, Vaswani",
    year=2018,
    ref="arXiv:1803.02155",
    family="attention",
    summary=(
        "Keys and values get a learned vector for the clipped distance between two tokens, so a rule learned at one "
        "place holds at every other, also beyond the trained length."
    ),
    implements=("paperworks.nn.position.relative.RelativeVectors",),
    equation=(
        r"e_{ij} = \frac{x_i W^Q (x_j W^K + a^K_{ij})^\top}{\sqrt{d_z}}, \; a^K_{ij} = w^K_{\operatorname{clip}(j - "
        r"i, k)}"
    ),
    usage="""
import torch
from paperworks.nn import Attention, Placement, RelativeVectors

layer = Attention(heads=4, causal=False, position=RelativeVectors(reach=16)).build(64)
x = torch.randn(2, 20, 64)
here = Placement().resolve(2, 20, x.device)
later = Placement(positions=torch.arange(20)[None] + 1000).resolve(2, 20, x.device)
print("change 1,000 places on:", float((layer(x, later) - layer(x, here)).detach().abs().max()))
""",
)

DIM, HEADS = 64, 4
REACH = 4


def _distances(time: int) -> Tensor:
    at = torch.arange(time)
    return at - at[:, None]


@paper.claim(
    "The fast form is the plain one, places do not count, and order counts only through the vectors",
    paper="Equations 3 to 5 and Section 3.3 (the split that avoids a vector for each pair); 2(2k + 1) d_z parameters",
    kind="exact",
    control="clipping the index after it is shifted, and distances taken the other way round",
)
@torch.no_grad()
def fast_form_is_exact(lab: Lab) -> Verdict:
    """Compare with the gather of (query, key, channel) in float64; shift and permute the tokens."""
    torch.manual_seed(lab.seed)
    time, size = lab.pick(smoke=12, small=64), DIM // HEADS
    distance = _distances(time)
    built = {reach: _attention(reach) for reach in (0, REACH)}
    x = torch.randn(2, time, DIM, dtype=torch.float64)
    outs = {reach: each(x, Placement().resolve(2, time, x.device)) for reach, each in built.items()}
    right = distance.clamp(-REACH, REACH) + REACH
    module = built[REACH]
    gaps = {
        "the plain gather": _gap(_gathered(module, x, right), outs[REACH]),
        "clipped after the shift": _gap(_gathered(module, x, (distance + REACH).clamp(0, REACH)), outs[REACH]),
        "query - key": _gap(_gathered(module, x, (-distance).clamp(-REACH, REACH) + REACH), outs[REACH]),
    }
    later = Placement(positions=torch.arange(time)[None] + 1000).resolve(2, time, x.device)
    order = torch.randperm(time)
    permuted = {
        reach: _gap(each(x[:, order], Placement().resolve(2, time, x.device)), outs[reach][:, order])
        for reach, each in built.items()
    }
    plain = Attention(heads=HEADS, causal=False).build(DIM)
    extra = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in plain.parameters())
    return lab.judge(
        checks={
            "equal to the gather to 1e-12": gaps["the plain gather"] < 1e-12,
            "positions 1,000 later: the same outputs": _gap(module(x, later), outs[REACH]) == 0.0,
            "k = 0 cannot tell the order": permuted[0] < 1e-12,
            f"k = {REACH} can": permuted[REACH] > 0.01,
            "2 (2k + 1) d parameters more": extra == 2 * (2 * REACH + 1) * size,
            "clipping after the shift is another function": gaps["clipped after the shift"] > 0.01,
            "so is query - key": gaps["query - key"] > 0.01,
        },
        measured={
            "largest gap to the gather": gaps["the plain gather"],
            "change under permutation, k = 0": permuted[0],
            "parameters added": extra,
            "numbers the fast form holds for each query": 2 * REACH + 1,
        },
        control={
            "largest gap, clipped after the shift": gaps["clipped after the shift"],
            "largest gap, query - key": gaps["query - key"],
            f"change under permutation, k = {REACH}": permuted[REACH],
        },
        note=f"{time} tokens, {HEADS} heads of {size} channels, both ways, float64, random weights.",
    )


def _attention(reach: int) -> nn.Module:
    module = Attention(heads=HEADS, causal=False, position=RelativeVectors(reach=reach)).build(DIM).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def _gathered(module: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    parts: dict[str, nn.Module] = dict(module.named_children())
    tables = dict(parts["relative"].named_parameters())
    q, k, v = (parts[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("query", "key", "value"))
    scores = (q[:, :, :, None] * (k[:, :, None] + tables["key"][rows])).sum(-1) * q.shape[-1] ** -0.5
    heads = (scores.softmax(-1)[..., None] * (v[:, :, None] + tables["value"][rows])).sum(3)
    return parts["output"](heads.transpose(1, 2).flatten(2))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


SYMBOLS, TRAINED = 16, 20


@dataclass(frozen=True)
class _Back:
    """Say the symbol that stood `back` places before."""

    back: int = 3

    def draw(self, rows: int, time: int, draws: torch.Generator) -> dict[str, Tensor]:
        tokens = torch.randint(SYMBOLS, (rows, time), generator=draws)
        targets = tokens.roll(self.back, 1)
        targets[:, : self.back] = IGNORED
        return {"tokens": tokens, "targets": targets}


@dataclass(frozen=True)
class _Reversal:
    """Blocks of a mark and three symbols; at each symbol, say the one that mirrors it in its block.

    So every distance that the rule needs is below k = 4, whose vector also stands for all that is farther away. Rows
    begin anywhere in a block, or the place in the row would tell the place in the block; what a row cuts is not asked.
    """

    block: int = 3

    def draw(self, rows: int, time: int, draws: torch.Generator) -> dict[str, Tensor]:
        size = self.block + 1
        blocks = time // size + 2
        symbols = torch.randint(SYMBOLS, (rows, blocks, self.block), generator=draws)
        mark = torch.full((rows, blocks, 1), SYMBOLS)
        tokens = torch.cat((mark, symbols), 2).flatten(1)
        targets = torch.cat((torch.full_like(mark, IGNORED), symbols.flip(2)), 2).flatten(1)
        places = torch.randint(size, (rows, 1), generator=draws) + torch.arange(time)
        block = places // size
        cut = (block * size < places[:, :1]) | (block * size + size - 1 > places[:, -1:])
        return {"tokens": tokens.gather(1, places), "targets": targets.gather(1, places).masked_fill(cut, IGNORED)}


Task = _Back | _Reversal


class _Tagger(nn.Module):
    """An encoder that says one symbol at each token."""

    def __init__(self, spec: Encoder) -> None:
        super().__init__()
        self.encoder = spec.build()
        self.symbols = nn.Linear(spec.dim, SYMBOLS)
        if isinstance(self.encoder.position, nn.Embedding):  # as large as the embeddings they are added to
            nn.init.normal_(self.encoder.position.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, time, symbols)."""
        return self.symbols(self.encoder(tokens))


def _spec(depth: int, position: RelativeVectors | None) -> Encoder:
    """Learned absolute positions where there are no relative ones, enough of them for twice the trained length."""
    mixer = Attention(heads=HEADS, causal=False, bias=True, position=position)
    return Encoder(
        vocab_size=SYMBOLS + 1,
        dim=DIM,
        depth=depth,
        norm=LayerNorm(),
        block=Block(norm=LayerNorm(), mixer=mixer, feedforward=MLP(hidden=2 * DIM)),
        position=None if position is not None else LearnedPositions(length=2 * TRAINED),
        embedding_std=0.5,
    )


def _taught(lab: Lab, spec: Encoder, task: Task, steps: int, seed: int) -> nn.Module:
    model = _Tagger(spec)

    def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
        draws = lab.generator(1000 * seed + epoch)
        return (task.draw(32, TRAINED, draws) for _ in range(steps))

    adam = train.AdamW(weight_decay=0.0)
    with lab.threads(1):
        fit(model, train.next_token_loss, batches, steps=steps, lr=3e-3, seed=seed, optimizer=adam, warmup=0.05)
    return model.eval()


@torch.no_grad()
def _right(model: nn.Module, task: Task, time: int, draws: torch.Generator, beyond: int = 0) -> float:
    """The share of right answers at the places from `beyond` on."""
    batch = task.draw(100, time, draws)
    asked = batch["targets"] != IGNORED
    asked[:, :beyond] = False
    return (model(batch["tokens"]).argmax(-1) == batch["targets"])[asked].float().mean().item()


# with their layers and steps
TASKS: dict[str, tuple[Task, int, int]] = {"3 back": (_Back(), 1, 800), "blocks reversed": (_Reversal(), 2, 2500)}


@paper.claim(
    "A rule of distances, learned at 20 tokens, holds at 40",
    paper="Section 3: positions enter as pairwise distances only; Table 1: better than absolute ones in translation",
    control="learned absolute positions, whose vectors beyond 20 were never trained",
)
def holds_beyond_the_trained_length(lab: Lab) -> Verdict:
    """Teach "say the symbol 3 back" and "reverse each block of three" and ask at places not trained on."""

    def arm(position: RelativeVectors | None) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            found = {}
            for name, (task, depth, steps) in TASKS.items():
                model = _taught(lab, _spec(depth, position), task, lab.pick(smoke=2, small=steps), seed)
                tests = lab.generator(10**6 + seed)
                found[f"right, {name}, trained places"] = _right(model, task, TRAINED, tests)
                found[f"right, {name}, beyond"] = _right(model, task, 2 * TRAINED, tests, beyond=TRAINED)
            return found

        return measures

    verdict = lab.compare(
        arms={"relative": arm(RelativeVectors(reach=REACH)), "absolute": arm(None)},
        main=Beats("relative", "absolute", on="right, 3 back, beyond", by=0.5),
        also=[
            Beats("relative", "absolute", on="right, blocks reversed, beyond", by=0.5),
            *(AtLeast("relative", 0.99, on=f"right, {task}, beyond") for task in TASKS),
            *(AtLeast("absolute", 0.9, on=f"right, {task}, trained places") for task in TASKS),
        ],
        seeds=2,
        note=f"{SYMBOLS} symbols, so chance is {1 / SYMBOLS:.3f}; width {DIM}, one layer for the first task and two "
        f"for the second, k = {REACH}, 800 and 2,500 steps of 32 rows of {TRAINED} tokens. Beyond: "
        f"places {TRAINED} to {2 * TRAINED - 1} of rows twice as long. In earlier designs rows began with a block: "
        "with k = 4 the share of tokens farther than that tells the place in the row, so the second task could be "
        "learned by place, and was: 0.988 (blocks of four) and 0.843 (of three) right beyond.",
    )
    lab.points("right, blocks reversed, beyond", name="lengths", title="Blocks reversed: right beyond trained places")
    return verdict


@paper.claim(
    "The vectors of the keys do alone what both do, those of the values nearly so, none of them nothing",
    paper="Table 4: both 25.8 BLEU, without those of the values 25.8, without those of the keys 25.3, neither 12.5; "
    "Table 3: k = 0 12.5, k = 1 25.5, k >= 2 about 25.8",
    control="no distances told apart (k = 0), and a reach too short for the rule (k = 2)",
)
def keys_carry_it(lab: Lab) -> Verdict:
    """Teach "say the symbol 3 back" with one layer and parts of the vectors left out."""
    steps, task = lab.pick(smoke=2, small=500), TASKS["3 back"][0]
    both = RelativeVectors(reach=REACH)
    positions = {
        "keys and values": both,
        "keys only": replace(both, values=False),
        "values only": replace(both, keys=False),
        "k = 0": RelativeVectors(reach=0),
        "k = 2": RelativeVectors(reach=2),
    }

    def arm(position: RelativeVectors) -> Callable[[int], dict[str, float]]:
        def measures(seed: int) -> dict[str, float]:
            model = _taught(lab, _spec(1, position), task, steps, seed)
            return {"right": _right(model, task, TRAINED, lab.generator(10**6 + seed))}

        return measures

    verdict = lab.compare(
        arms={name: arm(position) for name, position in positions.items()},
        main=Beats("keys only", "k = 0", on="right", by=0.5),
        also=[
            AtLeast("keys only", 0.99, on="right"),
            AtLeast("keys and values", 0.99, on="right"),
            Within("values only", "keys only", on="right", by=0.1),
            Beats("keys only", "k = 2", on="right", by=0.5),
        ],
        seeds=3,
        note="One layer. Values alone can do it: what a token is sets how much it is attended to, and that is the "
        f"share of the vector of its distance. k = 2 clips 3 to 2. {steps} steps, rows of {TRAINED}.",
    )
    lab.points("right", name="parts", title='"Say the symbol 3 back", by the vectors that are learned')
    return verdict
