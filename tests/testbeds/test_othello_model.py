"""The split of games, the loss and the count of errors of the Othello papers."""

import pytest
import torch
from torch.nn import functional

from paperworks.lab import Lab
from paperworks.papers.probing.othello_gpt import errors
from paperworks.testbeds import othello_model as model
from paperworks.testbeds.othello import EMPTY, Othello


def test_no_opening_is_in_two_parts_and_nothing_before_its_end_is_read():
    lab = Lab("smoke")
    openings = {
        part: {tuple(game[: model.OPENING]) for game in model.draw_games(lab, part, 400, seed).tolist()}
        for seed, part in enumerate(model.PARTS)
    }
    assert all(len(found) > 20 for found in openings.values())
    assert not openings["model"] & openings["probe"]
    assert not openings["model"] & openings["judge"]
    assert not openings["probe"] & openings["judge"]
    games = model.draw_games(lab, "judge", 30, seed=9)
    seen = model.read(model.untrained(lab), Othello(4), games)
    assert int(seen.ply.min()) == model.OPENING - 1
    assert (games[seen.row, seen.ply + 1] != 12).all()


def test_what_is_read_belongs_to_the_same_game_and_move():
    lab = Lab("smoke")
    net, games = model.untrained(lab), model.draw_games(Lab("smoke"), "judge", 10, seed=1)
    seen = model.read(net, Othello(4), games)
    pick = 17
    row, ply = int(seen.row[pick]), int(seen.ply[pick])
    alone = model.read(net, Othello(4), games[row : row + 1])
    place = int((alone.ply == ply).nonzero())
    assert torch.allclose(seen.states[1][pick], alone.states[1][place], atol=1e-6)
    assert torch.equal(seen.positions.board()[pick], alone.positions.board()[place])
    with torch.no_grad():
        assert torch.allclose(seen.logits[pick], net(games[row : row + 1, : ply + 1])[0, -1, :12], atol=1e-5)


def test_the_expected_loss_is_the_mean_over_the_moves_that_could_follow():
    lab, board = Lab("smoke"), Othello(4)
    net, games = model.untrained(lab), model.draw_games(Lab("smoke"), "model", 6, seed=1)
    legal = board.replay(games[:, :-1]).legal()
    total, count = model.expected_loss(net, (games[:, :-1], legal / legal.sum(-1, keepdim=True).clamp_min(1)))
    with torch.no_grad():
        logits, plain, positions = net(games[:, :-1]), 0.0, 0
    for game in range(6):
        for ply in range(games.shape[1] - 1):
            moves = legal[game, ply].nonzero().flatten()
            if len(moves):
                plain += float(functional.cross_entropy(logits[game, ply].expand(len(moves), -1), moves))
                positions += 1
    assert float(count) == pytest.approx(positions)
    assert total.item() == pytest.approx(plain, rel=1e-5)


def test_errors_count_moves_wrongly_in_and_out():
    legal = torch.tensor([[True, True, False, False], [False, False, True, False]])
    assert errors(torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.5]]), legal) == 0.0
    assert errors(torch.tensor([[2.0, 0.0, 1.0, 0.5], [1.0, 0.0, 0.5, 0.0]]), legal) == 2.0


def test_properties_are_mine_and_yours_without_blanks():
    positions = Othello(4).replay(Othello(4).random_games(5, seed=0))[:, 3]
    found, board = model.properties(positions), positions.board()
    assert found.shape == (5, 32)
    assert torch.equal(found.sum(1), (board != EMPTY).sum(1))
    assert torch.equal(found[:, :16], board == 1)
