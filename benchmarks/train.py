"""Training steps per second beside transformers: float32 and bfloat16 autocast, the same loss and optimizer."""

from collections.abc import Iterator

import torch

from benchmarks.measure import Row, compare, matrix_rate
from benchmarks.subjects import VOCAB, pair, training_flops
from paperworks import train

BATCH, TIME, STEPS = 4, 256, 2


def peer_steps(model, batches, autocast: bool) -> None:
    """The loop a user of transformers writes: labels in, loss out, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    model.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run() -> Iterator[Row]:
    tokens = BATCH * TIME * STEPS
    rate = matrix_rate()
    for precision, bar, blocks in (("float32", 1.0, 5), ("bfloat16", 1.2, 2)):
        ours, peer = pair()
        batches = [torch.randint(0, VOCAB, (BATCH, TIME)) for _ in range(STEPS)]
        if precision == "bfloat16":
            batches, tokens = [batches[0][:1]], TIME  # where the peer has no fast kernel, one row already takes long
        settings = train.Settings(steps=len(batches), lr=3e-4, precision=precision, progress=False)
        row = compare(
            f"training, {precision}{' autocast' if precision != 'float32' else ''}",
            lambda ours=ours, batches=batches, settings=settings: train.fit(
                ours, train.next_token_loss, batches, settings
            ),
            lambda peer=peer, batches=batches, cast=precision != "float32": peer_steps(peer, batches, cast),
            bar=bar,
            blocks=blocks,
        )
        flops = training_flops(tokens, TIME)
        row.details = {
            "ours_tokens_per_second": tokens / min(row.ours),
            "ours_fraction_of_float32_rate": flops / min(row.ours) / rate,
            "peer_fraction_of_float32_rate": flops / min(row.peer) / rate,
        }
        yield row
