"""Every backend against the equations, and variants of attention that are a new file each."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.nn import Attention, Cache, Placement, RoPE, Rotary
from paperworks.nn.attention import backends
from paperworks.nn.attention.attention import AttentionModule
from paperworks.nn.attention.backends import Inputs
from paperworks.nn.attention.cache import KeyValueCache
from paperworks.nn.attention.mask import Mask, mask_of

CPU = torch.device("cpu")
ROWS = ([40, 9, 31], [5, 70, 5])


def packed_segments() -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(1, 4), torch.tensor(row)) for row in ROWS])


def inputs(mask: Mask, kv_heads: int = 2, value_dim: int = 8, **options) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    draw = [
        torch.randn(2, heads, time, size, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, time, size in ((4, mask.queries, 8), (kv_heads, mask.keys, 8), (kv_heads, mask.keys, value_dim))
    ]
    return Inputs(queries=draw[0], keys=draw[1], values=draw[2], mask=mask, scale=8**-0.5, **options)


def naive(given: Inputs) -> Tensor:
    """Attention written as loops over queries and keys."""
    mask, group = given.mask, given.queries.shape[1] // given.keys.shape[1]
    out = torch.zeros(2, 4, mask.queries, given.values.shape[-1], dtype=torch.float64)
    for row in range(2):
        for query in range(mask.queries):
            place = mask.start + query
            seen = []
            for key in range(mask.keys):
                near = mask.window is None or (place - key < mask.window and key - place < mask.window)
                same = mask.segments is None or mask.segments[row, query] == mask.key_segments[row, key]
                if near and same and (key <= place or not mask.causal):
                    seen.append(key)
            for head in range(4):
                scores = given.scale * given.keys[row, head // group, seen] @ given.queries[row, head, query]
                out[row, head, query] = torch.softmax(scores, 0) @ given.values[row, head // group, seen]
    return out


def mask(causal: bool = True, window: int | None = None, packed: bool = True) -> Mask:
    segments = packed_segments() if packed else None
    return mask_of(Placement(segments=segments).resolve(2, 80, CPU), None, causal, window)


MASKS = {
    "causal": mask(packed=False),
    "all": mask(causal=False, packed=False),
    "documents": mask(),
    "documents both ways": mask(causal=False),
    "window": mask(window=20, packed=False),
    "documents and window": mask(window=20),
    "window both ways": mask(causal=False, window=7, packed=False),
    "documents and window both ways": mask(causal=False, window=7),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_chosen_backend_and_the_reference_equal_the_loops(name):
    given = inputs(MASKS[name])
    expected = naive(given)
    assert (backends.attend(given) - expected).abs().max() < 1e-12
    assert (backends.reference(given) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["documents", "documents and window", "window"])
def test_gradients_of_pieces_equal_those_of_the_reference(name):
    given = inputs(MASKS[name])
    leaves = (given.queries, given.keys, given.values)
    found = torch.autograd.grad(backends.pieces(given).cos().sum(), leaves)
    expected = torch.autograd.grad(backends.reference(given).cos().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def kernel(queries, keys, values, edges, _, longest, __, *, scale, window_size, enable_gqa):
    """What the GPU's kernel for unequal lengths computes, document by document."""
    before, after = window_size
    outs = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        assert end - start <= longest
        distance = torch.arange(end - start) - torch.arange(end - start)[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if before >= 0:
            seen &= distance >= -before
        if after >= 0:
            seen &= distance <= after
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (queries, keys, values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("name", ["documents", "documents both ways", "documents and window"])
def test_varlen_hands_the_kernel_documents_and_windows(name):
    given = inputs(MASKS[name])
    assert (backends.varlen(given, kernel) - naive(given)).abs().max() < 1e-12


def test_documents_that_are_no_runs_have_no_edges_and_no_pieces():
    segments = torch.tensor([[1] * 30 + [2] * 30 + [1] * 20] * 2)
    torn = mask_of(Placement(segments=segments).resolve(2, 80, CPU), None, True, None)
    assert torn.edges(2) is None
    assert torn.pieces() is None
    given = inputs(torn)
    assert backends.choose(given) is backends.fused
    assert (backends.attend(given) - naive(given)).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 20])
