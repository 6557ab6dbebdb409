"""Othello against plain Python on lists of squares, against the published counts, and on boards set up by hand."""

import numpy as np
import pytest
import torch

from paperworks.testbeds.othello import EMPTY, MINE, YOURS, Othello, Positions

AROUND = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]


class Plain:
    """One game on a dictionary of squares, straight from the rules."""

    def __init__(self, size):
        self.size, low = size, size // 2 - 1
        self.discs = {(low, low): "white", (low + 1, low + 1): "white"}
        self.discs |= {(low, low + 1): "black", (low + 1, low): "black"}
        self.turn = "black"

    def flips(self, square, player):
        found = []
        for step in AROUND:
            line, place = [], (square[0] + step[0], square[1] + step[1])
            while self.discs.get(place, player) != player:
                line.append(place)
                place = (place[0] + step[0], place[1] + step[1])
            if self.discs.get(place) == player:
                found += line
        return found

    def legal(self, player=None):
        player = player or self.turn
        squares = [(row, column) for row in range(self.size) for column in range(self.size)]
        return [square for square in squares if square not in self.discs and self.flips(square, player)]

    def play(self, square):
        for flipped in [*self.flips(square, self.turn), square]:
            self.discs[flipped] = self.turn
        other = "white" if self.turn == "black" else "black"
        if self.legal(other) or not self.legal():
            self.turn = other

    def labels(self, one):
        board = torch.zeros(self.size, self.size, dtype=torch.int64)
        for square, colour in self.discs.items():
            board[square] = 1 if colour == one else 2
        return board.flatten()


def bits(*squares):
    return np.array([sum(1 << square for square in squares)], dtype=np.uint64)


@pytest.mark.parametrize(("depth", "count"), list(enumerate([4, 12, 56, 244, 1396, 8200, 55092, 390216], start=1)))
def test_perft_of_the_usual_board_is_the_published_one(depth, count):
    assert Othello(8).perft(depth) == count


@pytest.mark.parametrize("size", [4, 6])
def test_perft_counts_what_plain_python_counts(size):
    def sequences(game, depth):
        if depth == 0:
            return 1
        total = 0
        for square in game.legal():
            after = Plain(size)
            after.discs, after.turn = dict(game.discs), game.turn
            for flipped in [*after.flips(square, after.turn), square]:
                after.discs[flipped] = after.turn
            after.turn = "white" if after.turn == "black" else "black"
            total += sequences(after, depth - 1)
        if not game.legal() and game.legal("white" if game.turn == "black" else "black"):
            after = Plain(size)
            after.discs, after.turn = dict(game.discs), "white" if game.turn == "black" else "black"
            total += sequences(after, depth - 1)
        return total

    for depth in range(1, 7):  # on 4 x 4 the first pass comes at the fifth ply or later
        assert Othello(size).perft(depth) == sequences(Plain(size), depth)


@pytest.mark.parametrize("size", [4, 6, 8])
def test_replayed_games_agree_with_plain_python_square_by_square(size):
    rules = Othello(size)
    games = rules.random_games({4: 60, 6: 25, 8: 8}[size], seed=3)
    positions = rules.replay(games)
    mover, colour, legal = positions.board(), positions.board("colour"), positions.legal()
    passes = 0
    for number, game in enumerate(games.tolist()):
        plain, before = Plain(size), "white"
        for ply, token in enumerate(game):
            if token == rules.padding:
                assert not plain.legal("black")
                assert not plain.legal("white")
                break
            passes += plain.turn == before
            before = plain.turn
            plain.play(divmod(int(rules.playable[token]), size))
            assert bool(positions.black[number, ply]) == (plain.turn == "black")
            assert torch.equal(mover[number, ply], plain.labels(plain.turn))
            assert torch.equal(colour[number, ply], plain.labels("black"))
            tokens = [rules.playable.tolist().index(row * size + column) for row, column in plain.legal()]
            assert legal[number, ply].nonzero().flatten().tolist() == tokens
    assert passes > 0  # or passes were not tested


