"""Othello-GPT: a model that sees move tokens only holds the board, as mine and yours, and acts on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from paperworks import train
from paperworks.interpret import edit
from paperworks.interpret.probing.board_probes import BoardProbe, fit_board
from paperworks.lab import Lab, Paper, Verdict
from paperworks.lab.figures import COLORS, CONTROL, FAINT, INK
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
)

VIEWS = ("mover", "colour")
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0)  # log-odds of the turned disc after an edit, in units of their usual size
HIDDEN = 256  # of the nonlinear probe


def _parts(lab: Lab, model: DecoderModel) -> tuple[Read, Read]:
    """Read games for the probes, and other games to judge them on."""
    fitted, judged = lab.pick(smoke=(24, 24), small=(1500, 800), large=(2000, 1000))
    board = rules(lab)
    return (
        read(model, board, draw_games(lab, "probe", fitted, lab.seed + 2)),
        read(model, board, draw_games(lab, "judge", judged, lab.seed + 3)),
    )


def _linear(lab: Lab, seen: Read, view: str) -> list[BoardProbe]:
    """Fit the probes of every block."""
    labels = seen.positions.board(view)  # type: ignore[arg-type]
    with lab.threads(1):
        return [fit_board(states, labels, tolerance=1e-3) for states in lab.track(seen.states, f"probes of {view}")]


def _accuracies(probes: list[BoardProbe], judged: Read, view: str) -> list[float]:
    labels = judged.positions.board(view)  # type: ignore[arg-type]
    return [full_accuracy(probe.predict(states), labels) for probe, states in zip(probes, judged.states, strict=True)]


def _nonlinear(lab: Lab, seen: Read, judged: Read, layer: int, view: str) -> float:
    """Train a probe of two layers by gradient descent and return its accuracy on squares with a disc."""
    labels = seen.positions.board(view)  # type: ignore[arg-type]
    centre, spread = seen.states[layer].mean(0), seen.states[layer].std()
    cases = (seen.states[layer] - centre) / spread
    torch.manual_seed(lab.seed)
    probe = nn.Sequential(
        nn.Linear(cases.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 3 * labels.shape[1]), nn.Unflatten(1, (3, -1))
    )
    epochs = lab.pick(smoke=1, small=30)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(lab.seed + epoch))
        for rows in order.split(512):
            yield cases[rows], labels[rows]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    steps = epochs * -(-len(cases) // 512)
    settings = train.Settings(
        steps=steps,
        lr=2e-3,
        optimizer=train.AdamW(weight_decay=0.05),
        seed=lab.seed,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.threads(1), lab.progress(f"nonlinear probe of {view}", steps) as advance:
        train.fit(probe, loss, batches, settings, on_step=lambda step: advance(1))
    with torch.no_grad():
        predicted = probe((judged.states[layer] - centre) / spread).argmax(1)
    return full_accuracy(predicted, judged.positions.board(view))  # type: ignore[arg-type]


@paper.claim(
    "Linear probes read mine and yours from a model of moves, and not black and white",
    paper="arXiv:2309.00941: linear probes of mine, yours and empty are right on 99.5%; those of black and white have "
    "20.4% errors (arXiv:2210.13382, which needs nonlinear ones: 1.7%; 26.2% in a random network)",
    control="black and white instead of mine and yours; the same probes of the untrained network",
)
def the_board_is_linear_in_mine_and_yours(lab: Lab) -> Verdict:
    """Train on moves, fit a softmax a square on every block in both views, and judge on openings never seen."""
    curves: dict[tuple[str, str], list[float]] = {}
    bent: dict[tuple[str, str], float] = {}
    rates = {}
    for name, model in (("trained", trained(lab)), ("untrained", untrained(lab))):
        seen, judged = _parts(lab, model)
        rates[name] = legal_rate(judged)
        for view in VIEWS:
            curves[name, view] = _accuracies(_linear(lab, seen, view), judged, view)
            bent[name, view] = _nonlinear(lab, seen, judged, len(seen.states) // 2, view)
    legal = judged.legal.double().mean(1)
    usual = seen.positions.board("mover").mode(0).values.expand(len(judged.row), -1)
    ours, colour, fresh = (
        max(curves[key]) for key in (("trained", "mover"), ("trained", "colour"), ("untrained", "mover"))
    )
    _draw_probes(lab, curves, bent)
    return lab.judge(
        checks={
            "mine/yours at least 8 points above black/white": ours > colour + 0.08,
            "and at least 8 points above the untrained network's": ours > fresh + 0.08,
            "linear mine/yours probe: accuracy above 90% on squares with a disc": ours > 0.9,
            "likeliest move legal in more than 95%": rates["trained"] > 0.95,
            "a random move token is legal in less than 30%": float(legal.mean()) < 0.3,
        },
        measured={
            "mine/yours, best block": ours,
            "mine/yours by block": curves["trained", "mover"],
            "black/white by block": curves["trained", "colour"],
            "nonlinear, middle block, mine/yours and black/white": [bent["trained", view] for view in VIEWS],
            "likeliest move legal": rates["trained"],
            "positions judged": len(judged.row),
        },
        control={
            "black/white, best block": colour,
            "untrained network, mine/yours by block": curves["untrained", "mover"],
            "untrained network, black/white by block": curves["untrained", "colour"],
            "untrained network, nonlinear": [bent["untrained", view] for view in VIEWS],
            "the most frequent label of each square": full_accuracy(usual, judged.positions.board("mover")),
            "untrained network's likeliest move legal": rates["untrained"],
            "a random move token legal": float(legal.mean()),
        },
        note=SETTING + " Accuracy is of mine, yours or empty (black, white or empty) on squares that hold a disc.",
    )


def _draw_probes(lab: Lab, curves: dict[tuple[str, str], list[float]], bent: dict[tuple[str, str], float]) -> None:
    styles = {
        ("trained", "mover"): ("mine / yours", COLORS[0], "-"),
        ("trained", "colour"): ("black / white", COLORS[1], "-"),
        ("untrained", "mover"): ("mine / yours, untrained", CONTROL, "-"),
        ("untrained", "colour"): ("black / white, untrained", CONTROL, ":"),
    }
    with lab.figure("probes", figsize=(7.6, 3.6)) as figure:
        axes = figure.subplots()
        blocks = list(range(1, len(curves["trained", "mover"]) + 1))
        for key, (label, color, line) in styles.items():
            axes.plot(blocks, curves[key], line, color=color, marker="o", ms=4, label=label)
            if key[0] == "trained":
                axes.plot(
                    [len(blocks) // 2 + 1], [bent[key]], "D", color=color, mfc="none", ms=8, label=f"{label}, nonlinear"
                )
        axes.set_ylim(0.4, 1.0)
        axes.set_xticks(blocks)
        axes.set_xlabel("block")
        axes.set_ylabel("accuracy on discs")
        axes.set_title("What probes read of the board")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)


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
        """Return the disc's label before and after in a view: mine (1) is black (1) where black is to move."""
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
    """Return the mean number of moves wrongly in or out of the likeliest k, k as many as are legal (Li et al.)."""
    rank = logits.argsort(1, descending=True).argsort(1)
    return float(((rank < legal.sum(1, keepdim=True)) ^ legal).sum(1).double().mean())


