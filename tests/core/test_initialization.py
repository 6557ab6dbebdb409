import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from paperworks.core.initialization import Context, Initialization, Part, by_the_container, initialize
from paperworks.models import Block, Decoder, T5Initialization
from paperworks.nn import GRU, MLP, Attention, GatedMLP, NoisyTopKRouter, RMSNorm
from paperworks.nn.feedforward.experts.mixture import Experts


def test_a_part_alone_is_drawn_as_in_a_model_of_one_layer():
    torch.manual_seed(0)
    block = Block(norm=RMSNorm(), mixer=Attention(heads=4, bias=True), feedforward=MLP(hidden=256)).build(64)
    assert abs(block.mixer.query.weight.std() - 0.02) < 0.001  # 4096 numbers: torch's own default would be 0.072
    assert abs(block.mixer.output.weight.std() - 0.02 / math.sqrt(2)) < 0.001
    assert block.mixer.query.bias.abs().max() == 0


@pytest.mark.parametrize("spec", [Attention(heads=2), MLP(hidden=64), GatedMLP(hidden=64)])
def test_mixers_and_feedforwards_draw_themselves(spec):
    torch.manual_seed(0)
    weights = torch.cat([weight.flatten() for weight in spec.build(32).parameters() if weight.dim() == 2])
    assert 0.015 < weights.std() < 0.022  # outputs have 0.014, all else 0.02


def test_what_a_paper_prescribes_is_drawn_inside_and_outside_a_model():
    torch.manual_seed(0)
    alone = GRU().build(16)
    inside = Decoder(vocab_size=5, dim=16, depth=1, block=Block(norm=RMSNorm(), mixer=GRU()), norm=None).build()
    bound = 16**-0.5
    for module in (alone, inside.blocks[0].mixer):
        assert 0.9 * bound < module.input.weight.abs().max() <= bound  # uniform, as torch.nn.GRU draws
    routed = Experts(expert=MLP(hidden=8), count=4, top=2, router=NoisyTopKRouter()).build(8)
    assert routed.router.logits.weight.abs().max() == 0  # Shazeer et al. 2017: equal loads at first


def test_a_container_draws_once_and_knows_the_depth():
    drawn = []

    class Noted(nn.Module):
        def initialize(self, context: Context) -> None:
            drawn.append((context.layer, context.depth))

    @dataclass(frozen=True, kw_only=True)
    class NotedPart(Part):
        def build(self, dim: int) -> nn.Module:
            return Noted()

    with by_the_container():
        layers = nn.ModuleList([NotedPart().build(4) for _ in range(3)])
    assert drawn == []
    initialize(layers, Initialization(), layers)
    assert drawn == [(0, 3), (1, 3), (2, 3)]
    NotedPart().build(4)
    assert drawn[3:] == [(0, 1)]


def test_nothing_is_drawn_on_the_meta_device():
    block = Block(norm=RMSNorm(), mixer=Attention(heads=4), feedforward=GatedMLP(hidden=8))
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        block.build(16)
        Decoder(vocab_size=5, dim=16, depth=2, block=block, norm=None).build()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_t5_draws_by_the_inputs_and_scales_its_queries():
    torch.manual_seed(0)
    attention = Attention(heads=4, head_dim=16, scale=1.0)
    block = Block(norm=RMSNorm(), mixer=attention, feedforward=MLP(hidden=512))
    model = Decoder(vocab_size=5, dim=64, depth=1, block=block, norm=None, init=T5Initialization()).build()
    assert abs(model.blocks[0].feedforward.up.weight.std() * 8 - 1) < 0.03  # 64^-0.5; 32,768 numbers
    assert abs(model.blocks[0].mixer.key.weight.std() * 8 - 1) < 0.05
    assert abs(model.blocks[0].mixer.query.weight.std() * 8 * 4 - 1) < 0.05  # / sqrt(16) more


def test_a_deviation_that_is_no_number_is_refused():
    block = Block(norm=RMSNorm(), mixer=Attention(heads=1))
    with pytest.raises(ValueError, match="init_std must be a finite number"):
        Decoder(vocab_size=5, dim=4, depth=1, block=block, norm=None, init_std=math.nan)
