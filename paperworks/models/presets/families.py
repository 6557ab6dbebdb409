"""Named architectures with their published sizes."""

import fnmatch
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, overload

from paperworks.core.errors import unknown
from paperworks.models.arrangement import Parallel, Sandwich
from paperworks.models.block import Block
from paperworks.models.decoder import Decoder
from paperworks.models.presets.afm import afm_on_device
from paperworks.models.presets.bitnet import bitnet
from paperworks.models.presets.gpt import bloom, gpt1, gpt2, gpt3
from paperworks.models.presets.matmul_free import matmul_free
from paperworks.models.presets.openelm import openelm
from paperworks.models.presets.t5 import switch, t5
from paperworks.models.seq2seq import Seq2Seq
from paperworks.nn import (
    MLP,
    RWKV,
    Attention,
    GatedMLP,
    LayerNorm,
    Llama3Scaling,
    Mamba,
    RMSNorm,
    RoPE,
    RWKVChannelMix,
)


def llama(
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int = 32_000,
    context: int = 2048,
    rope: RoPE = RoPE(),  # noqa: B008  (frozen)
    eps: float = 1e-6,
    window: int | None = None,
    bias: bool = False,
    tied: bool = False,
) -> Decoder:
    """Llama (Touvron et al. 2023, arXiv:2302.13971) and the models that changed only its numbers."""
    norm = RMSNorm(eps=eps)
    mixer = Attention(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=rope, window=window, bias=bias, output_bias=False
    )
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        context=context,
        tied=tied,
        norm=norm,
        block=Block(norm=norm, mixer=mixer, feedforward=GatedMLP(hidden=hidden)),
    )


def llama3(
    dim: int, depth: int, heads: int, hidden: int, *, factor: float | None = None, tied: bool = False
) -> Decoder:
    """Llama 3 (arXiv:2407.21783): 8 key-value heads, base 500,000; 3.1 and 3.2 stretch the context by `factor`."""
    return llama(
        dim,
        depth,
        heads,
        hidden,
        kv_heads=8,
        vocab_size=128_256,
        eps=1e-5,
        tied=tied,
        context=8192 if factor is None else 131_072,
        rope=RoPE(base=500_000.0, scaling=None if factor is None else Llama3Scaling(factor=factor)),
    )


def gemma(dim: int, depth: int, heads: int, kv_heads: int, hidden: int) -> Decoder:
    """Gemma (arXiv:2403.08295): heads of 256, GeGLU, (1 + gain) norms, embeddings times sqrt(dim)."""
    norm = RMSNorm(eps=1e-6, offset=True)
    return Decoder(
        vocab_size=256_000,
        dim=dim,
        depth=depth,
        context=8192,
        tied=True,
        embedding_scale=dim**0.5,
        norm=norm,
        block=Block(
            norm=norm,
            mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=256, position=RoPE()),
            feedforward=GatedMLP(hidden=hidden, activation="gelu_tanh"),
        ),
    )


def gemma2(
    dim: int, depth: int, heads: int, kv_heads: int, hidden: int, *, head_dim: int = 256, scale: float = 256**-0.5
) -> Decoder:
    """Gemma 2 (arXiv:2408.00118): sandwich norms, soft-capped scores and logits, every other layer a 4096 window."""
    base = gemma(dim, depth, heads, kv_heads, hidden)
    assert isinstance(base.block, Block)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=RoPE(), soft_cap=50.0, scale=scale)
    full = replace(base.block, arrangement=Sandwich(), mixer=mixer)
    local = replace(full, mixer=replace(mixer, window=4096))
    blocks = tuple(full if layer % 2 else local for layer in range(depth))
    return replace(base, block=blocks, logit_soft_cap=30.0)


def pythia(dim: int, depth: int, heads: int, vocab_size: int = 50_304) -> Decoder:
    """Pythia (Biderman et al. 2023, arXiv:2304.01373): GPT-NeoX blocks, parallel, a quarter of each head rotated."""
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        context=2048,
        norm=LayerNorm(),
        block=Block(
            norm=LayerNorm(),
            arrangement=Parallel(),
            mixer=Attention(heads=heads, bias=True, position=RoPE(fraction=0.25)),
            feedforward=MLP(hidden=4 * dim, activation="gelu"),
        ),
    )


def mamba(dim: int, depth: int) -> Decoder:
    """Mamba (Gu & Dao 2023, arXiv:2312.00752): one mixer a block and nothing else; tied, GPT-NeoX's vocabulary."""
    norm = RMSNorm(eps=1e-5)
    block = Block(norm=norm, mixer=Mamba())
    return Decoder(vocab_size=50_280, dim=dim, depth=depth, tied=True, norm=norm, block=block)


