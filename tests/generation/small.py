"""A small model of characters, shared by the tests of this folder."""

import torch

from paperworks.models import Block, Decoder
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE

VOCAB = 128


class Letters:
    """A tokenizer of ASCII characters, with the interface that generate asks for."""

    stop_ids = (0,)
    chat_template = None
    vocab_size = VOCAB

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def stream(self):
        return self

    def push(self, token):
        return chr(token)

    def finish(self):
        return ""


def build(**changes):
    torch.manual_seed(0)
    mixer = Attention(heads=2, kv_heads=1, position=RoPE(), window=6)
    block = Block(norm=RMSNorm(), mixer=mixer, feedforward=GatedMLP(hidden=24))
    spec = Decoder(
        **{"vocab_size": VOCAB, "dim": 16, "depth": 2, "block": block, "norm": RMSNorm(), "init_std": 0.5, **changes}
    )
    model = spec.build()
    model.tokenizer = Letters()
    return model


def reference(model, prompt, count):
    """Greedy decoding with a full forward pass for each token."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat((tokens, model.eval()(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[0, len(prompt) :].tolist()
