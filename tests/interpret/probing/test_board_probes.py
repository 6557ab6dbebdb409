"""Softmax regression of a board against the conditions of its optimum, and against the probe of two classes."""

import pytest
import torch
from torch.nn import functional

from paperworks.interpret import logistic
from paperworks.interpret.probing.board_probes import BoardProbe, fit_board


def positions(n=200, dim=6, squares=4, seed=0):
    draws = torch.Generator().manual_seed(seed)
    activations = torch.randn(n, dim, generator=draws, dtype=torch.float64) @ torch.randn(
        dim, dim, generator=draws, dtype=torch.float64
    )
    planted = torch.randn(squares, 3, dim, generator=draws, dtype=torch.float64)
    noise = torch.randn(n, squares, 3, generator=draws, dtype=torch.float64)
    labels = (torch.einsum("sld,nd->nsl", planted, activations) + noise).argmax(-1)
    return activations + 5.0, labels


def test_the_fit_is_the_optimum_of_the_stated_loss():
    activations, labels = positions()
    probe = fit_board(activations, labels, penalty=0.7, tolerance=1e-9)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    scores = torch.einsum("sld,nd->nsl", weight, activations) + bias
    loss = functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
    spread = (activations - activations.mean(0)).T @ (activations - activations.mean(0)) / len(activations)
    loss = loss + 0.7 / 2 * torch.einsum("sld,de,sle->", weight, spread, weight)
    slopes = torch.autograd.grad(loss, (weight, bias))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-4  # of a sum over 200 positions
    assert torch.allclose(probe.scores(activations), scores.detach(), atol=1e-9)
    assert (probe.predict(activations) == labels).double().mean() > 0.8


def test_two_labels_give_the_logistic_probe():
    activations, labels = positions(squares=1)
    binary = (labels == 2).long()
    ours = fit_board(activations, binary, count=2, penalty=2.0, tolerance=1e-9)
    centred = activations - activations.mean(0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / len(centred))).T
    # softmax of (w, -w) is the logistic of 2 w: ||w||^2 + ||-w||^2 = ||2 w||^2 / 2, so half of the penalty is as strong
    theirs = logistic(white, binary[:, 0], penalty=1.0)
    scores = ours.scores(activations)[:, 0]
    assert torch.allclose(scores[:, 1] - scores[:, 0], theirs.score(white), atol=1e-4)
    direction = ours.directions(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))[0]
    rise = ours.scores(activations + direction)[:, 0] - scores
    assert torch.allclose(rise[:, 1] - rise[:, 0], direction.square().sum().expand(200), atol=1e-6)


def test_scores_do_not_depend_on_the_units_of_activations():
    activations, labels = positions()
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    one = fit_board(activations, labels, tolerance=1e-9).scores(activations)
    other = fit_board(1e-3 * activations @ mixing, labels, tolerance=1e-9).scores(1e-3 * activations @ mixing)
    assert torch.allclose(one, other, atol=1e-4)


def test_a_dimension_that_never_changes_is_left_out():
    activations, labels = positions()
    activations[:, 3] = 2.0
    probe = fit_board(activations, labels)
    assert torch.isfinite(probe.weight).all()
    assert probe.weight[..., 3].abs().max() < 1e-9


def test_squares_are_fitted_each_for_itself():
    activations, labels = positions()
    together = fit_board(activations, labels, tolerance=1e-8)
    alone = fit_board(activations, labels[:, 2:3], tolerance=1e-8)
    assert torch.allclose(together.weight[2], alone.weight[0], atol=1e-4)


def test_single_precision_and_a_square_that_never_changes_are_fine():
    activations, labels = positions()
    labels[:, 0] = 1
    probe = fit_board(activations.float(), labels)
    assert probe.weight.dtype == torch.float32
    assert (probe.predict(activations)[:, 0] == 1).all()
    exact = fit_board(activations, labels, tolerance=1e-8)
    assert (probe.weight - exact.weight).abs().max() < 0.02 * exact.weight.abs().max()


def test_directions_raise_one_label_over_another():
    probe = BoardProbe(torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 3))
    squares, source, target = torch.tensor([2, 0]), torch.tensor([1, 2]), torch.tensor([2, 1])
    found = probe.directions(squares, source, target)
    assert torch.equal(found[0], probe.weight[2, 2] - probe.weight[2, 1])
    x = torch.zeros(2, 5) + found
    rise = probe.scores(x)[torch.arange(2), squares]
    assert (rise[torch.arange(2), target] > rise[torch.arange(2), source]).all()


def test_turning_a_disc_reaches_the_odds_by_the_shortest_way_and_stays_there():
    activations, labels = positions()
    probe = fit_board(activations, labels)
    squares, source, target = (torch.tensor(each * 50) for each in ([0, 1, 2, 3], [0, 1, 2, 0], [1, 2, 1, 2]))
    before = probe.scores(activations)
    rows = torch.arange(200)
    odds = before[rows, squares, target] - before[rows, squares, source]
    assert torch.allclose(probe.odds(activations, squares, source, target), odds)
    turned = probe.turn(activations, squares, source, target, 1.5)
    after = probe.scores(turned)
    reached = after[rows, squares, target] - after[rows, squares, source]
    assert torch.allclose(reached, torch.full((200,), 1.5).double(), atol=1e-9)
    step = turned - activations
    shortest = (1.5 - odds).abs() / probe.directions(squares, source, target).norm(dim=1)
    assert torch.allclose(step.norm(dim=1), shortest)
    assert torch.allclose(probe.turn(turned, squares, source, target, 1.5), turned)


def test_bad_input_is_refused():
    activations, labels = positions()
    with pytest.raises(ValueError, match=r"must have shape \(n, dim\)"):
        fit_board(activations[0], labels)
    with pytest.raises(ValueError, match="need labels"):
        fit_board(activations, labels[:5])
    with pytest.raises(ValueError, match="whole numbers 0 to 1"):
        fit_board(activations, labels, count=2)
    with pytest.raises(ValueError, match="not finite"):
        fit_board(activations / 0, labels)
    with pytest.raises(ValueError, match="penalty must be above 0"):
        fit_board(activations, labels, penalty=0.0)
    with pytest.raises(ValueError, match="reads activations of 6 dimensions"):
        fit_board(activations, labels).scores(torch.zeros(3, 4))