def rwkv4(dim: int, layers: int, vocab_size: int = 50_277) -> Decoder:
    """RWKV-4 (Peng et al. 2023, arXiv:2305.13048): a layer is two blocks, time mixing and channel mixing."""
    norm = LayerNorm()
    mixing = Block(norm=norm, mixer=RWKV()), Block(norm=norm, mixer=RWKVChannelMix())
    return Decoder(
        vocab_size=vocab_size,
        dim=dim,
        depth=2 * layers,
        block=mixing * layers,
        norm=norm,
        embedding_norm=norm,
        embedding_std=1e-4,
    )


def _qwen2(dim: int, depth: int, heads: int, kv_heads: int, hidden: int, vocab_size: int, tied: bool) -> Decoder:
    rope = RoPE(base=1_000_000.0)
    return llama(
        dim, depth, heads, hidden,
        kv_heads=kv_heads, vocab_size=vocab_size, context=131_072, rope=rope, eps=1e-6, bias=True, tied=tied,
    )  # fmt: skip


def _smollm2(dim: int, depth: int, heads: int, kv_heads: int, hidden: int, base: float) -> Decoder:
    return llama(
        dim, depth, heads, hidden,
        kv_heads=kv_heads, vocab_size=49_152, context=8192, rope=RoPE(base=base), eps=1e-5, tied=True,
    )  # fmt: skip