def test_labels_follow_the_player_who_is_left_to_move_after_a_pass():
    # Black 0, white 1 and 4 on the top rows of 4 x 4: black takes 2 and white, walled in, has no move; black has 8.
    rules = Othello(4)
    before = Positions(rules, bits(0), bits(1, 4), np.array([True]))
    token = rules.playable.tolist().index(2)
    after = before.after(np.array([token]))
    assert after.black.tolist() == [True]  # white passed
    assert after.board()[0].tolist() == [MINE, MINE, MINE, EMPTY, YOURS] + [EMPTY] * 11
    assert torch.equal(after.board(), after.board("colour"))
    assert rules.playable[after.legal()[0]].tolist() == [8]
    # Without the pass, the same board belongs to white, and mine and yours are exchanged.
    unpassed = Positions(rules, after.other, after.own, ~after.black)
    assert unpassed.board()[0, :5].tolist() == [YOURS, YOURS, YOURS, EMPTY, MINE]
    assert torch.equal(unpassed.board("colour"), after.board("colour"))


@pytest.mark.parametrize(("size", "moves"), [(4, 12), (6, 32), (8, 60)])
def test_playable_squares_are_all_but_the_middle(size, moves):
    rules = Othello(size)
    start = rules.start().board("colour")[0]
    assert rules.moves == moves == len(rules.playable)
    assert (start[rules.playable] == EMPTY).all()
    assert (start != EMPTY).sum() == 4
    assert start.view(size, size)[size // 2 - 1, size // 2 - 1] == 2  # white


def test_lines_do_not_go_on_at_the_other_edge():
    rules = Othello(6)
    # Own disc at the end of row 0, the opponent's at the start of row 1 and 2: no line joins them.
    legal = rules.legal(bits(5), bits(6, 12))
    assert int(legal[0]) == 0
    assert int(rules.flips(bits(5), bits(6, 7, 11), bits(8))[0]) == 0


def test_games_end_early_only_when_nobody_can_move_and_are_one_a_seed():
    rules = Othello(4)
    games = rules.random_games(500, seed=1)
    assert torch.equal(games, rules.random_games(500, seed=1))
    assert not torch.equal(games, rules.random_games(500, seed=2))
    ended = games == rules.padding
    assert ended.any()
    assert not (ended[:, :-1] & ~ended[:, 1:]).any()
    last = rules.replay(games)[:, -1]
    assert not last.legal().any()
    played = games.sort(dim=1).values
    assert not ((played[:, 1:] == played[:, :-1]) & (played[:, 1:] != rules.padding)).any()


def test_every_legal_move_is_equally_likely():
    games = Othello(6).random_games(8000, seed=0)
    first = games[:, 0].bincount(minlength=32)
    assert (first > 0).sum() == 4
    assert (first[first > 0] - 2000).abs().max() < 160  # four standard deviations of a binomial of 8000 and 1/4


def test_turning_a_disc_changes_that_square_alone():
    rules = Othello(6)
    positions = rules.replay(rules.random_games(40, seed=5))[:, 12]
    board = positions.board()
    square = (board != EMPTY).long().argmax(1)
    turned = positions.turned(square)
    rows = torch.arange(40)
    assert torch.equal(turned.board()[rows, square], 3 - board[rows, square])
    assert int((turned.board() != board).sum()) == 40
    assert (turned.black == positions.black).all()
    with pytest.raises(ValueError, match="it is empty"):
        positions.turned((board == EMPTY).long().argmax(1))


def test_positions_are_indexed_like_arrays():
    rules = Othello(4)
    positions = rules.replay(rules.random_games(6, seed=0))
    assert positions.shape == (6, 12)
    chosen = positions[torch.tensor([1, 4]), torch.tensor([3, 0])]
    assert chosen.shape == (2,)
    assert torch.equal(chosen.board()[0], positions.board()[1, 3])
    assert positions[2, 5].shape == (1,)
    assert positions[positions.black].black.all()


def test_bad_input_is_refused():
    rules = Othello(4)
    with pytest.raises(ValueError, match="4, 6 or 8 squares wide"):
        Othello(10)
    with pytest.raises(ValueError, match="1 game or more"):
        rules.random_games(0, seed=0)
    with pytest.raises(ValueError, match="1 ply or more"):
        rules.perft(0)
    with pytest.raises(ValueError, match=r"shape \(games, time\)"):
        rules.replay(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="moves 0 to 11 and padding 12; got tokens from 0 to 13"):
        rules.replay(torch.tensor([[0, 13]]))
    games = rules.random_games(2, seed=0)
    games[1, 1] = games[1, 0]
    with pytest.raises(ValueError, match=r"game 1: move 1 \(token \d+\) is not legal there"):
        rules.replay(games)
    with pytest.raises(ValueError, match="unknown view of the board 'color'"):
        rules.start().board("color")
