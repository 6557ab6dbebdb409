"""OpenELM: heads and hidden units grow from the first layer to the last (Mehta et al. 2024, arXiv:2404.14619)."""

from paperworks.models.block import Block
from paperworks.models.decoder import Decoder
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE


def scaled_block(
    dim: int,
    share: float,
    *,
    head_dim: int,
    attention: tuple[float, float] = (0.5, 1.0),
    feedforward: tuple[float, float] = (0.5, 4.0),
    grouping: int = 4,
    divisor: int = 256,
) -> Block:
    """The layer that stands at `share` of the depth, 0 the first and 1 the last: layer-wise scaling.

    Args:
        head_dim: channels of a head; the number of heads is what is scaled.
        attention: width of all query heads over dim, in the first and the last layer; in between linear, rounded to
            2 decimals as in the released configurations.
        feedforward: hidden units over dim, likewise.
        grouping: query heads that share a key-value head.
        divisor: what the number of hidden units is a multiple of.
    """
    width = attention[0] + (attention[1] - attention[0]) * share
    hidden = feedforward[0] + (feedforward[1] - feedforward[0]) * share
    heads = _divisible(round(width, 2) * dim, head_dim * grouping) // head_dim
    return Block(
        norm=RMSNorm(eps=1e-6),
        mixer=Attention(
            heads=heads,
            kv_heads=heads // grouping,
            head_dim=head_dim,
            qk_norm=RMSNorm(eps=1e-6),
            position=RoPE(base=10_000.0),
        ),
        feedforward=GatedMLP(hidden=_divisible(round(hidden, 2) * dim, divisor)),
    )


def openelm(
    dim: int,
    depth: int,
    head_dim: int,
    *,
    vocab_size: int = 32_000,
    context: int = 2048,
    attention: tuple[float, float] = (0.5, 1.0),
    feedforward: tuple[float, float] = (0.5, 4.0),
    grouping: int = 4,
    divisor: int = 256,
) -> Decoder:
    """OpenELM: Llama's parts with norms on queries and keys, every layer of its own size (see `scaled_block`), tied."""
    if depth < 2:
        raise ValueError(f"layer-wise scaling goes from a first to a last layer: depth 2 or more, got {depth}")
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        context=context,
        tied=True,
        norm=RMSNorm(eps=1e-6),
        block=tuple(
            scaled_block(
                dim,
                layer / (depth - 1),
                head_dim=head_dim,
                attention=attention,
                feedforward=feedforward,
                grouping=grouping,
                divisor=divisor,
            )
            for layer in range(depth)
        ),
    )


def _divisible(value: float, divisor: int) -> int:
    """Round to the nearest multiple, at least one, and at least 90% of the value."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor
