"""MatMul-free LM: ternary layers and an elementwise recurrence (Zhu et al. 2024, arXiv:2406.02528)."""

from typing import Literal

from paperworks.models.block import Block
from paperworks.models.decoder import Decoder
from paperworks.nn import MLGRU, BitLinear, GatedMLP, RMSNorm


def matmul_free(
    dim: int,
    depth: int,
    *,
    vocab_size: int = 32_000,
    hidden: int | None = None,
    gate: Literal["paper", "reference"] = "paper",
) -> Decoder:
    """MatMul-free LM: MLGRU and gated MLP, every linear layer ternary, the head too; forget gates bounded from below.

    hidden: units of the gated MLP, by default 8/3 dim rounded up to a multiple of 256. The published sizes are 1024 x
    24 (370M), 2048 x 24 (1.3B) and 2560 x 32 (2.7B).
    """
    norm = RMSNorm(eps=1e-6)
    width = -(-int(8 / 3 * dim) // 256) * 256 if hidden is None else hidden
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        norm=norm,
        linear=BitLinear(),
        head=BitLinear(),
        block=Block(norm=norm, mixer=MLGRU(gate=gate, lower_bound="learned"), feedforward=GatedMLP(hidden=width)),
    )
