"""Othello-GPT: a model that sees move tokens only holds the board, as mine and yours, and acts on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from paperworks.interpret import edit
from paperworks.interpret.probing.board_probes import BoardProbe, fit_board
from paperworks.lab import AtLeast, Beats, Lab, Paper, Verdict
from paperworks.models import DecoderModel
from paperworks.testbeds.othello import EMPTY, MINE, YOURS, Othello
from paperworks.testbeds.othello_model import (
    SETTING,
    Read,
    draw_games,
    full_accuracy,
    legal_rate,
    read,
    rules,
    trained,
    untrained,
)

paper = Paper(
    key="othello-gpt",
    title="Emergent World Representations: Exploring a Sequence Model Trained on a Synthetic Task",
    authors="Li, Hopkins, Bau, Vi\u00e9gas, Pfister, Wattenberg; Nanda, Lee, Wattenberg",
    year=2022,
    ref="arXiv:2210.13382; arXiv:2309.00941; Wattenberg's talk 'Models within models', youtube P_FmwO-wVK8",
    family="probing",
    summary=(
        "A language model of random Othello games, which never sees a board, plays legal moves. Linear probes read the "
        "board from it, if asked for mine and yours instead of black and white; and moving its state along a probe's "
        "direction turns a disc over in what it plays next."
    ),
    implements=(
        "paperworks.testbeds.othello.Othello",
        "paperworks.testbeds.othello.Positions",
        "paperworks.interpret.probing.board_probes.fit_board",
    ),
    equation=r"p(\text{mine, yours or empty on square } s) = \operatorname{softmax}(W_s x + b_s), \qquad "
    r"x' = x + \alpha\, (w_{s,\text{yours}} - w_{s,\text{mine}})",
    usage="""
import torch
from paperworks.interpret.probing.board_probes import fit_board
from paperworks.testbeds.othello import Othello

board = Othello(6)
positions = board.replay(board.random_games(200, seed=0))[:, 10]      # after the eleventh move
mine = positions.board("mover")                                       # 0 empty, 1 mine, 2 yours on every square
states = torch.nn.functional.one_hot(mine, 3).flatten(1).float()      # stands in for a model's states
probe = fit_board(states[:150], mine[:150])
print("squares read right:", float((probe.predict(states[150:]) == mine[150:]).float().mean()))
print("legal moves of the first position:", int(positions.legal()[0].sum()))
""",
    notes="A 6 x 6 board, the first 16 moves and four blocks; the papers play whole games of 8 x 8 with eight.",
    budget_exception="A model is trained on 128,000 games for each of two seeds: about 5 minutes.",
)

View = Literal["mover", "colour"]
VIEWS: tuple[View, ...] = ("mover", "colour")
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0)  # log-odds of the turned disc after an edit, in units of their usual size


_PARTS: dict[tuple[str, int, bool], tuple[DecoderModel, Read, Read]] = {}  # both claims look at the same model


def _parts(lab: Lab, seed: int, *, learned: bool = True) -> tuple[DecoderModel, Read, Read]:
    """A model, its reading of games for the probes, and of other games to judge them on."""
    key = (lab.scale, seed, learned)
    if key not in _PARTS:
        own = Lab(lab.scale, seed, lab.device)
        model, board = trained(own) if learned else untrained(own), rules(lab)
        fitted, judged = lab.pick(smoke=(24, 24), small=(1000, 500), large=(2000, 1000))
        _PARTS[key] = (
            model,
            read(model, board, draw_games(own, "probe", fitted, seed + 2)),
            read(model, board, draw_games(own, "judge", judged, seed + 3)),
        )
    return _PARTS[key]


def _linear(lab: Lab, seen: Read, view: View) -> list[BoardProbe]:
    """The probes of every block."""
    labels = seen.positions.board(view)
    with lab.threads(1):
        return [fit_board(states, labels, tolerance=1e-3) for states in seen.states]


@paper.claim(
    "Linear probes read mine and yours from a model of moves, and not black and white",
    paper="arXiv:2309.00941: linear probes of mine, yours and empty are right on 99.5%; those of black and white have "
    "20.4% errors (arXiv:2210.13382)",
    control="black and white instead of mine and yours; the same probes of the untrained network",
)
def the_board_is_linear_in_mine_and_yours(lab: Lab) -> Verdict:
    """Train on moves, fit a softmax a square on every block in both views, and judge on openings never seen."""

    def arm(view: View, *, learned: bool = True) -> Callable[[int], dict[str, float | list[float]]]:
        def measured(seed: int) -> dict[str, float | list[float]]:
            _, seen, judged = _parts(lab, seed, learned=learned)
            labels, probes = judged.positions.board(view), _linear(lab, seen, view)
            accuracies = [
                full_accuracy(probe.predict(states), labels)
                for probe, states in zip(probes, judged.states, strict=True)
            ]
            return {
                "accuracy on discs, best block": max(accuracies),
                "likeliest move legal": legal_rate(judged),
                "block": [float(block + 1) for block in range(len(probes))],
                "accuracy on discs": accuracies,
            }

        return measured

    mine, colour, fresh, on = "mine/yours", "black/white", "mine/yours, untrained", "accuracy on discs, best block"
    verdict = lab.compare(
        arms={mine: arm("mover"), colour: arm("colour"), fresh: arm("mover", learned=False)},
        main=Beats(mine, colour, on=on, by=0.08),
        also=[
            Beats(mine, fresh, on=on, by=0.08),
            AtLeast(mine, 0.9, on=on),
            AtLeast(mine, 0.95, on="likeliest move legal"),
        ],
        seeds=2,
        note=SETTING + " Accuracy is of mine, yours or empty (black, white or empty) on squares that hold a disc.",
    )
    lab.curves("accuracy on discs", x="block", name="probes")
    return verdict


@dataclass(frozen=True)
class Turns:
    """Positions with a disc to turn over.

    Attributes:
        tokens: games; the position is the one after move `ply`, on which the state is moved.
        square: of the disc. source, target: its label before and after, in the mover's view.
        before, after: which moves are legal.
        black: whether black is to move.
    """

    tokens: Int[Tensor, "n time"]
    ply: Int[Tensor, " n"]
    square: Int[Tensor, " n"]
    source: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    before: Bool[Tensor, "n moves"]
    after: Bool[Tensor, "n moves"]
    black: Bool[Tensor, " n"]

    def labels(self, view: str) -> tuple[Tensor, Tensor]:
        """The disc's label before and after in a view: mine (1) is black (1) where black is to move."""
        source, target = self.source, self.target
        swapped = ~self.black & (view == "colour")
        return torch.where(swapped, target, source), torch.where(swapped, source, target)


