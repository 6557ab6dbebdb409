"""Tree attention: partial results against plain attention, gradients, and processes against one process."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn import functional

from paperworks.models import Block, Decoder
from paperworks.nn import ALiBi, Attention, GatedMLP, Placement, RelativeVectors, RMSNorm, RoPE, TreeAttention
from paperworks.nn.attention.reference.tiled import EMPTY, Partial
from paperworks.nn.attention.reference.tree import (
    Exchange,
    all_reduce,
    energy,
    partial_attention,
    reduce_ring,
    reduce_tree,
)
from tests.nn.mixers import MIXERS

WORKERS = 3
SPREAD = {
    "grouped": TreeAttention.of(MIXERS["grouped"]),
    "window": TreeAttention.of(MIXERS["window"]),
    "capped": TreeAttention.of(MIXERS["capped"]),
    "alibi": TreeAttention(heads=4, kv_heads=2, position=ALiBi()),
    "normed": TreeAttention.of(MIXERS["normed"]),
}


def drawn(*shape, count=3):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


def language_model(mixer):
    torch.manual_seed(0)
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=GatedMLP(hidden=24))
    return Decoder(vocab_size=19, dim=16, depth=2, block=block, norm=RMSNorm(), init_std=0.3).build().double().eval()


@torch.no_grad()
def read_in_pieces(mixer):
    """Read a padded batch in a first piece, single tokens and a chunk; return all logits."""
    model = language_model(mixer)
    tokens = torch.randint(19, (2, 14), generator=torch.Generator().manual_seed(1))
    segments = torch.ones(2, 14, dtype=torch.long)
    segments[1, :3] = 0  # padding on the left of the second row
    outs = []
    for padded in (False, True):
        cache = model.new_cache(2, 14)
        for begin, end in ((0, 2), (2, 3), (3, 4), (4, 11), (11, 12), (12, 14)):
            extra = {"segments": segments[:, begin:end]} if padded else {}
            outs.append(model(tokens[:, begin:end], Placement(cache=cache, **extra)))
        outs.append(torch.tensor([cache.bytes()], dtype=torch.float64).expand(2, 1, 19))
    return torch.cat(outs, 1)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    found = {name: read_in_pieces(mixer) for name, mixer in SPREAD.items()}
    alike = Partial(torch.full((1, 1, 1, 2), float(rank)), torch.full((1, 1, 1), 600.0))
    found["large"] = all_reduce(alike).out  # the sum of such log-sum-exps is no shift for any of them
    model = language_model(SPREAD["grouped"])
    model.blocks[0].mixer.pattern.register_forward_hook(lambda module, args, out: out)
    try:
        model(torch.ones(1, 2, dtype=torch.long), Placement(cache=model.new_cache(1, 2)))
    except ValueError as error:
        found["refused"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_compute_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # they import this file
    multiprocessing.start_processes(worker, (str(tmp_path),), nprocs=WORKERS, start_method="spawn")
    for rank in range(WORKERS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert "pattern is spread" in found.pop("refused")
        assert torch.allclose(found.pop("large"), torch.ones(1, 1, 1, 2))  # the mean of 0, 1 and 2
        for name, logits in found.items():
            spec = SPREAD[name]
            alone = read_in_pieces(Attention(**{field.name: getattr(spec, field.name) for field in fields(Attention)}))
            assert torch.allclose(logits[:, :14], alone[:, :14], atol=1e-12, rtol=0), name
            assert torch.allclose(logits[:, 15:29], alone[:, 15:29], atol=1e-12, rtol=0), name
            if name != "window":  # its cache rolls where it is not spread
                assert logits[0, 14, 0] < 0.4 * alone[0, 14, 0]
    assert len(found) == len(SPREAD)


def test_alone_it_is_attention():
    ours, plain = (read_in_pieces(mixer) for mixer in (SPREAD["grouped"], MIXERS["grouped"]))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8, 60])
def test_any_number_of_shards_and_their_gradients(workers: int):
    given = drawn(2, 4, 50, 16)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
    key, value = (tensor.tensor_split(workers, 2) for tensor in ours[1:])
    partials = [partial_attention(ours[0], k, v) for k, v in zip(key, value, strict=True)]
    found = reduce_tree(partials)
    expected = functional.scaled_dot_product_attention(*theirs)
    assert torch.allclose(found.out, expected, atol=1e-12, rtol=0)
    scores = theirs[0] @ theirs[1].transpose(-1, -2) / 4
    assert torch.allclose(found.log_sum, scores.logsumexp(-1), atol=1e-12, rtol=0)
    upstream = torch.randn_like(expected)
    found.out.backward(upstream)
    expected.backward(upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12, rtol=0)


def test_masks_hide_and_rows_that_see_nothing_are_nothing():
    query, key, value = drawn(1, 2, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[0] = False
    partials = [
        partial_attention(query, key[:, :, c], value[:, :, c], mask=mask[:, c]) for c in (slice(4), slice(4, 6))
    ]
    found = reduce_tree(partials)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.allclose(found.out[:, :, 1:], expected[:, :, 1:], atol=1e-12, rtol=0)
    assert not found.out[:, :, 0].any()
    assert (found.log_sum[:, :, 0] == EMPTY).all()


def test_exchanges_are_counted():
    query, key, value = drawn(1, 2, 40, 8)
    shards = list(zip(key.tensor_split(5, 2), value.tensor_split(5, 2), strict=True))
    tree, ring = Exchange(), Exchange()
    reduce_tree([partial_attention(query[:, :, :1], *shard) for shard in shards], tree)
    reduce_ring(query[:, :, :1], shards, ring)
    assert (tree.rounds, tree.sent) == (6, 2 * 4 * (2 * 8 + 2))
    assert (ring.rounds, ring.sent) == (4, 4 * 2 * 2 * 40 * 8)


def test_the_energys_gradient_is_attention():
    query, key, value = drawn(2, 3, 7, 8)
    source = torch.zeros_like(query).requires_grad_()
    (slope,) = torch.autograd.grad(energy(query, key, value, source, scale=0.7), source)
    expected = functional.scaled_dot_product_attention(query, key, value, scale=0.7)
    assert torch.allclose(slope, expected, atol=1e-12, rtol=0)


def test_bad_input_is_refused():
    query, key, value = drawn(1, 3, 4, 8)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        partial_attention(query, key[:, :2], value[:, :2])
    with pytest.raises(ValueError, match="at least one worker"):
        reduce_tree([])
    with pytest.raises(ValueError, match="relative positions to values"):
        TreeAttention(heads=4, position=RelativeVectors(reach=2)).build(16)
    module = TreeAttention(heads=4, position=RoPE()).build(16)
    assert module(torch.randn(1, 3, 16), Placement().resolve(1, 3, torch.device("cpu"))).shape == (1, 3, 16)
