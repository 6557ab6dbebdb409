"""The short convolution against its sum written out, and kept inside segments. Its causal form: tests/nn/mixers.py."""

import pytest
import torch

from paperworks.models import Block, Decoder, Encoder
from paperworks.nn import Attention, GatedMLP, Placement, RMSNorm
from paperworks.nn.convolution.short import ShortConvolution


@pytest.mark.parametrize(("kernel", "causal"), [(1, True), (3, True), (4, True), (3, False), (5, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_weighted_sum_of_neighbours_of_the_same_segment(kernel, causal, packed):
    module = ShortConvolution(kernel=kernel, causal=causal).build(6).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3], [1] * 7 + [0] * 2]) if packed else torch.ones(2, 9).long()
    placement = Placement(segments=segments if packed else None).resolve(2, 9, x.device)
    weight, bias = module.convolution.weight[:, 0], module.convolution.bias
    middle = kernel - 1 if causal else kernel // 2
    out = module(x, placement)
    for row in range(2):
        for t in range(9):
            total = bias.clone()
            for place in range(kernel):
                there = t + place - middle
                if 0 <= there < 9 and segments[row, there] == segments[row, t]:
                    total = total + weight[:, place] * x[row, there]
            if segments[row, t]:
                torch.testing.assert_close(out[row, t], total)


def test_it_stands_before_attention_in_decoders_and_encoders_as_they_are():
    first = Block(norm=RMSNorm(), mixer=ShortConvolution(kernel=3))
    second = Block(norm=RMSNorm(), mixer=Attention(heads=2), feedforward=GatedMLP(hidden=16))
    model = Decoder(vocab_size=11, dim=8, depth=2, block=(first, second), norm=RMSNorm()).build()
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 11)
    both = Block(norm=RMSNorm(), mixer=ShortConvolution(kernel=3, causal=False))
    reading = Block(norm=RMSNorm(), mixer=Attention(heads=2, causal=False))
    encoder = Encoder(vocab_size=11, dim=8, depth=2, block=(both, reading), norm=RMSNorm()).build()
    assert encoder(torch.tensor([[1, 2, 3]])).shape == (1, 3, 8)
    with pytest.raises(ValueError, match="causal=False"):
        Encoder(vocab_size=11, dim=8, depth=1, block=first, norm=RMSNorm())


@pytest.mark.parametrize(
    ("fields", "message"), [({"kernel": 0}, "at least 1"), ({"kernel": 4, "causal": False}, "odd")]
)
def test_widths_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ShortConvolution(**fields)


def test_what_sees_both_ways_has_no_cache():
    with pytest.raises(ValueError, match="cannot decode"):
        ShortConvolution(causal=False).build(4).new_cache(1, 5, torch.float32, torch.device("cpu"))
