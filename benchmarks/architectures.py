"""One pretraining step of each architecture beside transformers' model of the same shapes: forward, backward, AdamW."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from benchmarks.measure import Row, compare
from paperworks.models import Block, Decoder
from paperworks.models.presets import llama, mamba, rwkv4
from paperworks.nn import Experts, GatedMLP
from paperworks.train import next_token_loss

VOCAB, DIM, DEPTH, BATCH, TIME = 2048, 256, 4, 4, 256


def stepping(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> Callable[[], None]:
    """Return what takes one step, the same on both sides but for the model and its own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def mixtral() -> Decoder:
    """Eight experts of 256, two a token."""
    base = llama(DIM, DEPTH, 8, 256, kv_heads=2, vocab_size=VOCAB, context=2048)
    assert isinstance(base.block, Block)
    return replace(base, block=replace(base.block, feedforward=Experts(expert=GatedMLP(hidden=256), count=8)))


def peers() -> Iterator[tuple[str, Decoder, nn.Module, float]]:
    import transformers

    yield (
        "Mamba",
        replace(mamba(DIM, DEPTH), vocab_size=VOCAB),
        transformers.MambaForCausalLM(
            transformers.MambaConfig(
                vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=DEPTH, tie_word_embeddings=True
            )
        ),
        2.0,
    )
    yield (
        "RWKV-4",
        rwkv4(DIM, DEPTH, VOCAB),
        transformers.RwkvForCausalLM(
            transformers.RwkvConfig(
                vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=DEPTH, attention_hidden_size=DIM, rescale_every=0
            )
        ),
        2.0,
    )
    yield (
        "Mixtral (8 experts)",
        mixtral(),
        transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=VOCAB, hidden_size=DIM, intermediate_size=256, num_hidden_layers=DEPTH,
                num_attention_heads=8, num_key_value_heads=2, num_local_experts=8, max_position_embeddings=2048,
                sliding_window=None,
            )
        ),
        1.0,
    )  # fmt: skip


def run() -> Iterator[Row]:
    tokens = torch.randint(0, VOCAB, (BATCH, TIME))

    def ours_loss(model: nn.Module) -> torch.Tensor:
        total, count = next_token_loss(model, tokens)
        return total / count

    def peer_loss(model: nn.Module) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    for name, spec, peer, bar in peers():
        ours = spec.build()
        sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, peer)]
        assert sizes[0] == sizes[1], (name, sizes)
        row = compare(
            f"a training step of {name}", stepping(ours, ours_loss), stepping(peer, peer_loss), bar=bar, blocks=3
        )
        row.details = {"ours_tokens_per_second": BATCH * TIME / min(row.ours), "parameters": float(sizes[0])}
        yield row
