"""Positions inside scores, against their equations written out and against other implementations."""

import copy
import math

import pytest
import torch
from torch import nn

from paperworks.models import Block, Decoder
from paperworks.nn import ALiBi, Attention, LayerNorm, Placement, RelativeBuckets, RelativeVectors
from paperworks.nn.position.relative import RelativePosition, alibi_slopes, bucket

TIME, DIM, HEADS = 11, 16, 4


def distances(time):
    at = torch.arange(time)
    return at - at[:, None]


def module(position, causal=True, dim=DIM, heads=HEADS):
    torch.manual_seed(0)
    built = Attention(heads=heads, position=position, causal=causal).build(dim).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built


def run(attention, x):
    return attention(x, Placement().resolve(*x.shape[:2], x.device))


def vectors(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ALiBi


def test_slopes_of_eight_heads_are_the_papers():
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]


def test_slopes_of_twelve_heads_are_those_of_eight_and_every_second_of_sixteen():
    assert alibi_slopes(12)[:8].tolist() == [2.0**-k for k in range(1, 9)]
    assert alibi_slopes(12)[8:].tolist() == pytest.approx([2.0**-k for k in (0.5, 1.5, 2.5, 3.5)], rel=1e-7)


@pytest.mark.parity
@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 32])
def test_alibi_is_blooms_tensor_up_to_a_shift_of_each_row(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(2, TIME), heads, torch.float32).view(2, heads, 1, TIME)
    ours = ALiBi().build(heads, 4).scores(torch.zeros(1, heads, TIME, 4), distances(TIME))
    earlier = distances(TIME) <= 0
    shift = (ours - theirs) - (ours - theirs)[..., :1]  # of each row, against its first key
    assert shift.masked_fill(~earlier, 0).abs().max() < 1e-6
    assert torch.allclose(ours[0, :, 0, 0], torch.zeros(heads))


@pytest.mark.parity
@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_is_mpts_tensor_up_to_a_shift_of_each_row(heads):
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    theirs = build_mpt_alibi_tensor(heads, TIME).view(heads, 1, TIME)  # -slope * (last - key)
    ours = ALiBi().build(heads, 4).scores(torch.zeros(1, heads, TIME, 4), distances(TIME))
    assert (ours[0, :, -1:] - theirs).abs().max() < 1e-6


def test_alibi_looks_both_ways_without_a_mask():
    scores = ALiBi().build(8, 4).scores(vectors(1, 8, TIME, 4), distances(TIME))
    assert torch.equal(scores, -(alibi_slopes(8).double()[:, None, None] * distances(TIME).abs())[None])


def test_alibi_has_nothing_to_train_or_save():
    built = ALiBi().build(8, 4)
    assert list(built.parameters()) == []
    assert built.state_dict() == {}


def test_alibi_keeps_its_slopes_in_half_precision():
    """2^-8 * 4095 is exact in float32 and rounded once."""
    scores = ALiBi().build(8, 4).scores(torch.zeros(1, 8, 1, 4, dtype=torch.bfloat16), torch.tensor([[-4095]]))
    assert scores.dtype == torch.bfloat16
    assert scores[0, -1, 0, 0] == torch.tensor(-4095 / 256).bfloat16()


# T5's buckets


@pytest.mark.parity
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (16, 1000)])
def test_buckets_are_t5s(bidirectional, buckets, longest):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-400, 401)
    theirs = T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=longest
    )
    assert torch.equal(bucket(distance, buckets, longest, bidirectional=bidirectional), theirs)


def test_near_distances_have_a_bucket_each_and_far_ones_share_the_last():
    found = bucket(-torch.arange(300), bidirectional=False)
    assert found[:16].tolist() == list(range(16))
    assert set(found[128:].tolist()) == {31}
    assert bucket(torch.arange(1, 300), bidirectional=False).unique().tolist() == [0]  # later keys: hidden anyway


