"""One of each mixer, for the tests that hold all of them to the contract. A new mixer needs a line here."""

from paperworks.nn import (
    RWKV,
    ALiBi,
    Attention,
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    Mamba,
    NTKScaling,
    RelativeBuckets,
    RelativeVectors,
    RMSNorm,
    RoPE,
    RWKVChannelMix,
    YaRNScaling,
)

MIXERS = {
    "plain": Attention(heads=4),
    "rotary": Attention(heads=4, position=RoPE()),
    "interleaved": Attention(heads=4, position=RoPE(layout="interleaved", fraction=0.5)),
    "grouped": Attention(heads=4, kv_heads=2, position=RoPE(), bias=True),
    "multi-query": Attention(heads=4, kv_heads=1, head_dim=6, position=RoPE()),
    "window": Attention(heads=4, kv_heads=2, position=RoPE(), window=5),
    "window of one": Attention(heads=2, window=1),
    "capped": Attention(heads=4, kv_heads=2, position=RoPE(), soft_cap=3.0, scale=0.7),
    "capped window": Attention(heads=4, window=4, soft_cap=3.0),
    "normed": Attention(heads=4, position=RoPE(), qk_norm=RMSNorm()),
    "linear": Attention(heads=4, position=RoPE(scaling=LinearScaling(factor=2.0))),
    "ntk": Attention(heads=4, position=RoPE(scaling=NTKScaling(factor=2.0))),
    "dynamic": Attention(heads=4, position=RoPE(scaling=DynamicNTKScaling(factor=2.0, trained_length=6))),
    "yarn": Attention(heads=4, position=RoPE(scaling=YaRNScaling(factor=4.0, trained_length=16))),
    "llama3": Attention(heads=4, position=RoPE(scaling=Llama3Scaling(trained_length=16))),
    "alibi": Attention(heads=4, kv_heads=2, position=ALiBi()),
    "alibi window": Attention(heads=3, head_dim=4, window=5, position=ALiBi()),
    "buckets": Attention(heads=4, kv_heads=2, position=RelativeBuckets(buckets=8, max_distance=12)),
    "buckets apart": Attention(heads=4, position=RelativeBuckets(buckets=8, max_distance=12, shared=False)),
    "relative": Attention(heads=4, kv_heads=2, position=RelativeVectors(reach=3)),
    "mamba": Mamba(state=3, rank=2),
    "mamba constant": Mamba(state=3, width=2, selective=False),
    "rwkv": RWKV(),
    "rwkv channels": RWKVChannelMix(hidden=24),
    "relative window": Attention(heads=4, window=4, position=RelativeVectors(reach=2, values=False)),
}

# The frequencies of "dynamic" depend on the length of the row, padding and neighbours included, by definition.
LENGTH_FREE = [name for name in MIXERS if name != "dynamic"]
