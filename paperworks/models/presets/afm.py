"""Apple's on-device foundation model (Gunter et al. 2024, arXiv:2407.21075)."""

from paperworks.models.block import Block
from paperworks.models.decoder import Decoder
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE


def afm(
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    *,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab_size: int = 49_152,
    context: int = 4096,
    base: float = 500_000.0,
) -> Decoder:
    """AFM: tied embeddings, RMSNorm before each part and on queries and keys, 8 key-value heads, SwiGLU, RoPE.

    AFM-on-device is 3072 wide, 26 layers deep, with 24 query heads of 128 channels. Its feed-forward width is not
    printed; 8032 gives the 2.58 billion parameters besides the embedding that are.
    """
    norm = RMSNorm(eps=1e-5)
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        context=context,
        tied=True,
        norm=norm,
        block=Block(
            norm=norm,
            mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=norm, position=RoPE(base=base)),
            feedforward=GatedMLP(hidden=hidden),
        ),
    )


def afm_on_device() -> Decoder:
    """AFM-on-device: 2.58 billion parameters besides 0.15 billion of the embedding."""
    return afm(3072, 26, 24, 8032)