def test_packed_rows_stay_divided_under_compile_with_gradients(window):
    given = inputs(mask(window=window))
    segments = packed_segments()

    def run(queries, keys, values):
        here = mask_of(Placement(segments=segments).resolve(2, 80, CPU), None, True, window)
        return backends.attend(Inputs(queries=queries, keys=keys, values=values, mask=here, scale=8**-0.5))

    seen = []

    def watch(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    leaves = (given.queries, given.keys, given.values)
    compiled = torch.compile(run, backend=watch, fullgraph=True)
    assert (compiled(*leaves) - naive(given)).abs().max() < 1e-12
    assert any("packed_attention" in target for target in seen)
    exact = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(exact(*leaves).cos().sum(), leaves)
    expected = torch.autograd.grad(backends.reference(given).cos().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def test_long_packed_rows_and_windows_are_divided_and_short_ones_are_not():
    long = Placement(segments=torch.arange(1, 9).repeat_interleave(80).expand(2, -1)).resolve(2, 640, CPU)
    for here in (mask_of(long, None, True, None), mask_of(Placement().resolve(2, 640, CPU), None, True, 20)):
        assert backends.choose(inputs(here)) is backends.pieces
        assert backends.choose(inputs(here, soft_cap=3.0)) is backends.reference
    assert backends.choose(inputs(MASKS["documents"])) is backends.fused


def test_half_precision_takes_the_kernel_for_unequal_lengths_on_a_gpu_only():
    given = inputs(MASKS["documents"])
    assert not backends._has_varlen(given)  # float64
    half = replace(given, **{name: getattr(given, name).bfloat16() for name in ("queries", "keys", "values")})
    assert backends._has_varlen(half) == backends._varlen_ships()
    assert not backends._has_varlen(replace(half, values=half.values[..., :4]))
    assert not backends._has_varlen(replace(half, dropout=0.1))


def test_values_may_be_of_another_size_than_keys():
    given = inputs(MASKS["documents and window"], value_dim=3)
    assert (backends.attend(given) - naive(given)).abs().max() < 1e-12


# Variants of attention, each as a new file would hold it: `attention.py` knows none of them.


@dataclass(frozen=True, kw_only=True)
class Sinks(Attention):
    """A learned score for each head that takes part in the softmax and brings no value."""

    def build(self, dim: int) -> nn.Module:
        return SinksModule(dim, self)


class SinksModule(AttentionModule):
    def __init__(self, dim: int, spec: Attention) -> None:
        super().__init__(dim, spec)
        self.sinks = nn.Parameter(torch.zeros(spec.heads))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        empty = keys.new_zeros(*keys.shape[:2], 1, keys.shape[-1])
        seen = mask.visible()
        bias = queries.new_zeros(1, queries.shape[1], mask.queries, mask.keys)
        bias = bias if seen is None else bias.masked_fill(~seen, -torch.inf)
        sinks = self.sinks[None, :, None, None].expand(len(bias), -1, mask.queries, 1)
        wider = replace(
            mask, keys=mask.keys + 1, causal=False, window=None, segments=None, bias=torch.cat((bias, sinks), -1),
            _made={},
        )  # fmt: skip
        return super().attend(queries, torch.cat((keys, empty), 2), torch.cat((values, empty), 2), wider)


@dataclass(frozen=True, kw_only=True)
class Latent(Attention):
    """Keys and values from one small vector a token, which is all that the cache holds (as in MLA)."""

    rank: int = 6

    def build(self, dim: int) -> nn.Module:
        return LatentModule(dim, self)


class LatentModule(AttentionModule):
    def __init__(self, dim: int, spec: Latent) -> None:
        super().__init__(dim, spec)
        self.compress = nn.Linear(dim, spec.rank, bias=False)
        self.key = nn.Linear(spec.rank, spec.heads * self.head_dim, bias=False)
        self.value = nn.Linear(spec.rank, spec.heads * self.head_dim, bias=False)

    def new_cache(self, batch, capacity, dtype, device) -> KeyValueCache:
        return KeyValueCache(batch, 1, capacity, self.spec.rank, False, dtype, device, value_dim=0)

    def project(self, x: Tensor, placement: Placement) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.compress(x)[:, None]
        queries = self.query(x).unflatten(-1, (self.spec.heads, self.head_dim)).transpose(1, 2)
        return queries, latent, latent[..., :0]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        shape = (self.spec.heads, self.head_dim)
        latent = keys[:, 0]
        keys, values = (made(latent).unflatten(-1, shape).transpose(1, 2) for made in (self.key, self.value))
        return super().attend(queries, keys, values, mask)


@dataclass(frozen=True, kw_only=True)
class Grid(Rotary):
    """Half of the channels turned by the row of a picture, half by the column."""

    width: int
    rope: RoPE = RoPE()  # noqa: RUF009  (frozen)

    def rotated(self, head_dim: int) -> int:
        return 2 * self.rope.rotated(head_dim // 2)

    def turn(self, queries: Tensor, keys: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        half, places = queries.shape[-1] // 2, placement.positions
        tables = [
            self.rope.table(where, half, 0, queries.dtype)
            for where in (places.div(self.width, rounding_mode="floor"), places % self.width)
        ]

        def both(x: Tensor) -> Tensor:
            parts = zip(x.split(half, -1), tables, strict=True)
            return torch.cat([self.rope.rotate(part, cos, sin) for part, (cos, sin) in parts], -1)

        return both(queries), both(keys)


@pytest.mark.parametrize(
    "spec", [Sinks(heads=2, position=RoPE()), Latent(heads=2), Attention(heads=2, position=Grid(width=5))]
)
@pytest.mark.parametrize("packed", [False, True])
def test_variants_in_new_files_decode_in_chunks_and_packed(spec, packed):
    torch.manual_seed(0)
    module = spec.build(16).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    segments = torch.tensor([[1] * 7 + [2] * 5, [0] * 3 + [1] * 9]) if packed else None
    whole = module(x, Placement(segments=segments).resolve(2, 12, CPU))
    cache = Cache([module.new_cache(2, 12, torch.float64, CPU)], 12)
    parts, start = [], 0
    for size in (5, 1, 1, 5):
        here = slice(start, start + size)
        now = Placement(cache=cache, segments=None if segments is None else segments[:, here]).resolve(2, size, CPU)
        parts.append(module(x[:, here], now.at(cache.layers[0])))
        start += size
    real = slice(None) if segments is None else segments > 0
    assert (torch.cat(parts, 1) - whole)[real].abs().max() < 1e-12


def test_sinks_take_weight_away_as_the_equation_says():
    torch.manual_seed(0)
    module = Sinks(heads=2).build(8).double()
    nn.init.constant_(module.sinks, 1.5)
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    placement = Placement().resolve(1, 4, CPU)
    queries, keys, values = module.project(x, placement)
    scores = backends.scores(queries, keys, torch.ones(4, 4, dtype=torch.bool).tril(), module.scale)
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + torch.tensor(1.5, dtype=torch.float64).exp())
    expected = module.output((weights @ values).transpose(1, 2).flatten(2))
    assert (module(x, placement) - expected).abs().max() < 1e-12


def test_a_window_both_ways_is_symmetric():
    torch.manual_seed(0)
    module = Attention(heads=2, causal=False, window=3).build(8).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    out = module(x, Placement().resolve(1, 9, CPU))
    changed = x.clone()
    changed[:, 4] += 1
    moved = (module(changed, Placement().resolve(1, 9, CPU)) - out).abs().amax(-1)[0] > 1e-9
    assert moved.tolist() == [False, False, True, True, True, True, True, False, False]
