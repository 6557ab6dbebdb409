"""Encoder-decoders: what the decoder sees of the source and of its own past, and that they decode like any model."""

import json
from dataclasses import replace

import pytest
import torch

from paperworks.generation import Sampling, beam_search, decode, generate
from paperworks.models import Block, Decoder, Encoder, Parallel, PostNorm, PreNorm, Sandwich, Seq2Seq, count_parameters
from paperworks.models.encoder import segments_of
from paperworks.nn import (
    MLP,
    Attention,
    CrossAttention,
    LayerNorm,
    Placement,
    RelativeBuckets,
    SinusoidalPositions,
    Spec,
)


def spec(arrangement=PostNorm(), **options):
    block = Block(
        norm=LayerNorm(), arrangement=arrangement, mixer=Attention(heads=4, causal=False), feedforward=MLP(hidden=24)
    )
    other = replace(block, mixer=Attention(heads=4), cross=CrossAttention(heads=4))
    sizes = {"vocab_size": 31, "dim": 16, "depth": 2, "norm": None, "init_std": 0.3, "position": SinusoidalPositions()}
    parts = {"encoder": Encoder(block=block, **sizes), "decoder": Decoder(block=other, tied=True, **sizes)}
    return Seq2Seq(**parts | options)


def model(**options):
    torch.manual_seed(0)
    return spec(**options).build().double().eval()


def ids(*shape, seed=1):
    return torch.randint(1, 31, shape, generator=torch.Generator().manual_seed(seed))


def copy_attention(ours, theirs):
    theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
    theirs.in_proj_bias.zero_()
    theirs.out_proj.weight.copy_(ours.output.weight)
    theirs.out_proj.bias.zero_()


def copy_rest(ours, theirs, last):
    theirs.linear1.load_state_dict(ours.feedforward.up.state_dict())
    theirs.linear2.load_state_dict(ours.feedforward.down.state_dict())
    theirs.norm1.load_state_dict(ours.mixer_norm.state_dict())
    getattr(theirs, last).load_state_dict(ours.feedforward_norm.state_dict())


@pytest.mark.parity
@torch.no_grad()
def test_the_original_arrangement_is_torchs_transformer():
    parts = spec()
    relu = MLP(hidden=24, activation="relu")
    ours = replace(
        parts,
        encoder=replace(parts.encoder, block=replace(parts.encoder.block, feedforward=relu)),
        decoder=replace(parts.decoder, block=replace(parts.decoder.block, feedforward=relu)),
    )
    torch.manual_seed(0)
    net = ours.build().double().eval()
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = torch.nn.Transformer(
        16, 4, 2, 2, 24, dropout=0.0, activation="relu", batch_first=True, norm_first=False, dtype=torch.float64
    ).eval()
    theirs.encoder.norm = theirs.decoder.norm = None
    for mine, other in zip(net.encoder.blocks, theirs.encoder.layers, strict=True):
        copy_attention(mine.mixer, other.self_attn)
        copy_rest(mine, other, "norm2")
    for mine, other in zip(net.decoder.blocks, theirs.decoder.layers, strict=True):
        copy_attention(mine.mixer, other.self_attn)
        copy_attention(mine.cross, other.multihead_attn)
        copy_rest(mine, other, "norm3")
        other.norm2.load_state_dict(mine.cross_norm.state_dict())
    source, target = ids(2, 7), ids(2, 6, seed=2)
    segments = segments_of(torch.tensor([7, 4]))
    positions = SinusoidalPositions()

    def embedded(tokens):
        return net.encoder.embedding(tokens) + positions.table(torch.arange(tokens.shape[1]), 16)

    out = theirs(
        embedded(source),
        embedded(target),
        tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64),
        src_key_padding_mask=segments == 0,
        memory_key_padding_mask=segments == 0,
    )
    expected = out @ net.encoder.embedding.weight.t()
    assert (net(source, target, source_placement=Placement(segments=segments)) - expected).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("arrangement", [PreNorm(), PostNorm(), Sandwich()])
def test_a_target_token_changes_nothing_before_it_and_the_source_everything(arrangement):
    net, source, target = model(arrangement=arrangement), ids(2, 7), ids(2, 6, seed=2)
    logits = net(source, target)
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 31
    assert torch.equal(net(source, changed)[:, :3], logits[:, :3])
    assert (net(source, changed)[:, 3:] - logits[:, 3:]).abs().amax(-1).min() > 0
    source[:, -1] = (source[:, -1] + 1) % 31
    assert (net(source, target) - logits).abs().amax(-1).min() > 0


@torch.no_grad()
def test_padding_of_the_source_is_not_read():
    net, source, target = model(), ids(2, 7), ids(2, 6, seed=2)
    segments = segments_of(torch.tensor([7, 4]))
    logits = net(source, target, source_placement=Placement(segments=segments))
    other = torch.where(segments > 0, source, (source + 3) % 31)
    assert torch.equal(net(other, target, source_placement=Placement(segments=segments)), logits)
    assert (net(source[1:, :4], target[1:]) - logits[1:]).abs().max() < 1e-12


