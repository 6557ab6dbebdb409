"""The model of the Othello papers: trained on random games, and read on games whose openings it never saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks import interpret, train
from paperworks.lab import Lab
from paperworks.models import Block, Decoder, DecoderModel
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions
from paperworks.testbeds.othello import EMPTY, MINE, YOURS, Othello, Positions

OPENING = 5  # moves that decide to which part a game belongs
PARTS = {"model": 0.7, "probe": 0.15, "judge": 0.15}  # shares of the openings
Part = Literal["model", "probe", "judge"]

SETTING = (
    "The first 16 moves of random games on 6 x 6, whole games being too much for minutes; 4 blocks of 128 dimensions, "
    "128,000 games, the loss of each next move averaged over all that could be played. Openings of five moves are "
    "dealt to the model's training (70%), the probes' (15%) and the judging (15%), and only positions from the fifth "
    "move on are read: no sequence of moves that is judged was trained on."
)


def rules(lab: Lab) -> Othello:
    """The board of a scale."""
    return Othello(lab.pick(smoke=4, small=6, large=8))


def part_of(board: Othello, games: Int[Tensor, "games time"]) -> Int[Tensor, " games"]:
    """to which of `PARTS`, by number, the opening of each game belongs; it is the same in every run."""
    places = (board.padding + 1) ** torch.arange(OPENING)
    # A small number times a large prime, modulo another one, is as good as a draw.
    draw = (games[:, :OPENING] * places).sum(1) * 2_654_435_761 % 1_000_003 / 1_000_003
    bounds = torch.tensor(list(PARTS.values())).cumsum(0)[:-1]
    return torch.bucketize(draw, bounds)


def draw_games(lab: Lab, part: Part, count: int, seed: int) -> Int[Tensor, "count moves"]:
    """Draw random games of one part, as long as they are read at this scale."""
    board, wanted = rules(lab), list(PARTS).index(part)
    found: list[Tensor] = []
    while sum(map(len, found)) < count:
        drawn = board.random_games(int(1.2 * count / PARTS[part]) + 64, seed=seed * 1000 + len(found))
        found.append(drawn[part_of(board, drawn) == wanted])
    return torch.cat(found)[:count, : plies(lab)]


def plies(lab: Lab) -> int:
    """How many moves of a game are read."""
    return lab.pick(smoke=12, small=16, large=60)


def untrained(lab: Lab) -> DecoderModel:
    """The model before training: GPT's parts, small."""
    board = rules(lab)
    dim, depth = lab.pick(smoke=(16, 2), small=(128, 4), large=(512, 8))
    block = Block(
        norm=LayerNorm(),
        mixer=Attention(heads=lab.pick(smoke=2, small=4, large=8)),
        feedforward=MLP(hidden=4 * dim, activation="relu"),
    )
    torch.manual_seed(lab.seed)
    spec = Decoder(
        vocab_size=board.moves + 1,
        dim=dim,
        depth=depth,
        block=block,
        norm=LayerNorm(),
        context=plies(lab),
        position=LearnedPositions(length=plies(lab)),
    )
    return spec.build().to(lab.device).eval()


def expected_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sum of -log p(next move), averaged over the next moves that could have been played, and their number.

    In a random game the next move is drawn evenly from the legal ones. One draw, as in the papers, has the same
    gradient on average and more noise: four times as many games are needed for the same share of legal moves. The
    model itself sees nothing but moves either way.
    """
    tokens, chances = batch
    logits: Tensor = model(tokens)
    log_p = logits.float().log_softmax(-1)[..., : chances.shape[-1]]
    return -(chances * log_p).sum(), chances.sum()


_TRAINED: dict[tuple[str, int], DecoderModel] = {}


def trained(lab: Lab) -> DecoderModel:
    """The model trained to predict the next move of random games, once a process."""
    key = (lab.scale, lab.seed)
    if key in _TRAINED:
        return _TRAINED[key]
    board, model = rules(lab), untrained(lab)
    batch, steps = lab.pick(smoke=(16, 3), small=(128, 1000), large=(512, 2000))

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for games in draw_games(lab, "model", batch * steps, lab.seed + 1).split(batch):
            legal = board.replay(games[:, :-1]).legal().float()
            yield games[:, :-1], legal / legal.sum(-1, keepdim=True).clamp_min(1)

    settings = train.Settings(
        steps=steps,
        lr=lab.pick(smoke=2e-3, small=2e-3, large=5e-4),
        warmup=0.05,
        min_lr=0.02,
        seed=lab.seed,
        precision=lab.pick(smoke="float32", small="float32", large="bfloat16"),
        device=lab.device,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress("a model of random Othello games", steps) as advance:
        train.fit(model.train(), expected_loss, batches, settings, on_step=lambda step: advance(1))
    _TRAINED[key] = model.eval()
    return model


@dataclass(frozen=True)
class Read:
    """What a model holds at positions from the end of the opening on that have a next move.

    Attributes:
        games: the games' tokens. row, ply: which game and which of its moves each position follows.
        states: the residual stream after each block, at the position's move.
        positions: the boards. logits: of the next move, padding left out.
    """

    games: Int[Tensor, "games moves"]
    row: Int[Tensor, " n"]
    ply: Int[Tensor, " n"]
    states: list[Float[Tensor, "n dim"]]
    positions: Positions
    logits: Float[Tensor, "n moves"]

    @property
    def legal(self) -> Bool[Tensor, "n moves"]:
        """Which moves are legal."""
        return self.positions.legal()


@torch.no_grad()
def read(model: DecoderModel, board: Othello, games: Int[Tensor, "games moves"]) -> Read:
    """Run the model over games and keep the positions from the end of the opening on."""
    paths = [f"blocks.{layer}" for layer in range(model.spec.depth)]
    with interpret.record(model, paths) as seen:
        logits = model(games[:, :-1].to(model.device))[..., : board.moves].cpu()
    keep = games[:, 1:] != board.padding
    keep[:, : OPENING - 1] = False
    row, ply = keep.nonzero(as_tuple=True)
    positions = board.replay(games)[row, ply]
    return Read(games, row, ply, [seen[path].cpu()[keep] for path in paths], positions, logits[keep])


def legal_rate(read: Read) -> float:
    """The share of positions whose likeliest move is legal."""
    return float(read.legal.gather(1, read.logits.argmax(1, keepdim=True)).double().mean())


def full_accuracy(predicted: Int[Tensor, "n squares"], labels: Int[Tensor, "n squares"]) -> float:
    """The share of squares with a disc whose label is right: empty ones are too easy to count."""
    full = labels != EMPTY
    return float((predicted == labels)[full].double().mean())


def properties(positions: Positions) -> Bool[Tensor, "n properties"]:
    """Whether mine, and whether yours, stands on each square: 2 x squares properties; blanks are none."""
    labels = positions.board("mover")
    return torch.cat([labels == MINE, labels == YOURS], dim=1)
