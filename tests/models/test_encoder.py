"""Encoders look both ways, and padding, packing and pooling leave them what they are."""

import json

import pytest
import torch

from paperworks.models import Block, Encoder, PostNorm, count_parameters
from paperworks.models.encoder import MaskedLMHead, Pooler, pool, segments_of
from paperworks.nn import MLP, Attention, LayerNorm, LearnedPositions, Placement, Spec


def spec(**options):
    block = Block(
        norm=LayerNorm(),
        arrangement=PostNorm(),
        mixer=Attention(heads=4, causal=False, bias=True),
        feedforward=MLP(hidden=24),
    )
    return Encoder(
        **{
            "vocab_size": 31,
            "dim": 16,
            "depth": 2,
            "block": block,
            "norm": None,
            "embedding_norm": LayerNorm(),
            "position": LearnedPositions(length=20),
            "context": 20,
            "token_types": 2,
            "init_std": 0.3,
        }
        | options
    )


def model(**options):
    torch.manual_seed(0)
    return spec(**options).build().double().eval()


def ids(*shape):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_token_sees_those_after_it():
    encoder, tokens = model(), ids(1, 9)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 31
    moved = (encoder(tokens) - encoder(changed)).abs().amax(-1)[0]
    assert (moved > 0).all()


@torch.no_grad()
def test_the_content_of_padding_changes_no_bit_and_its_length_next_to_none():
    encoder, tokens = model(), ids(2, 9)
    segments = segments_of(torch.tensor([9, 5]))
    other = torch.where(segments > 0, tokens, (tokens + 3) % 31)
    assert torch.equal(
        encoder(tokens, Placement(segments=segments))[segments > 0],
        encoder(other, Placement(segments=segments))[segments > 0],
    )
    alone = encoder(tokens[1:, :5])
    assert (encoder(tokens, Placement(segments=segments))[1:, :5] - alone).abs().max() < 1e-12


@torch.no_grad()
def test_packed_sentences_do_not_see_each_other():
    encoder, one, other = model(), ids(1, 4), ids(1, 6)
    segments = torch.tensor([[1] * 4 + [2] * 6])
    packed = encoder(torch.cat((one, other), 1), Placement(segments=segments))
    assert (packed - torch.cat((encoder(one), encoder(other)), 1)).abs().max() < 1e-12


@torch.no_grad()
def test_token_types_are_vectors_of_their_own():
    encoder, tokens = model(), ids(1, 6)
    kinds = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.equal(encoder(tokens), encoder(tokens, token_types=torch.zeros_like(tokens)))
    assert (encoder(tokens, token_types=kinds) - encoder(tokens)).abs().max() > 0.1
    with pytest.raises(ValueError, match="token type 2 is outside the 2 there are"):
        encoder(tokens, token_types=kinds * 2)
    with pytest.raises(ValueError, match="knows no token types"):
        model(token_types=0)(tokens, token_types=kinds)
    with pytest.raises(ValueError, match="must have the tokens' shape"):
        encoder(tokens, token_types=kinds[:, :3])


def test_pooling_reads_real_tokens_only():
    hidden = torch.arange(8.0).view(2, 4, 1)
    segments = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    found = {by: pool(hidden, segments, by).flatten().tolist() for by in ("first", "last", "mean", "max")}
    assert found == {"first": [0, 5], "last": [1, 7], "mean": [0.5, 6], "max": [1, 7]}
    assert pool(hidden).flatten().tolist() == [1.5, 5.5]
    with pytest.raises(ValueError, match="row 0 is all padding"):
        pool(hidden, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="unknown pooling 'cls'"):
        pool(hidden, by="cls")


def test_heads_have_the_shapes_they_promise_and_share_the_embedding():
    encoder = model()
    hidden = encoder(ids(2, 5))
    head = MaskedLMHead(encoder, LayerNorm()).double()
    assert head(hidden).shape == (2, 5, 31)
    assert head(hidden[0, :2]).shape == (2, 31)
    assert head.unembedding.weight is encoder.embedding.weight
    assert Pooler(16).double()(hidden).shape == (2, 16)


def test_an_encoder_is_a_value():
    assert Spec.from_dict(json.loads(json.dumps(spec().to_dict()))) == spec()
    assert count_parameters(spec()) == sum(parameter.numel() for parameter in model().parameters())
    with pytest.raises(ValueError, match="give its Attention causal=False"):
        spec(block=Block(norm=LayerNorm(), mixer=Attention(heads=4)))
    with pytest.raises(ValueError, match=r"Encoder\.depth must be at least 1, got 0"):
        spec(depth=0)
    with pytest.raises(ValueError, match="exceeds the 20 learned positions"):
        spec(context=21)
    with pytest.raises(ValueError, match="21 tokens exceed the context of 20"):
        model()(ids(1, 21))