def test_a_bucket_table_adds_its_rows_with_gradients():
    built = RelativeBuckets(buckets=8, max_distance=12, bidirectional=True).build(HEADS, 4).double()
    nn.init.normal_(built.weight)
    scores = built.scores(vectors(1, HEADS, TIME, 4), distances(TIME))
    rows = bucket(distances(TIME), 8, 12)
    for q in range(TIME):
        for k in range(TIME):
            assert torch.equal(scores[0, :, q, k], built.weight[rows[q, k]])
    scores.sum().backward()
    assert torch.equal(built.weight.grad[:, 0], torch.bincount(rows.flatten(), minlength=8).double())


def test_layers_share_one_table_unless_told_otherwise():
    def count(shared):
        block = Block(norm=LayerNorm(), mixer=Attention(heads=HEADS, position=RelativeBuckets(shared=shared)))
        model = Decoder(vocab_size=5, dim=DIM, depth=3, block=block, norm=None).build()
        return sum(p.numel() for name, p in model.named_parameters() if "relative" in name)

    assert (count(True), count(False)) == (32 * HEADS, 3 * 32 * HEADS)


# Shaw's vectors


def gathered(attention, x, causal):
    """Equations 3 and 4 of the paper: the vectors of every pair of tokens, (query, key, channel), in full."""
    relative, size = attention.relative, DIM // HEADS
    time = x.shape[1]
    rows = torch.tensor(
        [[max(-relative.reach, min(relative.reach, j - i)) + relative.reach for j in range(time)] for i in range(time)]
    )
    q, k, v = (
        getattr(attention, name)(x).unflatten(-1, (HEADS, size)).transpose(1, 2) for name in ("query", "key", "value")
    )
    keys = k[:, :, None] + (0 if relative.key is None else relative.key[rows])  # batch, heads, query, key, channel
    values = v[:, :, None] + (0 if relative.value is None else relative.value[rows])
    scores = (q[:, :, :, None] * keys).sum(-1) / math.sqrt(size)
    if causal:
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
    heads = (scores.softmax(-1)[..., None] * values).sum(3)
    return attention.output(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "position",
    [
        RelativeVectors(reach=3),
        RelativeVectors(reach=3, values=False),
        RelativeVectors(reach=2, keys=False),
        RelativeVectors(reach=0),
        RelativeVectors(reach=40),
    ],
)
def test_vectors_equal_the_plain_gather_with_gradients(position, causal):
    attention, x = module(position, causal), vectors(2, TIME, DIM).requires_grad_()
    weights = [x, *attention.parameters()]
    ours, plain = run(attention, x), gathered(attention, x, causal)
    assert (ours - plain).abs().max() < 1e-12
    probe = vectors(*ours.shape)
    slopes = torch.autograd.grad((ours * probe).sum(), weights)
    expected = torch.autograd.grad((plain * probe).sum(), weights)
    for slope, wanted in zip(slopes, expected, strict=True):
        assert (slope - wanted).abs().max() < 1e-10


@pytest.mark.parity
def test_the_keys_term_equals_wav2vec2_berts():
    from transformers import Wav2Vec2BertConfig
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

    reach = 3
    config = Wav2Vec2BertConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=reach,
        right_max_position_embeddings=reach,
        attention_dropout=0.0,
    )
    theirs = Wav2Vec2BertSelfAttention(config).double().eval()
    ours = (
        Attention(heads=HEADS, causal=False, bias=True, position=RelativeVectors(reach=reach, values=False))
        .build(DIM)
        .double()
    )
    with torch.no_grad():
        pairs = {"query": "linear_q", "key": "linear_k", "value": "linear_v", "output": "linear_out"}
        for name, other in pairs.items():
            getattr(ours, name).load_state_dict(getattr(theirs, other).state_dict())
        ours.relative.key.copy_(theirs.distance_embedding.weight)
        x = vectors(2, TIME, DIM)
        assert (run(ours, x) - theirs(x)[0]).abs().max() < 1e-12


