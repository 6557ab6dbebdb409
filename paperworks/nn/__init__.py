"""Parts of networks, each a spec that builds a module: attention, positions, norms, feed-forward."""

from paperworks.core.selection import select, select_linears
from paperworks.core.spec import Spec
from paperworks.nn.attention.attention import Attention
from paperworks.nn.attention.cross import CrossAttention
from paperworks.nn.attention.memory_efficient import memory_efficient_attention
from paperworks.nn.attention.reference.tree import TreeAttention
from paperworks.nn.convolution.gated_recursive import GRConv
from paperworks.nn.convolution.short import ShortConvolution
from paperworks.nn.feedforward.experts.local import LocalExperts
from paperworks.nn.feedforward.experts.mixture import Experts
from paperworks.nn.feedforward.experts.parallel import ParallelExperts
from paperworks.nn.feedforward.experts.routers import NoisyTopKRouter, Router, TopKRouter
from paperworks.nn.feedforward.maxout import Maxout
from paperworks.nn.feedforward.mlp import MLP, Feedforward, GatedMLP
from paperworks.nn.identity_norm import NoNorm
from paperworks.nn.linear_kind import LinearKind
from paperworks.nn.mixer import Mixer
from paperworks.nn.mixture_density import StrokeDensity, StrokeMixture
from paperworks.nn.norm import LayerNorm, Norm, RMSNorm
from paperworks.nn.placement import Cache, MixerCache, Placement
from paperworks.nn.position.absolute import AbsolutePositions, LearnedPositions, SinusoidalPositions
from paperworks.nn.position.paired import PairedPositions, TargetPlacement
from paperworks.nn.position.relative import ALiBi, RelativeBuckets, RelativePosition, RelativeVectors
from paperworks.nn.position.rotary import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    RoPE,
    RoPEScaling,
    Rotary,
    YaRNScaling,
)
from paperworks.nn.recurrent.classic import GRU, LSTM, Elman
from paperworks.nn.recurrent.fixed_context import FixedContext
from paperworks.nn.recurrent.mamba import Mamba
from paperworks.nn.recurrent.mlgru import MLGRU
from paperworks.nn.recurrent.rwkv import RWKV, RWKVChannelMix
from paperworks.nn.recurrent.s4 import S4
from paperworks.nn.recurrent.ttt import TTT
from paperworks.nn.recurrent.xlstm import MLSTM, SLSTM
from paperworks.nn.tap import Tap
from paperworks.nn.ternary import BitLinear

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
    "Placement",
    "RMSNorm",
    "RWKVChannelMix",
    "RelativeBuckets",
    "RelativePosition",
    "RelativeVectors",
    "RoPE",
    "RoPEScaling",
    "Rotary",
    "Router",
    "ShortConvolution",
    "SinusoidalPositions",
    "Spec",
    "StrokeDensity",
    "StrokeMixture",
    "Tap",
    "TargetPlacement",
    "TopKRouter",
    "TreeAttention",
    "YaRNScaling",
    "memory_efficient_attention",
    "select",
    "select_linears",
]
