"""Entries for rotary positions: each is honoured, or refused by name."""

import pytest

from paperworks.checkpoints.families.rope import rope_config, rope_from_config
from paperworks.nn import LongRoPEScaling, RoPE, YaRNScaling

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 64}


def read(entry, **rest):
    return rope_from_config({"max_position_embeddings": 256, "rope_scaling": entry, **rest})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (YARN | {"attention_factor": 1.0}, "attention_factor=1 are not read: YaRNScaling multiplies .* 1.13863"),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "the ratio of mscale and mscale_all_dim=1 are not read"),
        (YARN | {"truncate": False}, "truncate=False is not read"),
        (YARN | {"novelty": 3}, "'yarn' with novelty=3 are not read"),
        (LONG | {"attention_factor": 1.0}, "attention_factor=1 are not read"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 4}, "'linear' with beta_fast=4 are not read"),
        ({"rope_type": "yam"}, "unknown rope_type 'yam'; did you mean .*'yarn'"),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 is not read in this family",
        ),
    ],
)
def test_entries_that_would_change_the_result_are_refused_by_name(entry, message):
    with pytest.raises(ValueError, match=message):
        read(entry)


def test_entries_that_say_what_is_computed_anyway_are_read():
    expected = RoPE(scaling=YaRNScaling(factor=4.0, trained_length=64))
    assert read(YARN) == read(YARN | {"attention_factor": 1.138629436, "truncate": True}) == expected
    assert read(YARN | {"factor": None}) == expected  # 256 / 64, as transformers computes it


def test_the_factor_of_longrope_sets_the_extension():
    assert read(LONG).scaling.extended_length == 256
    longer = read(LONG | {"factor": 8.0})
    assert longer.scaling.extended_length == 512
    assert read(rope_config(longer, 256)["rope_scaling"]) == longer


def test_dynamic_scaling_counts_from_the_context_as_transformers_does():
    entry = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    assert read(entry).scaling.trained_length == 256


def test_the_outer_trained_length_counts_first():
    assert read(LONG, original_max_position_embeddings=32).scaling.trained_length == 32


def test_positions_without_words_are_not_written():
    with pytest.raises(ValueError, match=r"rotates whole heads, the model a share of 0.5"):
        rope_config(RoPE(fraction=0.5), 64)
    with pytest.raises(ValueError, match="the positions are None"):
        rope_config(None, 64)
    scaling = LongRoPEScaling(short=(1.0,), long=(1.0,), trained_length=4, extended_length=8)
    assert rope_config(RoPE(scaling=scaling), 8)["rope_parameters"]["original_max_position_embeddings"] == 4
