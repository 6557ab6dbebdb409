"""Sinusoidal and learned positions against their equations."""

import math

import pytest
import torch

from paperworks.nn import LearnedPositions, Placement, SinusoidalPositions

CPU = torch.device("cpu")


def test_sinusoids_are_the_papers():
    table = SinusoidalPositions().table(torch.arange(50), 8)
    halves = SinusoidalPositions(layout="halves").table(torch.arange(50), 8)
    for place in (0, 1, 7, 49):
        for i in range(4):
            angle = place / 10_000 ** (2 * i / 8)
            assert table[place, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[place, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)
            assert halves[place, i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert halves[place, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_they_are_added_where_the_stream_says():
    x, positions = torch.zeros(2, 3, 8), torch.tensor([[0, 1, 2], [40, 7, 7]])
    for spec in (SinusoidalPositions(), LearnedPositions(length=50)):
        module = spec.build(8)
        if isinstance(spec, SinusoidalPositions):
            rows = spec.table(torch.arange(50), 8).float()
        else:
            torch.nn.init.normal_(module.weight)
            rows = module.weight
        assert torch.equal(module(x, Placement(positions=positions).resolve(2, 3, CPU)), rows[positions])
        assert torch.equal(module(x, Placement().resolve(2, 3, CPU)), rows[:3].expand(2, 3, 8))


def test_what_cannot_be_placed_is_refused():
    with pytest.raises(ValueError, match="even dim"):
        SinusoidalPositions().build(7)
    learned = LearnedPositions(length=2).build(8)
    with pytest.raises(ValueError, match="position 2 is beyond the 2 learned positions"):
        learned(torch.zeros(1, 3, 8), Placement().resolve(1, 3, CPU))
