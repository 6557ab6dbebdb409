"""Every bias equals its dense mask, packed sequences equal a loop over them, and wrong layouts are named."""

import math

import pytest
import torch
from torch.nn import functional

from paperworks.nn.attention.biases import (
    AttentionBias,
    BlockDiagonalCausalMask,
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
)
from paperworks.nn.attention.memory_efficient import memory_efficient_attention, merge_attentions, swiglu_packed


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """(batch, time, heads, dim), straight from the equation; queries that see nothing get zeros."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + bias
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(0.0), v)


def triangle(queries: int, keys: int, offset: int) -> torch.Tensor:
    return torch.tensor([[0.0 if j <= i + offset else -math.inf for j in range(keys)] for i in range(queries)])


BIASES: list[tuple[AttentionBias, int, int, torch.Tensor]] = [
    (LowerTriangularMask(), 9, 9, triangle(9, 9, 0)),
    (LowerTriangularMask(), 5, 9, triangle(5, 9, 0)),
    (LowerTriangularMask(), 9, 5, triangle(9, 5, 0)),
    (LowerTriangularFromBottomRightMask(), 9, 9, triangle(9, 9, 0)),
    (LowerTriangularFromBottomRightMask(), 5, 9, triangle(5, 9, 4)),
    (LowerTriangularFromBottomRightMask(), 600, 700, triangle(600, 700, 100)),
]


@pytest.mark.parametrize(("bias", "queries", "keys", "dense"), BIASES)
def test_triangles_stand_where_they_should(bias: AttentionBias, queries: int, keys: int, dense: torch.Tensor) -> None:
    assert torch.equal(bias.materialize((queries, keys)), dense)
    assert torch.equal(bias.materialize((2, 3, queries, keys))[1, 2], dense)


def test_top_left_and_bottom_right_agree_only_for_equal_lengths() -> None:
    for queries, keys in ((6, 6), (6, 8), (8, 6)):
        top, bottom = LowerTriangularMask(), LowerTriangularFromBottomRightMask()
        same = torch.equal(top.materialize((queries, keys)), bottom.materialize((queries, keys)))
        assert same == (queries == keys)


@pytest.mark.parametrize(("left", "right"), [(2, 0), (0, 0), (3, 2), (None, 1), (0, 4)])
def test_a_local_mask_counts_from_the_bottom_right(left: int | None, right: int) -> None:
    found = LocalAttentionFromBottomRightMask(left, right).materialize((300, 310))
    at = torch.arange(300)[:, None] + 10
    key = torch.arange(310)
    seen = (key <= at + right) & (key >= (at - left if left is not None else 0))
    assert torch.equal(found == 0, seen)


def test_blocks_stand_on_the_diagonal() -> None:
    found = BlockDiagonalMask.from_seqlens([2, 3], [1, 2]).materialize((1, 5, 3))[0] == 0
    assert found.int().tolist() == [[1, 0, 0]] * 2 + [[0, 1, 1]] * 3
    causal = BlockDiagonalMask.from_seqlens([2, 3]).make_causal()
    assert isinstance(causal, BlockDiagonalCausalMask)
    assert (causal.materialize((5, 5)) == 0).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1],
    ]  # fmt: skip
    padded = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 2], [3, 2], kv_padding=4)
    assert (padded.materialize((3, 8)) == 0).int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bias", "queries", "keys"),
    [
        (LowerTriangularMask(), 9, 5),
        (LowerTriangularFromBottomRightMask(), 5, 9),
        (LowerTriangularFromBottomRightMask(), 9, 5),  # the first queries see nothing
        (LocalAttentionFromBottomRightMask(3, 1), 270, 280),
        (BlockDiagonalMask.from_seqlens([2, 7, 3], [4, 1, 2]), 12, 7),
        (BlockDiagonalCausalMask.from_seqlens([2, 7, 3]), 12, 12),
        (BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 3], [5, 4], kv_padding=6), 4, 12),
    ],
)
def test_attention_and_gradients_equal_those_of_the_dense_mask(bias: AttentionBias, queries: int, keys: int) -> None:
    torch.manual_seed(0)
    batch = 1 if isinstance(bias, BlockDiagonalMask) else 2
    q, k, v = drawn(batch, queries, 3, 4), drawn(batch, keys, 3, 4), drawn(batch, keys, 3, 5)
    out = memory_efficient_attention(q, k, v, bias, scale=0.7)
    plain = naive(q, k, v, bias.materialize((queries, keys), torch.float64), 0.7)
    assert torch.allclose(out, plain, atol=1e-12)
    weight = torch.randn_like(out)
    mine = torch.autograd.grad((out * weight).sum(), (q, k, v))
    dense = bias.materialize((queries, keys), torch.float64)
    blind = dense.isinf().all(1)
    safe = naive(q, k, v, dense.masked_fill(blind[:, None], 0.0), 0.7)[:, ~blind]
    theirs = torch.autograd.grad((safe * weight[:, ~blind]).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, theirs, strict=True))


def test_a_packed_call_equals_a_loop_over_sequences() -> None:
    torch.manual_seed(1)
    lengths = [5, 1, 12, 30]
    q, k, v = (drawn(1, sum(lengths), 2, 8) for _ in range(3))
    bias = BlockDiagonalCausalMask.from_seqlens(lengths)
    packed = bias.split(memory_efficient_attention(q, k, v, bias))
    for own, *parts in zip(packed, *(bias.split(tensor) for tensor in (q, k, v)), strict=True):
        alone = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), is_causal=True)
        assert torch.allclose(own, alone.transpose(1, 2), atol=1e-12)


def test_without_bias_and_with_numbers_it_is_torchs() -> None:
    q, k, v = drawn(2, 4, 3, 8), drawn(2, 6, 3, 8), drawn(2, 6, 3, 8)
    assert torch.allclose(memory_efficient_attention(q, k, v), naive(q, k, v, torch.zeros(()), 8**-0.5), atol=1e-12)
    bias = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert torch.allclose(memory_efficient_attention(q, k, v, bias), naive(q, k, v, bias, 8**-0.5), atol=1e-12)


@pytest.mark.parametrize("expanded", [True, False])
def test_groups_share_keys(expanded: bool) -> None:
    q, k, v = drawn(1, 6, 2, 3, 4), drawn(1, 6, 2, 1, 4), drawn(1, 6, 2, 1, 4)
    keys, values = (tensor.expand(1, 6, 2, 3, 4) if expanded else tensor for tensor in (k, v))
    out = memory_efficient_attention(q, keys, values, LowerTriangularMask())
    for group in range(2):
        shared = (tensor[:, :, group].expand(1, 6, 3, 4) for tensor in (k, v))
        alone = memory_efficient_attention(q[:, :, group], *shared, LowerTriangularMask())
        assert torch.allclose(out[:, :, group], alone, atol=1e-12)
    apart = memory_efficient_attention(q, k.repeat(1, 1, 1, 3, 1), v.repeat(1, 1, 1, 3, 1), LowerTriangularMask())
    assert torch.allclose(out, apart, atol=1e-12)


def test_parts_merge_into_the_whole() -> None:
    q, k, v = drawn(1, 4, 2, 8), drawn(1, 9, 2, 8), drawn(1, 9, 2, 8)
    outs, lses = [], []
    for part in (slice(0, 2), slice(2, 8), slice(8, 9)):
        outs.append(memory_efficient_attention(q, k[:, part], v[:, part]))
        lses.append((torch.einsum("bqhd,bkhd->bhqk", q, k[:, part]) * 8**-0.5).logsumexp(-1))
    out, lse = merge_attentions(outs, lses)
    assert torch.allclose(out, memory_efficient_attention(q, k, v), atol=1e-12)
    assert torch.allclose(lse, (torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).logsumexp(-1), atol=1e-12)


def test_packed_swiglu_is_two_products() -> None:
    x, w, b = drawn(5, 4), drawn(2, 6, 4), drawn(2, 6)
    w3, b3 = drawn(4, 6), drawn(4)
    plain = functional.linear(functional.silu(x @ w[0].T + b[0]) * (x @ w[1].T + b[1]), w3, b3)
    assert torch.allclose(swiglu_packed(x, w, b, w3, b3), plain, atol=1e-12)
    assert torch.allclose(swiglu_packed(x, w, None, w3, None), (functional.silu(x @ w[0].T) * (x @ w[1].T)) @ w3.T)


def test_wrong_shapes_are_named() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="time before heads"):
        memory_efficient_attention(q, torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
    with pytest.raises(ValueError, match="groups"):
        memory_efficient_attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match="is for 5 queries and 5 keys, got 4 and 4"):
        memory_efficient_attention(q, q, q, BlockDiagonalMask.from_seqlens([2, 3]))
    with pytest.raises(ValueError, match="2 lengths of queries and 1 of keys"):
        BlockDiagonalMask.from_seqlens([1, 2], [3])
    with pytest.raises(ValueError, match="leave it out"):
        BlockDiagonalMask.from_seqlens([1, 0])
    with pytest.raises(ValueError, match="do not fit in a kv_padding of 4"):
        BlockDiagonalMask.from_seqlens([1], [5], kv_padding=4)
    with pytest.raises(ValueError, match="need kv_padding"):
        BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1])
    with pytest.raises(ValueError, match="window_left must be at least 0"):
        LocalAttentionFromBottomRightMask(-1, 0)
    with pytest.raises(ValueError, match="the gate first"):
        swiglu_packed(torch.zeros(2, 4), torch.zeros(12, 4), None, torch.zeros(4, 6), None)
