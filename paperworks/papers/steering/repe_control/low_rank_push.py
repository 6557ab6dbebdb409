"""LoRRA on SmolLM2: adapters trained, on neutral statements, to push its states along a reading vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paperworks import adapt, train
from paperworks.interpret import ControlVector
from paperworks.interpret.steering.lorra import Lorra, LorraBatch
from paperworks.lab import Lab
from paperworks.models import DecoderModel
from paperworks.nn import Placement
from paperworks.testbeds.statements import paired

RATE = 3e-4  # the authors' setting


def _run_to(depth: int) -> Any:
    """What runs only the first blocks of a model: LoRRA reads no more than its last target layer."""

    def run(model: nn.Module, tokens: Tensor) -> Tensor:
        parts: Any = model
        x = parts.embedding(tokens)
        batch, time = tokens.shape
        stream = Placement().resolve(batch, time, tokens.device)
        for block in parts.blocks[:depth]:
            x = block(x, stream)
        return x

    return run


def _texts_of_one_length(lab: Lab, model: DecoderModel, count: int) -> Tensor:
    """Neutral statements of the commonest length, as tokens (texts, time)."""
    tokenizer: Any = model.tokenizer
    rows: dict[int, list[list[int]]] = {}
    for topic in ("facts", "cities", "animal_class"):
        for part in paired(topic, 160, lab.seed):
            for text in part.texts:
                ids = tokenizer.encode(text)
                rows.setdefault(len(ids), []).append(ids)
    commonest = max(rows.values(), key=len)
    return torch.tensor(commonest[:count], device=model.device)


def adapted_towards(
    lab: Lab, model: DecoderModel, reading: ControlVector, beta: float, description: str
) -> list[float]:
    """Train adapters in place towards the reading vector, and return the losses."""
    texts = _texts_of_one_length(lab, model, 64)
    last = max(int(path.split(".")[1]) for path in reading.directions)
    steps, size = lab.pick(smoke=2, small=100), 4
    draws = torch.Generator().manual_seed(lab.seed)
    window = texts.shape[1] - 1  # all but the first token, whose state is an attention sink
    batches = []
    for _ in range(steps):
        rows = texts[torch.randint(len(texts), (size,), generator=draws).to(texts.device)]
        batches.append(LorraBatch(rows, rows, rows, torch.ones(size, window, dtype=torch.bool, device=rows.device)))
    torch.manual_seed(lab.seed)
    targets = [f"blocks.{layer}.mixer.{name}" for layer in range(last + 1) for name in ("query", "value")]
    adapt.apply(model, adapt.LoRA(rank=8, alpha=16), targets=targets)
    loss = Lorra(list(reading.directions), 0.0, beta, reading, disabled=adapt.disabled, run=_run_to(last + 1))
    settings = train.Settings(
        steps=steps,
        lr=RATE,
        schedule="constant",
        warmup=0,
        optimizer=train.AdamW(weight_decay=0.0),
        seed=None,
        save_every=None,
        log_every=steps,
        progress=False,
    )
    with lab.progress(description, steps) as advance:
        report = train.fit(model, loss, batches, settings, on_step=lambda step: advance(1))
    model.eval()
    return report.losses
