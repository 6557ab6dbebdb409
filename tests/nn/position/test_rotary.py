import math

import pytest
import torch

from paperworks.nn import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    Placement,
    RoPE,
    YaRNScaling,
)

LAYOUTS = ["half", "interleaved"]


def rotate(rope, x, position):
    cos, sin = rope.table(torch.tensor([[position]]), x.shape[-1], 0, x.dtype)
    return rope.rotate(x[None, None, None], cos, sin)[0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_scores_depend_on_relative_position_only(layout):
    rope = RoPE(layout=layout)
    query, key = torch.randn(2, 32, dtype=torch.float64)
    scores = [rotate(rope, query, 7 + shift) @ rotate(rope, key, 3 + shift) for shift in (0, 1, 50, 900)]
    assert max(abs(score - scores[0]) for score in scores) < 1e-3  # angles are float32: 900 * 6e-8 radians a channel
    assert abs(rotate(rope, query, 8) @ rotate(rope, key, 3) - scores[0]) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_is_the_papers_matrix(layout):
    dim, position = 8, 5
    x = torch.randn(dim, dtype=torch.float64)
    expected = torch.empty_like(x)
    for i in range(dim // 2):
        first, second = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + dim // 2)
        angle = position * 10_000 ** (-2 * i / dim)
        expected[first] = x[first] * math.cos(angle) - x[second] * math.sin(angle)
        expected[second] = x[first] * math.sin(angle) + x[second] * math.cos(angle)
    assert (rotate(RoPE(layout=layout), x, position) - expected).abs().max() < 1e-6  # float32 angles


def test_rotations_keep_norms_start_at_the_identity_and_compose():
    rope, x = RoPE(), torch.randn(16, dtype=torch.float64)
    assert torch.equal(rotate(rope, x, 0), x)
    assert abs(rotate(rope, x, 77).norm() - x.norm()) < 1e-6
    assert (rotate(rope, rotate(rope, x, 3), 4) - rotate(rope, x, 7)).abs().max() < 1e-6


def test_layouts_agree_after_permuting_channels():
    x = torch.randn(16, dtype=torch.float64)
    halves = torch.cat((x[0::2], x[1::2]))
    turned = rotate(RoPE(layout="interleaved"), x, 9)
    assert (torch.cat((turned[0::2], turned[1::2])) - rotate(RoPE(), halves, 9)).abs().max() < 1e-12


def test_only_the_asked_fraction_is_rotated():
    placement = Placement().resolve(1, 6, torch.device("cpu"))
    rope = RoPE(fraction=0.25)
    cos, sin = rope.tables(placement, 16, torch.float64)
    x = torch.randn(1, 2, 6, 16, dtype=torch.float64)
    turned = rope.rotate(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.allclose(turned[..., 1:, :4], x[..., 1:, :4])


@pytest.mark.parity
@pytest.mark.parametrize("length", [16, 64, 300])
def test_scalings_equal_transformers(length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    short, long = tuple(1 + 0.1 * i for i in range(16)), tuple(1.0 + i for i in range(16))
    cases = {
        "linear": ({"factor": 4.0}, LinearScaling(factor=4.0)),
        "dynamic": ({"factor": 4.0}, DynamicNTKScaling(factor=4.0, trained_length=64)),
        "yarn": (
            {"factor": 4.0, "original_max_position_embeddings": 64},
            YaRNScaling(factor=4.0, trained_length=64),
        ),
        "llama3": (
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            Llama3Scaling(trained_length=64),
        ),
        "longrope": (
            {
                "factor": 4.0,
                "short_factor": list(short),
                "long_factor": list(long),
                "original_max_position_embeddings": 64,
            },
            LongRoPEScaling(short=short, long=long, trained_length=64, extended_length=256),
        ),
    }
    for kind, (entry, scaling) in cases.items():
        config = LlamaConfig(
            hidden_size=128,
            num_attention_heads=4,
            max_position_embeddings=256 if "original_max_position_embeddings" in entry else 64,
            rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **entry},
        )
        expected, amplitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
        found = scaling.frequencies(RoPE(), 32, length)
        assert torch.allclose(found, expected, rtol=1e-6, atol=0), kind  # float32 rounding
        assert abs(scaling.amplitude() - amplitude) < 1e-12, kind


def test_ntk_keeps_the_fastest_frequency_and_divides_the_slowest_by_the_factor():
    plain, scaled = RoPE().unscaled(64), NTKScaling(factor=4.0).frequencies(RoPE(), 64, 0)
    assert scaled[0] == plain[0]
    assert torch.isclose(scaled[-1], plain[-1] / 4, rtol=1e-5)


def test_llama3_rule_is_continuous_at_both_cut_offs():
    """Catalogue, llama3: wavelengths 2048 and 8192."""
    for wavelength in (2048.0, 8192.0):
        sides = []
        for side in (0.9999, 1.0001):
            base = wavelength * side / (2 * math.pi)  # the second pair's wavelength is 2 pi base^(2/4) in dim 4
            rope = RoPE(base=base**2)
            sides.append(float(Llama3Scaling().frequencies(rope, 4, 0)[1] / rope.unscaled(4)[1]))
        assert abs(sides[0] - sides[1]) < 1e-3


def test_angles_are_exact_at_large_positions_in_half_precision():
    cos, _ = RoPE().table(torch.tensor([[8191]]), 64, 0, torch.bfloat16)
    exact = torch.cos(8191 * RoPE().unscaled(64).double())
    assert (cos[0, 0, 0, :32].double() - exact).abs().max() < 5e-3  # bfloat16 keeps 8 bits; angles 5e-4 in float32


def test_odd_rotations_are_refused():
    with pytest.raises(ValueError, match="pairs of channels"):
        RoPE(fraction=0.3).rotated(10)
