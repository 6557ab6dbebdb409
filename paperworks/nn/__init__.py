"""Parts of networks, each a spec that builds a module: attention, positions, norms, feed-forward."""

from paperworks.nn.absolute import AbsolutePositions, LearnedPositions, PairedPositions, SinusoidalPositions
from paperworks.nn.attention import Attention
from paperworks.nn.cross_attention import CrossAttention
from paperworks.nn.expert_parallel import ParallelExperts
from paperworks.nn.experts import Experts
from paperworks.nn.feedforward import MLP, Feedforward, GatedMLP
from paperworks.nn.fixed_context import FixedContext
from paperworks.nn.grconv import GRConv
from paperworks.nn.identity_norm import NoNorm
from paperworks.nn.local_experts import LocalExperts
from paperworks.nn.mamba import Mamba
from paperworks.nn.maxout import Maxout
from paperworks.nn.memory_efficient import memory_efficient_attention
from paperworks.nn.mixer import Mixer
from paperworks.nn.mixture_density import StrokeDensity, StrokeMixture
from paperworks.nn.mlgru import MLGRU
from paperworks.nn.norm import LayerNorm, Norm, RMSNorm
from paperworks.nn.position import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    RoPE,
    RoPEScaling,
    YaRNScaling,
)
from paperworks.nn.recurrent import GRU, LSTM, Elman
from paperworks.nn.relative import ALiBi, RelativeBuckets, RelativePosition, RelativeVectors
from paperworks.nn.routers import NoisyTopKRouter, Router, TopKRouter
from paperworks.nn.rwkv import RWKV, RWKVChannelMix
from paperworks.nn.s4 import S4
from paperworks.nn.selection import select, select_linears
from paperworks.nn.short_convolution import ShortConvolution
from paperworks.nn.spec import Spec
from paperworks.nn.stream import Cache, MixerCache, Stream, open_stream
from paperworks.nn.tap import Tap
from paperworks.nn.ternary import BitLinear, LinearKind
from paperworks.nn.tree_attention import TreeAttention
from paperworks.nn.ttt import TTT
from paperworks.nn.xlstm import MLSTM, SLSTM

__all__ = [
    "GRU",
    "LSTM",
    "MLGRU",
    "MLP",
    "MLSTM",
    "RWKV",
    "S4",
    "SLSTM",
    "TTT",
    "ALiBi",
    "AbsolutePositions",
    "Attention",
    "BitLinear",
    "Cache",
    "CrossAttention",
    "DynamicNTKScaling",
    "Elman",
    "Experts",
    "Feedforward",
    "FixedContext",
    "GRConv",
    "GatedMLP",
    "LayerNorm",
    "LearnedPositions",
    "LinearKind",
    "LinearScaling",
    "Llama3Scaling",
    "LocalExperts",
    "LongRoPEScaling",
    "Mamba",
    "Maxout",
    "Mixer",
    "MixerCache",
    "NTKScaling",
    "NoNorm",
    "NoisyTopKRouter",
    "Norm",
    "PairedPositions",
    "ParallelExperts",
    "RMSNorm",
    "RWKVChannelMix",
    "RelativeBuckets",
    "RelativePosition",
    "RelativeVectors",
    "RoPE",
    "RoPEScaling",
    "Router",
    "ShortConvolution",
    "SinusoidalPositions",
    "Spec",
    "Stream",
    "StrokeDensity",
    "StrokeMixture",
    "Tap",
    "TopKRouter",
    "TreeAttention",
    "YaRNScaling",
    "memory_efficient_attention",
    "open_stream",
    "select",
    "select_linears",
]