def _turns(seen: Read, count: int, seed: int) -> Turns:
    """Draw a disc in each position; keep positions whose legal moves would be others without it, and not none."""
    draws = torch.Generator().manual_seed(seed)
    board = seen.positions.board("mover")
    square = ((board != EMPTY) * (1 - torch.rand(board.shape, generator=draws))).argmax(1)
    before, after = seen.legal, seen.positions.turned(square).legal()
    usable = ((after != before).any(1) & after.any(1)).nonzero().flatten()
    rows = usable[torch.randperm(len(usable), generator=draws)[:count]]
    source = board[rows, square[rows]]
    return Turns(
        tokens=seen.games[seen.row[rows], :-1],
        ply=seen.ply[rows],
        square=square[rows],
        source=source,
        target=MINE + YOURS - source,
        before=before[rows],
        after=after[rows],
        black=torch.from_numpy(seen.positions.black)[rows],
    )


def errors(logits: Float[Tensor, "n moves"], legal: Bool[Tensor, "n moves"]) -> float:
    """Mean number of moves wrongly in or out of the likeliest k, k as many as are legal (Li et al.)."""
    rank = logits.argsort(1, descending=True).argsort(1)
    return float(((rank < legal.sum(1, keepdim=True)) ^ legal).sum(1).double().mean())


Move = Callable[[int, Float[Tensor, "n dim"]], Float[Tensor, "n dim"]]


@torch.no_grad()
def _edited(model: DecoderModel, turns: Turns, move: Move, first: int) -> Float[Tensor, "n moves"]:
    """Logits when the position's state is moved after every block from `first` on."""
    rows = torch.arange(len(turns.ply))

    def change(layer: int) -> Callable[[Tensor], Tensor]:
        def at_the_position(x: Tensor) -> Tensor:
            x = x.clone()
            x[rows, turns.ply] = move(layer, x[rows, turns.ply].cpu()).to(x)
            return x

        return at_the_position

    with edit(model, {f"blocks.{layer}": change(layer) for layer in range(first, model.spec.depth)}):
        logits = model(turns.tokens.to(model.device))[rows, turns.ply].cpu()
    return logits[:, : turns.after.shape[1]]


def _toward(probes: list[BoardProbe], turns: Turns, view: View, odds: list[float]) -> Move:
    """Turn the disc over in the probe's reading, to the log-odds given for each block."""
    source, target = turns.labels(view)
    return lambda layer, x: probes[layer].turn(x, turns.square, source, target, odds[layer])


def _astray(move: Move, seed: int) -> Move:
    """Move as far as another move does, in a random direction."""

    def moved(layer: int, x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + layer))
        return x + (move(layer, x) - x).norm(dim=1, keepdim=True) * functional.normalize(drawn, dim=1)

    return moved


