import dataclasses
import json

import pytest

from paperworks.models import Decoder, preset
from paperworks.models.presets.families import presets
from paperworks.nn import Attention, GatedMLP, RMSNorm, RoPE, Spec


@pytest.mark.parametrize("name", presets())
def test_presets_round_trip_through_json(name):
    spec = preset(name)
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_specs_are_values():
    assert Attention(heads=4) == Attention(heads=4)
    assert len({Attention(heads=4), Attention(heads=4), Attention(heads=2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        RMSNorm().eps = 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(heads="8"), "Attention.heads must be int, got '8'"),
        (lambda: Attention(heads=True), "Attention.heads must be int"),
        (lambda: Attention(heads=8, kv_heads=3), r"must divide heads \(8\), got 3; possible: \[1, 2, 4, 8\]"),
        (lambda: Attention(heads=0), "at least 1"),
        (lambda: Attention(heads=4, head_dim=7, position=RoPE()), "pairs of channels"),
        (lambda: Attention(heads=4, window=0), "a token sees itself"),
        (lambda: GatedMLP(hidden=8, activation="gelo"), "one of 'relu', 'gelu'"),
        (lambda: RMSNorm(fraction=0.0), r"in \(0, 1\]"),
        (lambda: RoPE(layout="quarter"), "one of 'half', 'interleaved'"),
    ],
)
def test_wrong_values_fail_at_construction_and_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Atention"}, "did you mean 'Attention'"),
        ({"headz": 3}, "unknown field of Attention 'headz'; did you mean 'heads'"),
        ({"heads": [4]}, "Attention.heads must be int"),
        ({"type": None}, "unknown spec type"),
    ],
)
def test_wrong_json_says_what_is_wrong(change, message):
    data = Attention(heads=4).to_dict() | change
    with pytest.raises(ValueError, match=message):
        Spec.from_dict(data)


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="heads"):
        Spec.from_dict({"type": "Attention"})


def test_hostile_nesting_is_refused():
    data = {"type": "RMSNorm"}
    for _ in range(400):
        data = {"type": "RoPE", "scaling": data}
    with pytest.raises(ValueError, match="nests at most"):
        Spec.from_dict(data)


def test_a_spec_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="expected the description of a Decoder, got RMSNorm"):
        Decoder.from_dict(RMSNorm().to_dict())