_PRESETS: dict[str, Callable[[], Decoder | Seq2Seq]] = {
    "nano": lambda: llama(128, 4, 4, 352, vocab_size=256, context=512, eps=1e-5, tied=True),  # to try things with
    "gpt1": gpt1,
    "gpt2": lambda: gpt2(768, 12, 12),
    "gpt2-medium": lambda: gpt2(1024, 24, 16),
    "gpt2-large": lambda: gpt2(1280, 36, 20),
    "gpt2-xl": lambda: gpt2(1600, 48, 25),
    # Table 2.1, but for two misprints: XL has 1.32 billion parameters with 16 heads, not 24, and 13B 12.85 billion with
    # a width of 5120, not 5140
    "gpt3-small": lambda: gpt3(768, 12, 12, 64),
    "gpt3-medium": lambda: gpt3(1024, 24, 16, 64),
    "gpt3-large": lambda: gpt3(1536, 24, 16, 96),
    "gpt3-xl": lambda: gpt3(2048, 24, 16, 128),
    "gpt3-2.7b": lambda: gpt3(2560, 32, 32, 80),
    "gpt3-6.7b": lambda: gpt3(4096, 32, 32, 128),
    "gpt3-13b": lambda: gpt3(5120, 40, 40, 128),
    "gpt3-175b": lambda: gpt3(12_288, 96, 96, 128),
    "openelm-270m": lambda: openelm(1280, 16, 64),
    "openelm-450m": lambda: openelm(1536, 20, 64),
    "openelm-1.1b": lambda: openelm(2048, 28, 64),
    "openelm-3b": lambda: openelm(3072, 36, 128),
    "llama-7b": lambda: llama(4096, 32, 32, 11_008),
    "llama-13b": lambda: llama(5120, 40, 40, 13_824),
    "llama-33b": lambda: llama(6656, 60, 52, 17_920),
    "llama-65b": lambda: llama(8192, 80, 64, 22_016),
    "llama2-7b": lambda: llama(4096, 32, 32, 11_008, context=4096, eps=1e-5),
    "llama2-13b": lambda: llama(5120, 40, 40, 13_824, context=4096, eps=1e-5),
    "llama2-70b": lambda: llama(8192, 80, 64, 28_672, kv_heads=8, context=4096, eps=1e-5),
    "llama3-8b": lambda: llama3(4096, 32, 32, 14_336),
    "llama3-70b": lambda: llama3(8192, 80, 64, 28_672),
    "llama3.1-8b": lambda: llama3(4096, 32, 32, 14_336, factor=8.0),
    "llama3.1-70b": lambda: llama3(8192, 80, 64, 28_672, factor=8.0),
    "llama3.1-405b": lambda: llama3(16_384, 126, 128, 53_248, factor=8.0),
    "llama3.2-1b": lambda: llama3(2048, 16, 32, 8192, factor=32.0, tied=True),
    "llama3.2-3b": lambda: llama3(3072, 28, 24, 8192, factor=32.0, tied=True),
    "mistral-7b": lambda: llama(4096, 32, 32, 14_336, kv_heads=8, context=32_768, eps=1e-5, window=4096),
    "qwen2-0.5b": lambda: _qwen2(896, 24, 14, 2, 4864, 151_936, True),
    "qwen2-1.5b": lambda: _qwen2(1536, 28, 12, 2, 8960, 151_936, True),
    "qwen2-7b": lambda: _qwen2(3584, 28, 28, 4, 18_944, 152_064, False),
    "qwen2-72b": lambda: _qwen2(8192, 80, 64, 8, 29_568, 152_064, False),
    "smollm2-135m": lambda: _smollm2(576, 30, 9, 3, 1536, 100_000.0),
    "smollm2-360m": lambda: _smollm2(960, 32, 15, 5, 2560, 100_000.0),
    "smollm2-1.7b": lambda: _smollm2(2048, 24, 32, 32, 8192, 130_000.0),
    "gemma-2b": lambda: gemma(2048, 18, 8, 1, 16_384),
    "gemma-7b": lambda: gemma(3072, 28, 16, 16, 24_576),
    "gemma2-2b": lambda: gemma2(2304, 26, 8, 4, 9216),
    "gemma2-9b": lambda: gemma2(3584, 42, 16, 8, 14_336),
    "gemma2-27b": lambda: gemma2(4608, 46, 32, 16, 36_864, head_dim=128, scale=144**-0.5),
    "phi3-mini": lambda: llama(3072, 32, 32, 8192, vocab_size=32_064, context=4096, eps=1e-5, window=2047),
    "phi3-medium": lambda: llama(
        5120, 40, 40, 17_920, kv_heads=10, vocab_size=32_064, context=4096, eps=1e-5, window=2047
    ),
    "pythia-14m": lambda: pythia(128, 6, 4),
    "pythia-70m": lambda: pythia(512, 6, 8),
    "pythia-160m": lambda: pythia(768, 12, 12),
    "pythia-410m": lambda: pythia(1024, 24, 16),
    "pythia-1b": lambda: pythia(2048, 16, 8),
    "pythia-1.4b": lambda: pythia(2048, 24, 16),
    "pythia-2.8b": lambda: pythia(2560, 32, 32),
    "pythia-6.9b": lambda: pythia(4096, 32, 32, vocab_size=50_432),
    "mamba-130m": lambda: mamba(768, 24),
    "mamba-370m": lambda: mamba(1024, 48),
    "mamba-790m": lambda: mamba(1536, 48),
    "mamba-1.4b": lambda: mamba(2048, 48),
    "mamba-2.8b": lambda: mamba(2560, 64),
    "rwkv4-169m": lambda: rwkv4(768, 12),
    "rwkv4-430m": lambda: rwkv4(1024, 24),
    "rwkv4-1.5b": lambda: rwkv4(2048, 24),
    "rwkv4-3b": lambda: rwkv4(2560, 32),
    "rwkv4-7b": lambda: rwkv4(4096, 32),
    "rwkv4-14b": lambda: rwkv4(5120, 40),
    "t5-small": lambda: t5(512, 2048, 6, 8),
    "t5-base": lambda: t5(768, 3072, 12, 12),
    "t5-large": lambda: t5(1024, 4096, 24, 16),
    "t5-3b": lambda: t5(1024, 16_384, 24, 32, 128),
    "t5-11b": lambda: t5(1024, 65_536, 24, 128, 128),
    "afm-on-device": afm_on_device,
    "bitnet-b1.58-0.7b": lambda: bitnet(1536, 24, 16, 4096),
    "bitnet-b1.58-1.3b": lambda: bitnet(2048, 24, 32, 5460),
    "bitnet-b1.58-3b": lambda: bitnet(3200, 26, 32, 8640),
    "matmul-free-370m": lambda: matmul_free(1024, 24),
    "matmul-free-1.3b": lambda: matmul_free(2048, 24),
    "matmul-free-2.7b": lambda: matmul_free(2560, 32),
    "switch-base-8": lambda: switch(768, 3072, 12, 12, experts=8),
    "switch-base-128": lambda: switch(768, 3072, 12, 12, experts=128),
    "bloom-560m": lambda: bloom(1024, 24, 16),
    "bloom-7b1": lambda: bloom(4096, 30, 32),
    "bloom-176b": lambda: bloom(14_336, 70, 112),
    "pythia-12b": lambda: pythia(5120, 36, 40, vocab_size=50_688),
}


_Seq2SeqName = Literal["t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b", "switch-base-8", "switch-base-128"]


def presets(pattern: str = "*") -> list[str]:
    """The names that match a glob pattern, in the order of the table: `presets("llama*")`."""
    return [name for name in _PRESETS if fnmatch.fnmatch(name, pattern)]


@overload
def preset(name: _Seq2SeqName) -> Seq2Seq: ...  # type: ignore[overload-overlap]
@overload
def preset(name: str) -> Decoder: ...
def preset(name: str) -> Decoder | Seq2Seq:
    """The spec of a named architecture. Raises `ValueError` with the nearest names if there is none."""
    if name not in _PRESETS:
        raise ValueError(unknown("preset", name, _PRESETS))
    return _PRESETS[name]()
