"""Greedy decoding with a cache beside transformers: 32 prompt tokens, then 256 new ones."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from benchmarks.measure import Row, best, compare, read_bandwidth
from benchmarks.subjects import DIM, HIDDEN, VOCAB, pair
from paperworks.generation import Sampling, decode
from paperworks.generation.matvec import product

PROMPT, NEW = 32, 256


def weight_bytes(model) -> int:
    return sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))


def product_rates() -> dict[str, float]:
    """Bytes of weights per second in a matrix-vector product, by who computes it; weights beyond any cache."""
    weights = [torch.randn(2 * HIDDEN, DIM) for _ in range(24)]
    x = torch.randn(1, DIM)
    threads = torch.get_num_threads()
    halves, half = [weight.half() for weight in weights], x.half()
    total = sum(weight.nbytes for weight in weights)
    return {
        "torch_float32_gbytes_per_second": total / best(lambda: [F.linear(x, w) for w in weights]) / 1e9,
        "blocks_float32_gbytes_per_second": total / best(lambda: [product(x, w, threads) for w in weights]) / 1e9,
        "torch_float16_gbytes_per_second": total / 2 / best(lambda: [F.linear(half, w) for w in halves]) / 1e9,
    }


@torch.no_grad()
def run() -> Iterator[Row]:
    ours, peer = pair()
    ours.eval()
    peer.eval()
    bandwidth = read_bandwidth()
    rates = product_rates()
    for name, batch, dtype, bar in (
        ("float32, batch 1", 1, torch.float32, 1.6),
        ("float32, batch 8", 8, torch.float32, 1.3),
        ("float16 weights (peer float32), batch 1", 1, torch.float16, 3.0),
    ):
        prompt = torch.randint(0, VOCAB, (batch, PROMPT))
        ours.to(dtype)

        def decode_ours(prompt=prompt):
            for _ in decode(ours, prompt, max_new_tokens=NEW, sampling=Sampling(temperature=0.0)):
                pass

        def decode_peer(prompt=prompt):
            peer.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

        row = compare(f"decoding, {name}", decode_ours, decode_peer, bar=bar, blocks=3)
        row.details = {
            "ours_ms_per_token": 1e3 * min(row.ours) / NEW,
            "peer_ms_per_token": 1e3 * min(row.peer) / NEW,
            "ours_fraction_of_read_bandwidth": weight_bytes(ours) * NEW / min(row.ours) / bandwidth,
        }
        if batch == 1 and dtype == torch.float32:
            row.details |= rates
        yield row
