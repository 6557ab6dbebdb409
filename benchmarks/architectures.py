"""One pretraining step of each architecture beside transformers' model of the same shapes: forward, backward, AdamW."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from benchmarks.measure import Row, compare
from paperworks.checkpoints import from_transformers
from paperworks.models import Block, Decoder, Encoder, Seq2Seq
from paperworks.models.presets.families import llama, mamba, rwkv4
from paperworks.nn import Experts, GatedMLP
from paperworks.train import next_token_loss

VOCAB, DIM, DEPTH, BATCH = 2048, 256, 4, 4
TIME, SHORT = 256, 64  # short: peers whose fallback loops over tokens


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


def peers() -> Iterator[tuple[str, Decoder | Encoder | Seq2Seq, nn.Module, float, int]]:
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
        SHORT,
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
        SHORT,
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
        TIME,
    )  # fmt: skip
    config = transformers.OpenAIGPTConfig(
        vocab_size=VOCAB, n_positions=TIME, n_embd=DIM, n_layer=DEPTH, n_head=8, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    yield from _read("GPT", transformers.OpenAIGPTLMHeadModel(config))
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=DIM, d_kv=32, d_ff=4 * DIM, num_layers=DEPTH, num_heads=8, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    yield from _read("T5", transformers.T5ForConditionalGeneration(config))
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=8, intermediate_size=4 * DIM,
        max_position_embeddings=TIME, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    yield from _read("BERT", transformers.BertModel(config))


def _read(name: str, peer: nn.Module) -> Iterator[tuple[str, Decoder | Encoder | Seq2Seq, nn.Module, float, int]]:
    """Yield the spec that a peer's own configuration is read as."""
    yield name, from_transformers(peer).spec, peer, 1.0, TIME


def run() -> Iterator[Row]:
    for name, spec, peer, bar, time in peers():
        tokens = torch.randint(1, VOCAB, (BATCH, time))
        ours = spec.build()
        sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, peer)]
        assert sizes[0] == sizes[1], (name, sizes)
        mine, theirs = losses(spec, tokens)
        row = compare(f"a training step of {name}", stepping(ours, mine), stepping(peer, theirs), bar=bar, blocks=5)
        row.details = {"ours_tokens_per_second": BATCH * time / min(row.ours), "parameters": float(sizes[0])}
        yield row


Loss = Callable[[nn.Module], torch.Tensor]


def losses(spec: Decoder | Encoder | Seq2Seq, tokens: torch.Tensor) -> tuple[Loss, Loss]:
    """Return our loss and the peer's: next tokens, targets given a source, or any number made of all hidden states."""
    if isinstance(spec, Encoder):
        return (
            lambda model: model(tokens).square().mean(),
            lambda model: model(tokens).last_hidden_state.square().mean(),
        )
    if isinstance(spec, Seq2Seq):
        shifted = torch.nn.functional.pad(tokens[:, :-1], (1, 0))

        def written(model: nn.Module) -> torch.Tensor:
            logits = model(tokens, shifted)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

        return written, lambda model: model(input_ids=tokens, labels=tokens).loss

    def followed(model: nn.Module) -> torch.Tensor:
        total, count = next_token_loss(model, tokens)
        return total / count

    return followed, lambda model: model(input_ids=tokens, labels=tokens).loss
