"""The summary of fixed size: which state it is, that every step gets it, and that it decodes like cross-attention."""

import pytest
import torch

from paperworks.generation import beam_search
from paperworks.models import Block, Decoder, Encoder, NoResidual, Seq2Seq
from paperworks.nn import GRU, CrossAttention, Placement
from paperworks.nn.identity_norm import NoNorm
from paperworks.nn.recurrent.fixed_context import FixedContext


def module(dim=6, **options):
    torch.manual_seed(0)
    return FixedContext(**options).build(dim).double()


def vectors(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def placement(batch, time, **options):
    return Placement(**options).resolve(batch, time, torch.device("cpu"))


@torch.no_grad()
def test_every_token_is_told_of_the_last_state_that_is_no_padding():
    built, x, context = module(context_dim=4), vectors(3, 5, 6), vectors(3, 7, 4, seed=2)
    real = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0, 0, 1, 1, 0, 0, 0]])
    told = built(x, placement(3, 5, context=context, context_segments=real))
    for row, last in enumerate((6, 2, 3)):
        expected = built.summary.weight @ context[row, last]
        assert (told[row] - expected).abs().max() < 1e-14
    whole = built(x, placement(3, 5, context=context))
    assert (whole - context[:, -1:] @ built.summary.weight.T).abs().max() < 1e-14


@torch.no_grad()
def test_packed_rows_read_their_own_segment():
    built, x, context = module(), vectors(1, 6, 6), vectors(1, 7, 6, seed=2)
    mine, others = torch.tensor([[1, 1, 2, 2, 3, 0]]), torch.tensor([[1, 1, 1, 2, 2, 0, 0]])
    told = built(x, placement(1, 6, segments=mine, context=context, context_segments=others))
    expected = context[:, [2, 2, 4, 4]] @ built.summary.weight.T
    assert (told[:, :4] - expected).abs().max() < 1e-14
    assert not told[:, 4].any()  # nothing was read for segment 3
    assert torch.isfinite(told).all()


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_the_context_is_read_once_and_rows_can_be_reordered(packed):
    built, x, context = module(), vectors(2, 6, 6), vectors(2, 7, 6, seed=2)
    mine = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2]])
    both = {"context": context}
    if packed:
        both["context_segments"] = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 0, 0]])
    whole = built(x, placement(2, 6, segments=mine if packed else None, **both))
    cache = built.new_cache(2, 6, torch.float64, torch.device("cpu"))
    assert cache.bytes() == 0
    first = built(x[:, :2], placement(2, 2, segments=mine[:, :2] if packed else None, **both).at(cache))
    rest = built(x[:, 2:], placement(2, 4, segments=mine[:, 2:] if packed else None).at(cache))
    assert torch.equal(torch.cat((first, rest), 1), whole)
    assert cache.bytes() == 2 * (7 if packed else 1) * 6 * 8
    rows = torch.tensor([1, 1, 0])
    cache.reorder(rows)
    again = built(x[rows, 2:], placement(3, 4, segments=mine[rows, 2:] if packed else None).at(cache))
    assert torch.equal(again, whole[rows, 2:])


def translator(cross):
    reading = Block(norm=NoNorm(), arrangement=NoResidual(), mixer=GRU())
    writing = Block(norm=NoNorm(), mixer=GRU(), cross=cross)
    sizes = {"vocab_size": 9, "dim": 8, "norm": None, "init_std": 0.4}
    decoder = Decoder(depth=2, block=(writing, reading), **sizes)
    spec = Seq2Seq(encoder=Encoder(depth=1, block=reading, **sizes), decoder=decoder)
    torch.manual_seed(0)
    return spec.build().double().eval()


@torch.no_grad()
def test_it_stands_where_cross_attention_stands_and_decodes_with_beams():
    for cross in (FixedContext(), CrossAttention(heads=2)):
        net = translator(cross)
        source, start = torch.randint(1, 9, (3, 5)), torch.zeros(3, 1, dtype=torch.int64)
        expected = start
        for _ in range(4):
            expected = torch.cat((expected, net(source, expected)[:, -1].argmax(-1, keepdim=True)), 1)
        assert torch.equal(beam_search(net.conditioned(source), start, beams=1, max_new_tokens=4), expected[:, 1:])
        assert beam_search(net.conditioned(source), start, beams=3, max_new_tokens=4).shape == (3, 4)


@torch.no_grad()
def test_only_the_last_state_of_the_source_counts_and_it_counts_at_every_step():
    """Two sources whose last states are equal are one and the same to the decoder; to attention they are two."""
    net, target = translator(FixedContext()), torch.randint(1, 9, (2, 6))
    states = vectors(2, 5, 8, seed=3)
    other = states.clone()
    other[:, :-1] += 1.0
    assert torch.equal(net.decoder(target, Placement(context=states)), net.decoder(target, Placement(context=other)))
    other[:, -1] += 1.0
    assert (net.decoder(target, Placement(context=states)) - net.decoder(target, Placement(context=other))).abs().amax(
        -1
    ).min() > 0
    attending = translator(CrossAttention(heads=2))
    other[:, -1] = states[:, -1]
    assert (
        attending.decoder(target, Placement(context=states)) - attending.decoder(target, Placement(context=other))
    ).abs().min() > 0


def test_gradients_are_the_derivatives():
    built, x = module(), vectors(2, 3, 6)
    real = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def told(context):
        return built(x, placement(2, 3, context=context, context_segments=real))

    torch.autograd.gradcheck(told, (vectors(2, 3, 6).requires_grad_(),))


def test_what_cannot_be_read_is_refused():
    built, x = module(), vectors(2, 5, 6)
    with pytest.raises(ValueError, match="FixedContext has nothing to read: pass context="):
        built(x, placement(2, 5))
    with pytest.raises(ValueError, match=r"context must have shape \(2, other time of at least 1, 6\), got \(2, 7, 4"):
        built(x, placement(2, 5, context=vectors(2, 7, 4)))
    with pytest.raises(ValueError, match="row 1 of the context is all padding"):
        built(x, placement(2, 5, context=vectors(2, 2, 6), context_segments=torch.tensor([[1, 1], [0, 0]])))
    with pytest.raises(ValueError, match=r"FixedContext\.context_dim must be at least 1, got 0"):
        FixedContext(context_dim=0)
