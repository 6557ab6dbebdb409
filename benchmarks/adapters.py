"""One LoRA step beside peft: the same base (transformers' module), rank, targets, batch, loss and optimizer."""

from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from benchmarks.measure import Row, compare
from benchmarks.subjects import VOCAB, pair, peer_model
from benchmarks.train import peer_steps
from paperworks import adapt, train

BATCH, TIME, STEPS = 4, 128, 3
TARGETS = ["q_proj", "v_proj"]


def _trainer(model, batches, logits):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def steps():
        model.train()
        for batch in batches:
            out = logits(model(batch))
            F.cross_entropy(out[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def run() -> Iterator[Row]:
    batches = [torch.randint(0, VOCAB, (BATCH, TIME)) for _ in range(STEPS)]
    theirs = get_peft_model(peer_model(), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    peer = _trainer(theirs, batches, lambda out: out.logits)
    same = adapt.apply(peer_model(), adapt.LoRA(rank=8, alpha=16), targets=[f"*.{name}" for name in TARGETS])
    yield compare(
        "LoRA step, our adapter on transformers' model", _trainer(same, batches, lambda out: out.logits), peer, bar=1.0
    )
    ours, _ = pair()
    adapt.apply(ours, adapt.LoRA(rank=8, alpha=16), targets="blocks.*.mixer.{query,value}")
    yield compare("LoRA step, our adapter on our model", _trainer(ours, batches, lambda out: out), peer, bar=1.1)
    settings = train.Settings(steps=STEPS, lr=1e-3, schedule="constant", warmup=0, progress=False, save_every=None)
    yield compare(
        "LoRA training, our loop and loss (peer: peft, labels in, clip, AdamW)",
        lambda: train.fit(ours, train.next_token_loss, batches, settings),
        lambda: peer_steps(theirs, batches, False),
        bar=1.1,
    )
