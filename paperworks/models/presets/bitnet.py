"""BitNet b1.58: Llama's parts with ternary linear layers (Ma et al. 2024, arXiv:2402.17764)."""

from paperworks.models.block import Block
from paperworks.models.decoder import Decoder
from paperworks.nn import Attention, BitLinear, GatedMLP, RMSNorm, RoPE


def bitnet(dim: int, depth: int, heads: int, hidden: int, *, vocab_size: int = 32_000, context: int = 2048) -> Decoder:
    """BitNet b1.58: RMSNorm, SwiGLU, rotary positions, no biases; embedding and head in high precision.

    Every ternary layer normalizes its inputs; the published sizes are 1536 x 24 (0.7B), 2048 x 24 (1.3B) and
    3200 x 26 (3B).
    """
    norm = RMSNorm(eps=1e-5)
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        context=context,
        norm=norm,
        linear=BitLinear(),
        block=Block(norm=norm, mixer=Attention(heads=heads, position=RoPE()), feedforward=GatedMLP(hidden=hidden)),
    )