def test_a_layer_gets_two_tables_shared_by_its_heads():
    def extra(**options):
        plain = Attention(heads=HEADS).build(DIM)
        with_vectors = Attention(heads=HEADS, position=RelativeVectors(reach=5, **options)).build(DIM)
        count = [sum(p.numel() for p in each.parameters()) for each in (plain, with_vectors)]
        return count[1] - count[0]

    size = DIM // HEADS
    assert extra() == 2 * (2 * 5 + 1) * size
    assert extra(keys=False) == extra(values=False) == (2 * 5 + 1) * size


def test_layers_have_tables_of_their_own():
    block = Block(norm=LayerNorm(), mixer=Attention(heads=HEADS, position=RelativeVectors(reach=5)))
    model = Decoder(vocab_size=5, dim=DIM, depth=3, block=block, norm=None).build()
    count = sum(p.numel() for name, p in model.named_parameters() if "relative" in name)
    assert count == 3 * 2 * 11 * DIM // HEADS


@pytest.mark.parametrize(
    "position", [ALiBi(), RelativeBuckets(buckets=8, max_distance=12, bidirectional=True), RelativeVectors(reach=2)]
)
def test_only_distances_count(position):
    attention, x = module(position), vectors(1, TIME, DIM)
    placement = Placement(positions=torch.arange(TIME)[None] + 100).resolve(1, TIME, x.device)
    assert torch.equal(attention(x, placement), run(attention, x))
    segments = torch.tensor([[1] * 4 + [2] * TIME])
    packed = torch.cat((vectors(1, 4, DIM) + 1, x), 1)
    after = attention(packed, Placement(segments=segments).resolve(1, TIME + 4, x.device))[:, 4:]
    assert (after - run(attention, x)).abs().max() < 1e-12


@pytest.mark.parametrize(("reach", "invariant"), [(0, True), (1, False)])
def test_without_reach_the_order_of_tokens_is_unknown(reach, invariant):
    attention, x = module(RelativeVectors(reach=reach), causal=False), vectors(2, TIME, DIM)
    order = torch.randperm(TIME, generator=torch.Generator().manual_seed(0))
    gap = (run(attention, x[:, order]) - run(attention, x)[:, order]).abs().max()
    assert gap < 1e-12 if invariant else gap > 1e-2


def test_later_and_earlier_keys_have_vectors_of_their_own():
    """The row of key - query, not of query - key: the first table row is the farthest earlier key."""
    attention = module(RelativeVectors(reach=1, values=False), causal=False)
    with torch.no_grad():
        attention.relative.key.zero_()
        attention.relative.key[0] = 1.0
    queries = torch.ones(1, HEADS, TIME, DIM // HEADS, dtype=torch.float64)
    scores = attention.relative.scores(queries, distances(TIME))
    assert torch.equal(scores[0, 0] > 0, distances(TIME) < 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelativeVectors(reach=-1), r"RelativeVectors\.reach must be at least 0, got -1"),
        (lambda: RelativeVectors(keys=False, values=False), "needs keys or values"),
        (lambda: RelativeBuckets(buckets=7), r"RelativeBuckets\.buckets must be a multiple of 2, got 7"),
        (lambda: RelativeBuckets(buckets=6, bidirectional=True), "must be a multiple of 4, got 6"),
        (lambda: RelativeBuckets(buckets=32, max_distance=16), r"max_distance \(16\) must exceed the 16 distances"),
        (lambda: alibi_slopes(0), "heads must be at least 1, got 0"),
    ],
)
def test_bad_positions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_of_unequal_heads_cannot_be_shared():
    blocks = tuple(Block(norm=LayerNorm(), mixer=Attention(heads=h, position=RelativeBuckets())) for h in (2, 4))
    with pytest.raises(ValueError, match=r"must have as many heads.*shared=False"):
        Decoder(vocab_size=5, dim=DIM, depth=2, block=blocks, norm=None).build()


def test_positions_are_specs_that_survive_json():
    for position in (ALiBi(), RelativeBuckets(buckets=8), RelativeVectors(reach=2, values=False)):
        assert RelativePosition.from_dict(copy.deepcopy(position.to_dict())) == position
