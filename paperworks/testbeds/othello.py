"""Othello on boards of 4 x 4, 6 x 6 and 8 x 8, many games at once: rules, random games as move tokens, board labels.

A board is a set of squares in the bits of a uint64, square number row * size + column in bit number square. Two sets
make a position: the discs of the player to move and those of the opponent, in arrays of any shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paperworks.core.errors import unknown

SIZES = (4, 6, 8)
EMPTY, MINE, YOURS = 0, 1, 2  # labels of a square; seen by colour, 1 is black and 2 is white
VIEWS = ("mover", "colour")

Bits = Any  # numpy arrays of uint64; numpy's generic types would say no more


@dataclass(frozen=True)
class Othello:
    """The rules on a size x size board. Black moves first; a player without a move passes; when both must, it is over.

    A move token is the number of a playable square: all but the four in the middle, in the order of the squares. A
    pass is no token: the next token is simply the same player's. `padding` follows a game that ends early.

    Raises ValueError for a size that is not 4, 6 or 8.
    """

    size: int = 8

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"an Othello board is 4, 6 or 8 squares wide here (64 bits hold no more), got {self.size}")

    @property
    def squares(self) -> int:
        """Squares of the board."""
        return self.size**2

    @property
    def moves(self) -> int:
        """Move tokens, and the most moves a game can have."""
        return self.squares - 4

    @property
    def padding(self) -> int:
        """The token that stands after the last move of a game: the first number that is no move."""
        return self.moves

    @cached_property
    def playable(self) -> Int[Tensor, " moves"]:
        """The square of each move token."""
        middle = self._middle()
        return torch.tensor([square for square in range(self.squares) if square not in middle])

    def _middle(self) -> tuple[int, int, int, int]:
        """Name the four squares that are taken at the start: white, black, black, white."""
        corner = (self.size // 2 - 1) * (self.size + 1)
        return corner, corner + 1, corner + self.size, corner + self.size + 1

    def start(self, count: int = 1) -> Positions:
        """`count` first positions: black on D5 and E4 of the 8 x 8 board, white on D4 and E5, black to move."""
        white, black, other_black, other_white = self._middle()
        ones = np.ones(count, dtype=np.uint64)
        return Positions(
            self,
            ones * np.uint64(1 << black | 1 << other_black),
            ones * np.uint64(1 << white | 1 << other_white),
            np.ones(count, dtype=bool),
        )

    @cached_property
    def _directions(self) -> list[tuple[int, Bits]]:
        """The steps to eight neighbours, each with the squares whose discs can be passed over that way.

        A disc in the first or last column is the end of any line along the row or a diagonal. Leaving those columns
        out also keeps a line from going on at the other side of the board.
        """
        everywhere = (1 << self.squares) - 1
        inner_row = (1 << self.size - 1) - 2
        inner = sum(inner_row << self.size * row for row in range(self.size))
        steps = [(step, inner) for step in (1, self.size - 1, self.size + 1)] + [(self.size, everywhere)]
        return [(sign * step, np.uint64(over)) for step, over in steps for sign in (1, -1)]

    def legal(self, own: Bits, other: Bits) -> Bits:
        """The squares where the player of `own` may place a disc: those that end a line over `other`."""
        legal = np.zeros_like(own)
        for step, over in self._directions:
            passable = other & over
            line = _shifted(own, step) & passable
            for _ in range(self.size - 3):
                line |= _shifted(line, step) & passable
            legal |= _shifted(line, step)
        return legal & ~(own | other) & np.uint64((1 << self.squares) - 1)

    def flips(self, own: Bits, other: Bits, disc: Bits) -> Bits:
        """The opponent's discs that turn when `own` gains the one square of `disc`."""
        flips = np.zeros_like(own)
        for step, over in self._directions:
            passable = other & over
            line = _shifted(disc, step) & passable
            for _ in range(self.size - 3):
                line |= _shifted(line, step) & passable
            flips |= np.where(_shifted(line, step) & own, line, np.uint64(0))
        return flips

    def perft(self, depth: int) -> int:
        """Count the sequences of `depth` plies from the start, where a pass is a ply and a finished game has none."""
        if depth < 1:
            raise ValueError(f"perft counts sequences of 1 ply or more, got depth {depth}")
        positions = self.start()
        for _ in range(depth - 1):
            positions = _successors(positions)
        legal = self.legal(positions.own, positions.other)
        passes = (legal == 0) & (self.legal(positions.other, positions.own) != 0)
        return int(_unpacked(legal, 64).sum()) + int(passes.sum())

    def random_games(self, count: int, seed: int) -> Int[Tensor, "count moves"]:
        """Play games in which every legal move is equally likely; return their tokens, `padding` after the end."""
        if count < 1:
            raise ValueError(f"count is {count}; 1 game or more is needed")
        draws = np.random.default_rng(seed)
        playable = self.playable.numpy()
        tokens = np.full((count, self.moves), self.padding, dtype=np.int64)
        positions = self.start(count)
        for ply in range(self.moves):
            legal = _unpacked(self.legal(positions.own, positions.other), self.squares)[:, playable]
            over = ~legal.any(axis=1)
            # The largest of independent uniform numbers; 1 - u is never 0, which stands for an illegal move.
            tokens[~over, ply] = ((1 - draws.random(legal.shape, dtype=np.float32)) * legal).argmax(axis=1)[~over]
            positions = positions.after(tokens[:, ply])
        return torch.from_numpy(tokens)

    def replay(self, tokens: Int[Tensor, "games time"]) -> Positions:
        """The position after each move, (games, time), with passes made; it stays as it is after the end.

        Raises ValueError for tokens that are no moves of this board, or an illegal move: in which game, at which place.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (games, time), got {tuple(tokens.shape)}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= self.padding:
            raise ValueError(
                f"a {self.size} x {self.size} board has moves 0 to {self.moves - 1} and padding {self.padding}; "
                f"got tokens from {int(tokens.min())} to {int(tokens.max())}"
            )
        moves = tokens.cpu().numpy()
        positions, seen = self.start(len(moves)), []
        for ply in range(moves.shape[1]):
            illegal = (moves[:, ply] != self.padding) & ~positions.allows(moves[:, ply])
            if illegal.any():
                game = int(illegal.argmax())
                raise ValueError(f"game {game}: move {ply} (token {moves[game, ply]}) is not legal there")
            positions = positions.after(moves[:, ply])
            seen.append(positions)
        stack = (np.stack([getattr(each, name) for each in seen], axis=1) for name in ("own", "other", "black"))
        return Positions(self, *stack)


@dataclass(frozen=True)
class Positions:
    """Boards with a player to move.

    Attributes:
        rules: of which board.
        own, other: discs of the player to move and of the opponent, uint64 of one shape.
        black: whether black is to move, bool of that shape.
    """

    rules: Othello
    own: Bits
    other: Bits
    black: Bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the arrays."""
        return tuple(self.own.shape)

    def __getitem__(self, index: Any) -> Positions:
        """Choose positions, as arrays are indexed (by numbers, slices, masks, arrays or tensors)."""
        parts = index if isinstance(index, tuple) else (index,)
        chosen = tuple(part.cpu().numpy() if isinstance(part, Tensor) else part for part in parts)
        return Positions(self.rules, *(np.atleast_1d(array[chosen]) for array in (self.own, self.other, self.black)))

    def legal(self) -> Bool[Tensor, "*shape moves"]:
        """Which move tokens are legal."""
        bits = _unpacked(self.rules.legal(self.own, self.other), self.rules.squares)
        return torch.from_numpy(bits)[..., self.rules.playable]

    def board(self, view: Literal["mover", "colour"] = "mover") -> Int[Tensor, "*shape squares"]:
        """A label for every square (int64): 0 empty; 1 mine, 2 yours, or by colour 1 black, 2 white.

        Mine are the discs of the player who moves next, so after a pass the labels are those of the player left to
        move, not of the one who comes next in turn.
        """
        if view not in VIEWS:
            raise ValueError(unknown("view of the board", view, VIEWS))
        first, second = self.own, self.other
        if view == "colour":
            first, second = np.where(self.black, first, second), np.where(self.black, second, first)
        squares = self.rules.squares
        labels = MINE * _unpacked(first, squares).astype(np.int64) + YOURS * _unpacked(second, squares)
        return torch.from_numpy(labels)

    def turned(self, squares: Int[Tensor, "*shape"]) -> Positions:
        """The positions with the disc on one square each turned over, the player to move as before.

        Raises ValueError where a square is empty.
        """
        disc = np.uint64(1) << squares.cpu().numpy().astype(np.uint64)
        if bool(((self.own | self.other) & disc == 0).any()):
            raise ValueError("there is no disc to turn over on one of the squares: it is empty")
        return Positions(self.rules, self.own ^ disc, self.other ^ disc, self.black)

    def allows(self, moves: Bits) -> Bits:
        """Whether each position's move token (numpy, below padding or not) is legal."""
        return self.rules.legal(self.own, self.other) & self._discs(moves) != 0

    def after(self, moves: Bits) -> Positions:
        """The positions after one legal move token each, with a pass where one follows; padding changes none."""
        disc = self._discs(moves)
        moved = disc != 0
        flips = self.rules.flips(self.own, self.other, disc)
        own = np.where(moved, self.other ^ flips, self.own)
        other = np.where(moved, self.own | flips | disc, self.other)
        return Positions(self.rules, own, other, self.black ^ moved)._passed()

    def _discs(self, moves: Bits) -> Bits:
        """The square of each move token as a set; the empty set for padding."""
        sets = np.append(np.uint64(1) << self.rules.playable.numpy().astype(np.uint64), np.uint64(0))
        return sets[moves]

    def _passed(self) -> Positions:
        """Exchange the players where the one to move has no move and the other one has."""
        stuck = self.rules.legal(self.own, self.other) == 0
        passes = stuck & (self.rules.legal(self.other, self.own) != 0)
        own, other = np.where(passes, self.other, self.own), np.where(passes, self.own, self.other)
        return Positions(self.rules, own, other, self.black ^ passes)


def _shifted(board: Bits, step: int) -> Bits:
    return board << np.uint64(step) if step > 0 else board >> np.uint64(-step)


def _unpacked(board: Bits, squares: int) -> Bits:
    """Bits as booleans, (..., squares)."""
    octets = np.ascontiguousarray(board, dtype="<u8")[..., None].view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little")[..., :squares].astype(bool)


def _successors(positions: Positions) -> Positions:
    """All positions one ply later; a pass is a ply."""
    rules, own, other, black = positions.rules, positions.own, positions.other, positions.black
    legal = rules.legal(own, other)
    passes = (legal == 0) & (rules.legal(other, own) != 0)
    found = [(other[passes], own[passes], ~black[passes])]
    for square in rules.playable.tolist():
        disc = np.uint64(1 << square)
        here = legal & disc != 0
        flips = rules.flips(own[here], other[here], disc)
        found.append((other[here] ^ flips, own[here] | flips | disc, ~black[here]))
    return Positions(rules, *(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