Move = Callable[[int, Float[Tensor, "n dim"]], Float[Tensor, "n dim"]]


@torch.no_grad()
def _edited(model: DecoderModel, turns: Turns, move: Move, first: int) -> Float[Tensor, "n moves"]:
    """Return the logits when the position's state is moved after every block from `first` on."""
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


def _toward(probes: list[BoardProbe], turns: Turns, view: str, odds: list[float]) -> Move:
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
    """Return the median of |log p(1) / p(2)| over squares with a disc."""
    scores = probe.scores(states)
    return float((scores[..., MINE] - scores[..., YOURS])[labels != EMPTY].abs().median())


@paper.claim(
    "Moving the state along a probe's direction turns a disc over in the moves that follow",
    paper="arXiv:2309.00941: adding the direction of a linear probe edits the board; arXiv:2210.13382: errors against "
    "the edited board's legal moves fall from 2.68 to 0.12",
    control="a random direction of the same length; the directions of the black/white probes",
)
def vector_arithmetic_edits_the_board(lab: Lab) -> Verdict:
    """Choose the first block and the strength on some games, and count errors against the edited board on others."""
    model = trained(lab)
    seen, judged = _parts(lab, model)
    tuning = _turns(seen, lab.pick(smoke=8, small=400), lab.seed + 10)
    turns = _turns(judged, lab.pick(smoke=8, small=1000), lab.seed + 11)

    def moves(view: str) -> Callable[[Turns, float], Move]:
        probes = _linear(lab, seen, view)
        labels = seen.positions.board(view)  # type: ignore[arg-type]
        usual = [_usual_odds(probe, states, labels) for probe, states in zip(probes, seen.states, strict=True)]
        return lambda where, strength: _toward(probes, where, view, [strength * odds for odds in usual])

    def best(toward: Callable[[Turns, float], Move]) -> tuple[int, float]:
        tried = {
            (first, strength): errors(_edited(model, tuning, toward(tuning, strength), first), tuning.after)
            for first in range(model.spec.depth)
            for strength in STRENGTHS
        }
        return min(tried, key=lambda pair: tried[pair])

    toward = {view: moves(view) for view in VIEWS}
    chosen = {view: best(toward[view]) for view in VIEWS}
    still = _edited(model, turns, lambda layer, x: x, 0)
    after = {
        view: errors(_edited(model, turns, toward[view](turns, chosen[view][1]), chosen[view][0]), turns.after)
        for view in VIEWS
    }
    first, strength = chosen["mover"]
    astray = _edited(model, turns, _astray(toward["mover"](turns, strength), lab.seed), first)
    none, random = errors(still, turns.after), errors(astray, turns.after)
    kept = errors(still, turns.before)
    _draw_edits(lab, [kept, none, after["mover"], after["colour"], random])
    cut = 1 - after["mover"] / none
    return lab.judge(
        checks={
            "errors against the edited board's legal moves fall by more than 30%": cut > 0.3,
            "random directions of the same length: by less than 10%": random > 0.9 * none,
            "black/white directions cut less than half as much": none - after["colour"] < (none - after["mover"]) / 2,
        },
        measured={
            "errors before": none,
            "errors after": after["mover"],
            "share of errors removed": cut,
            "first block moved and strength, chosen on other games": [first + 1, strength],
            "errors on the board as it is, unmoved": kept,
            "positions": len(turns.ply),
        },
        control={
            "errors after, random directions": random,
            "errors after, black/white directions": after["colour"],
            "first block and strength of those": [chosen["colour"][0] + 1, chosen["colour"][1]],
        },
        note=SETTING + " Errors are the moves wrongly in or out of the k likeliest, k as many as are legal. The "
        "disc is drawn at random among those that matter to the legal moves. Strength is in units of the median "
        "log-odds of a disc's label.",
    )


def _draw_edits(lab: Lab, counts: list[float]) -> None:
    names = [
        "the board as it is,\nstate as it is",
        "edited board,\nstate as it is",
        "edited board,\nmine/yours direction",
        "edited board,\nblack/white direction",
        "edited board,\nrandom direction",
    ]
    with lab.figure("edits", figsize=(7.2, 3.2)) as figure:
        axes = figure.subplots()
        bars = axes.barh(names, counts, color=[FAINT, CONTROL, COLORS[0], COLORS[1], CONTROL])
        axes.bar_label(bars, fmt="%.2f", padding=4, color=INK, fontsize=9)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("moves wrongly in or out of the likeliest")
        axes.set_title("What the model would play when a disc is turned over")


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