def _usual_odds(probe: BoardProbe, states: Tensor, labels: Tensor) -> float:
    """Median of |log p(1) / p(2)| over squares with a disc."""
    scores = probe.scores(states)
    return float((scores[..., MINE] - scores[..., YOURS])[labels != EMPTY].abs().median())


@paper.claim(
    "Moving the state along a probe's direction turns a disc over in the moves that follow",
    paper="arXiv:2309.00941: adding the direction of a linear probe edits the board; arXiv:2210.13382: errors against "
    "the edited board's legal moves fall from 2.68 to 0.12",
    control="the state as it is; a random direction of the same length; the directions of the black/white probes",
)
def vector_arithmetic_edits_the_board(lab: Lab) -> Verdict:
    """Choose the first block and the strength on some games, and count errors against the edited board on others."""
    tried, judged_on = lab.pick(smoke=(8, 8), small=(300, 800))

    def turned(seed: int, view: View) -> tuple[DecoderModel, Turns, Move, int]:
        """The model, discs to turn over, and the best edit in a view."""
        model, seen, judged = _parts(lab, seed)
        tuning, turns = _turns(seen, tried, seed + 10), _turns(judged, judged_on, seed + 11)
        probes, labels = _linear(lab, seen, view), seen.positions.board(view)
        usual = [_usual_odds(probe, states, labels) for probe, states in zip(probes, seen.states, strict=True)]

        def toward(where: Turns, strength: float) -> Move:
            return _toward(probes, where, view, [strength * odds for odds in usual])

        first, strength = min(
            ((first, strength) for first in range(model.spec.depth) for strength in STRENGTHS),
            key=lambda pair: errors(_edited(model, tuning, toward(tuning, pair[1]), pair[0]), tuning.after),
        )
        return model, turns, toward(turns, strength), first

    def arm(view: View, change: Callable[[Move, int], Move] | None = None) -> Callable[[int], dict[str, float]]:
        def measured(seed: int) -> dict[str, float]:
            model, turns, move, first = turned(seed, view)
            edited = _edited(model, turns, change(move, seed) if change else move, first)
            return {"errors against the edited board": errors(edited, turns.after)}

        return measured

    def unmoved(seed: int) -> dict[str, float]:
        model, _, judged = _parts(lab, seed)
        turns = _turns(judged, judged_on, seed + 11)
        return {"errors against the edited board": errors(_edited(model, turns, lambda layer, x: x, 0), turns.after)}

    mine, colour, random, still = "mine/yours direction", "black/white direction", "random direction", "state as it is"
    on = "errors against the edited board"
    verdict = lab.compare(
        arms={mine: arm("mover"), colour: arm("colour"), random: arm("mover", _astray), still: unmoved},
        main=Beats(mine, still, on=on, by_ratio=0.3, lower=True),
        also=[
            Beats(mine, random, on=on, by_ratio=0.3, lower=True),
            Beats(mine, colour, on=on, by_ratio=0.15, lower=True),
        ],
        seeds=2,
        note=SETTING + " Errors are the moves wrongly in or out of the k likeliest, k as many as are legal. The "
        "disc is drawn at random among those that matter to the legal moves. Strength is in units of the median "
        "log-odds of a disc's label.",
    )
    lab.points(on, name="edits", title="Moves wrongly in or out")
    return verdict


@paper.claim(
    "The rules are Othello's: games counted to the seventh ply, and labels that follow the player to move",
    paper="Known counts of the 8 x 8 game: 4, 12, 56, 244, 1396, 8200, 55092; mine and yours change sides after a pass",
    kind="exact",
)
def rules_are_exact(lab: Lab) -> Verdict:
    """Count games, and compare both views of the board at every position of random games, passes among them."""
    counts = [Othello(8).perft(depth) for depth in range(1, 8)]
    squares = {size: Othello(size).moves for size in (4, 6, 8)}
    positions = Othello(4).replay(Othello(4).random_games(2000, lab.seed))
    mover, colour = positions.board("mover"), positions.board("colour")
    black = torch.from_numpy(positions.black)[..., None]
    swapped = torch.where(colour == EMPTY, EMPTY, MINE + YOURS - colour)
    moved = mover[:, 1:].count_nonzero(-1) > mover[:, :-1].count_nonzero(-1)
    passes = int((moved & ~(black[:, 1:, 0] ^ black[:, :-1, 0])).sum())
    agree = bool((mover == torch.where(black, colour, swapped)).all())
    return lab.judge(
        checks={
            "perft of 8 x 8": counts == [4, 12, 56, 244, 1396, 8200, 55092],
            "12, 32 and 60 playable squares": squares == {4: 12, 6: 32, 8: 60},
            "mine and yours are the colours, seen by who is to move": agree and passes > 0,
        },
        measured={"perft": counts, "playable squares": list(squares.values()), "passes among the positions": passes},
    )
