"""Effort: exact at 1, and below it the slices that the vector asks for."""

import pytest
import torch

from paperworks import compress
from paperworks.compress import Effort, at_effort
from paperworks.compress.format import stored_bits

DRAWS = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(64, 48, generator=DRAWS)
X = torch.randn(5, 48, generator=DRAWS)


def naive(weight, v, effort, bucket=16):
    """One vector, by the page's description: buckets of a row of inputs, slice means, probes, a cutoff."""
    rows, columns = weight.shape
    probes = torch.tensor([abs(float(weight[i % rows, i])) for i in range(columns)])
    cutoff = (v.abs() * probes).sort(descending=True).values[int(effort * columns)]
    y = torch.zeros(rows)
    for i in range(columns):
        ordered = []
        for start in range(0, rows, bucket):
            part = weight[start : start + bucket, i]
            ordered.append([(float(part[j]), start + int(j)) for j in part.abs().argsort(descending=True)])
        for r in range(bucket):
            mean = sum(abs(entries[r][0]) for entries in ordered) / len(ordered)
            if mean * abs(v[i]) > cutoff:
                for entries in ordered:
                    y[entries[r][1]] += v[i] * entries[r][0]
    return y


@pytest.mark.parametrize("effort", [0.1, 0.4, 0.8])
def test_one_vector_is_multiplied_as_described(effort):
    format = Effort(effort=effort)
    stored = format.encode(WEIGHT)
    for v in X:
        assert torch.allclose(format.multiply(v[None], stored, (64, 48))[0], naive(WEIGHT, v, effort), atol=1e-4)
    assert torch.allclose(
        format.multiply(X.view(1, 5, 48), stored, (64, 48))[0],
        torch.stack([naive(WEIGHT, v, effort) for v in X]),
        atol=1e-4,
    )


def test_weights_come_back_and_full_effort_is_exact():
    stored = Effort().encode(WEIGHT)
    assert torch.equal(Effort().decode(stored, (64, 48)), WEIGHT)
    assert torch.equal(Effort().multiply(X, stored, (64, 48)), X @ WEIGHT.T)
    assert stored_bits(stored, (64, 48)) == Effort().bits_per_weight((64, 48))


def test_the_knob_turns_a_whole_model_and_turns_back():
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    dense = model(X)
    compress.apply(model, Effort(), "*")
    errors = []
    for share in (0.25, 0.5, 1.0):
        with at_effort(model, share), torch.no_grad():
            errors.append(float((model(X) - dense).norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    assert model[0].format == Effort()


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"effort is a share"):
        Effort(effort=0.0)
    with pytest.raises(ValueError, match="bucket must be 2 to 16"):
        Effort(bucket=32)
    with pytest.raises(ValueError, match=r"multiple of 32 outputs.*has 40; choose another bucket"):
        Effort().encode(torch.randn(40, 8))
    with pytest.raises(ValueError, match="no layer stored as Effort"), at_effort(torch.nn.Linear(2, 2), 0.5):
        pass