@torch.no_grad()
def test_the_decoder_decodes_in_chunks():
    net, source, target = model(), ids(2, 7), ids(2, 6, seed=2)
    whole = net(source, target)
    given = net.conditioned(source)
    cache = given.new_cache(2, 6)
    parts = [given(target[:, start:end], Placement(cache=cache)) for start, end in ((0, 1), (1, 4), (4, 6))]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    assert cache.bytes() > 0


@torch.no_grad()
def test_greedy_decoding_and_one_beam_take_the_likeliest_token():
    net, source = model(), ids(3, 7)
    start = torch.zeros(3, 1, dtype=torch.int64)
    expected = start
    for _ in range(5):
        expected = torch.cat((expected, net(source, expected)[:, -1].argmax(-1, keepdim=True)), 1)
    steps = decode(net.conditioned(source), start, max_new_tokens=5, sampling=Sampling(temperature=0.0))
    assert torch.equal(torch.stack(list(steps), 1), expected[:, 1:])
    assert torch.equal(beam_search(net.conditioned(source), start, beams=1, max_new_tokens=5), expected[:, 1:])
    assert torch.equal(generate(net.conditioned(source), start, max_new_tokens=5, temperature=0.0), expected[:, 1:])


@torch.no_grad()
def test_enough_beams_find_the_likeliest_sequence():
    net, source = model(), ids(2, 5)
    start = torch.zeros(2, 1, dtype=torch.int64)
    found = beam_search(net.conditioned(source), start, beams=31 * 31, max_new_tokens=2)
    pairs = torch.cartesian_prod(torch.arange(31), torch.arange(31))
    for row in range(2):
        targets = torch.cat((torch.zeros(len(pairs), 1, dtype=torch.int64), pairs), 1)[:, :2]
        logs = net(source[row : row + 1].expand(len(pairs), -1), targets).log_softmax(-1)
        score = logs[:, 0].gather(1, pairs[:, :1]) + logs[:, 1].gather(1, pairs[:, 1:])
        assert torch.equal(found[row], pairs[score.argmax()])


@torch.no_grad()
def test_the_transformers_length_penalty_prefers_longer_texts():
    """Wu et al. 2016: log P / ((5 + n) / 6)^alpha; the larger alpha, the longer the text that wins."""
    net, source = model(), ids(6, 5)
    start, lengths = torch.zeros(6, 1, dtype=torch.int64), []
    for alpha in (0.0, 8.0):
        options = {"beams": 4, "max_new_tokens": 8, "stop_tokens": list(range(20)), "pad": -1}
        found = beam_search(net.conditioned(source), start, length_penalty=alpha, length_offset=5.0, **options)
        lengths.append((found >= 0).sum().item())
    assert lengths[1] > lengths[0]
    with pytest.raises(ValueError, match="length_offset must be at least 0"):
        beam_search(net.conditioned(source), start, beams=2, max_new_tokens=2, length_offset=-1.0)


def test_one_table_serves_both_and_survives_a_round_trip():
    net = model()
    assert net.decoder.embedding.weight is net.encoder.embedding.weight
    assert net.decoder.unembedding.weight is net.encoder.embedding.weight
    assert count_parameters(spec()) == sum(parameter.numel() for parameter in net.parameters())
    assert count_parameters(spec(shared=False)) == count_parameters(spec()) + 31 * 16
    assert Spec.from_dict(json.loads(json.dumps(spec().to_dict()))) == spec()


def test_layers_that_share_buckets_hold_one_table():
    block = Block(norm=LayerNorm(), mixer=Attention(heads=4, position=RelativeBuckets()))
    sizes = {"vocab_size": 5, "dim": 16, "depth": 3, "norm": None}
    one = Decoder(block=block, **sizes).build()
    assert len({id(block.mixer.relative.weight) for block in one.blocks}) == 1
    apart = replace(block, mixer=replace(block.mixer, position=RelativeBuckets(shared=False)))
    assert len({id(b.mixer.relative.weight) for b in Decoder(block=apart, **sizes).build().blocks}) == 3
    fewer = replace(block, mixer=replace(block.mixer, heads=2))
    with pytest.raises(ValueError, match="must have as many heads: 4 and 2"):
        Decoder(block=(block, fewer, block), **sizes).build()


def test_parts_that_do_not_fit_say_so():
    plain = spec().decoder
    with pytest.raises(ValueError, match="reads nothing: give its Block a cross="):
        spec(decoder=replace(plain, block=replace(plain.block, cross=None)))
    with pytest.raises(ValueError, match="shared needs one table for both"):
        spec(decoder=replace(plain, vocab_size=30))
    with pytest.raises(ValueError, match=r"set CrossAttention\.context_dim=32"):
        spec(encoder=replace(spec().encoder, dim=32), shared=False)
    with pytest.raises(ValueError, match="source has 2 rows and target 3"):
        model()(ids(2, 4), ids(3, 4))
    with pytest.raises(ValueError, match="there are 2 sources and 3 rows"):
        model().conditioned(ids(2, 4))(ids(3, 1))
    with pytest.raises(ValueError, match="needs one part after the other"):
        replace(plain.block, arrangement=Parallel())
