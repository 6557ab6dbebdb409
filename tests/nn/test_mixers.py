"""What holds for every mixer: at once = in chunks = token by token; padding and packing change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.models import Block, Decoder, Parallel
from paperworks.nn import Attention, GatedMLP, LayerNorm, Placement, RMSNorm, RoPE, Spec
from tests.nn.mixers import LENGTH_FREE, MIXERS

# One of each kind: compiling takes seconds.
COMPILED = ["grouped", "alibi", "buckets", "relative", "mamba", "rwkv", "peepholes", "mlstm"]


def model_of(mixer, dtype=torch.float64):
    torch.manual_seed(0)
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=GatedMLP(hidden=24))
    spec = Decoder(vocab_size=31, dim=16, depth=2, block=block, norm=LayerNorm(), init_std=0.3)
    model = spec.build()
    with torch.no_grad():  # a table that begins at zero would hide what is wrong with it
        for parameter in model.blocks.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def cut(total, draw):
    """Draw a way to cut `total` tokens into chunks."""
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


@st.composite
def feedings(draw):
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    return batch, time, cut(time, draw), draw(st.integers(0, 2**31))


def feed(model, tokens, sizes, segments=None, extra=0):
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + extra)
    outputs, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        outputs.append(
            model(tokens[:, here], Placement(cache=cache, segments=None if segments is None else segments[:, here]))
        )
        start += size
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("name", MIXERS)
@given(feedings())
@settings(max_examples=12, deadline=None, derandomize=True)
@torch.no_grad()
def test_chunks_of_any_size_equal_the_whole(name, feeding):
    batch, time, sizes, seed = feeding
    model = model_of(MIXERS[name])
    tokens = torch.randint(0, 31, (batch, time), generator=torch.Generator().manual_seed(seed))
    whole = model(tokens)
    for plan in (sizes, [1] * time):
        assert (feed(model, tokens, plan) - whole).abs().max() < 1e-10  # float64
    single = model.float()
    assert (feed(single, tokens, sizes) - single(tokens)).abs().max() < 1e-5  # float32, logits of order 1


@pytest.mark.parametrize("name", LENGTH_FREE)
@given(feedings(), st.integers(1, 6))
@settings(max_examples=8, deadline=None, derandomize=True)
@torch.no_grad()
def test_left_padding_changes_nothing(name, feeding, padding):
    batch, time, sizes, seed = feeding
    model = model_of(MIXERS[name])
    tokens = torch.randint(0, 31, (batch, time), generator=torch.Generator().manual_seed(seed))
    padded = torch.cat((torch.zeros(batch, padding, dtype=torch.int64), tokens), 1)
    segments = torch.cat((torch.zeros(batch, padding, dtype=torch.int64), torch.ones_like(tokens)), 1)
    whole = model(tokens)
    assert (model(padded, Placement(segments=segments))[:, padding:] - whole).abs().max() < 1e-10
    assert (feed(model, padded, [padding, *sizes], segments)[:, padding:] - whole).abs().max() < 1e-10
    assert torch.isfinite(model(padded, Placement(segments=segments))).all()


@pytest.mark.parametrize("name", LENGTH_FREE)
@torch.no_grad()
def test_packed_documents_never_see_each_other(name):
    model = model_of(MIXERS[name])
    documents = [torch.randint(0, 31, (1, length)) for length in (7, 3, 6)]
    packed = torch.cat(documents, 1)
    segments = torch.cat([torch.full_like(document, index + 1) for index, document in enumerate(documents)], 1)
    apart = torch.cat([model(document) for document in documents], 1)
    assert (model(packed, Placement(segments=segments)) - apart).abs().max() < 1e-10
    assert (feed(model, packed, [2, 9, 5], segments) - apart).abs().max() < 1e-10
    assert (feed(model, packed, [1] * 16, segments) - apart).abs().max() < 1e-10


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_later_tokens_change_no_earlier_output(name):
    model = model_of(MIXERS[name])
    tokens = torch.randint(0, 31, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 31
    assert torch.equal(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.equal(model(tokens)[:, 8:], model(changed)[:, 8:])


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_are_the_derivatives(name):
    mixer = MIXERS[name].build(16).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)

    def run(x):
        return mixer(x, Placement().resolve(2, 6, x.device))

    torch.autograd.gradcheck(run, (x,), atol=1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_round_trip_through_json(name):
    import json

    mixer = MIXERS[name]
    assert Spec.from_dict(json.loads(json.dumps(mixer.to_dict()))) == mixer


@torch.no_grad()
def test_a_model_may_mix_any_two_kinds_and_still_decodes_in_chunks():
    block = Block(norm=RMSNorm(), mixer=MIXERS["window"], feedforward=GatedMLP(hidden=24))
    other = Block(norm=RMSNorm(), mixer=MIXERS["multi-query"], arrangement=Parallel(), feedforward=GatedMLP(hidden=8))
    spec = Decoder(vocab_size=31, dim=16, depth=3, block=(block, other, block), norm=None)
    model = spec.build().double()
    tokens = torch.randint(0, 31, (2, 13))
    assert (feed(model, tokens, [6, 1, 4, 2]) - model(tokens)).abs().max() < 1e-10


@torch.no_grad()
def test_cache_rows_can_be_reordered():
    model = model_of(MIXERS["window"])
    tokens = torch.randint(0, 31, (3, 9))
    cache = model.new_cache(3, 9)
    model(tokens[:, :7], Placement(cache=cache))
    rows = torch.tensor([2, 0])
    cache.reorder(rows)
    assert (model(tokens[rows, 7:], Placement(cache=cache)) - model(tokens[rows])[:, 7:]).abs().max() < 1e-10


@torch.no_grad()
def test_rolling_cache_holds_the_window_only():
    model = model_of(MIXERS["window"])
    full = model_of(MIXERS["grouped"])
    assert model.new_cache(1, 1000).bytes() * 200 == full.new_cache(1, 1000).bytes()


@torch.no_grad()
def test_perturbing_a_token_beyond_every_window_changes_nothing():
    """Mistral's receptive field: after L layers of window W, L * (W - 1) back (catalogue, mistral)."""
    model = model_of(Attention(heads=4, window=4, position=RoPE()))
    tokens = torch.randint(0, 31, (1, 20))
    for back, changes in ((6, True), (7, False)):
        other = tokens.clone()
        other[0, 19 - back] = (other[0, 19 - back] + 1) % 31
        assert torch.equal(model(tokens)[:, -1], model(other)[:, -1]) != changes


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_model_gives_the_same_numbers(name):
    model = model_of(MIXERS[name], torch.float32)
    tokens = torch.randint(0, 31, (2, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert (compiled(tokens) - model(tokens)).abs().max() < 1e-6


def test_cache_that_is_full_says_so():
    model = model_of(MIXERS["plain"])
    cache = model.new_cache(1, 4)
    model(torch.zeros(1, 3, dtype=torch.int64), Placement(cache=cache))
    with pytest.raises(ValueError, match="holds 4 tokens and 3 are in it: no room for 2"):
        model(torch.zeros(1, 2, dtype=torch.int64), Placement(cache=cache))
