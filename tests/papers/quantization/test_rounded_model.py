import copy

import pytest
import torch

from paperworks import compress
from paperworks.lab import Lab
from paperworks.papers.quantization import _rounded_model
from paperworks.papers.quantization._calibrated_layers import ENERGY, calibrated_layers, energy_lost

FINE, COARSE = compress.Uniform(bits=8, group=64), compress.Uniform(bits=2, group=64)


@pytest.fixture(scope="module")
def bed():
    return _rounded_model.bench(Lab("smoke"))


def test_a_seed_always_draws_the_same_texts_and_another_seed_others(bed):
    assert torch.equal(bed.texts(3), bed.texts(3))
    assert not torch.equal(bed.texts(3), bed.texts(4))
    assert bed.texts(3).shape == (bed.scored, bed.length)


def test_no_text_to_calibrate_with_is_scored():
    for scored, calibrated in zip(_rounded_model._texts(True), _rounded_model._texts(False), strict=True):
        pieces = {scored[start : start + 200] for start in range(0, len(scored) - 200, 200)}
        assert len(pieces) > 50
        assert not any(piece in calibrated for piece in pieces)


def test_rounding_a_copy_leaves_the_model_as_it_was(bed):
    before = copy.deepcopy(bed.model.state_dict())
    rounded = bed.rounded(COARSE, 0)
    assert all(torch.equal(value, bed.model.state_dict()[name]) for name, value in before.items())
    changed = [name for name, value in rounded.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["blocks.0.mixer.query.weight"]


def test_a_format_that_does_not_calibrate_is_encoded_once_and_its_copies_are_apart(bed):
    first, second = bed.rounded(COARSE, 0), bed.rounded(COARSE, 1)
    weights = [model.get_parameter("blocks.0.mixer.query.weight") for model in (first, second)]
    assert torch.equal(*weights)
    weights[0].data.zero_()
    assert weights[1].any()


def test_a_format_that_calibrates_depends_on_the_seed(bed):
    format = compress.GPTQ(bits=2, group=64)
    weights = [bed.rounded(format, seed).get_parameter("blocks.0.mixer.query.weight") for seed in (0, 1)]
    assert not torch.equal(*weights)


def test_the_model_as_loaded_loses_nothing(bed):
    assert bed.numbers(bed.model, 0)["nats lost"] == 0


def test_fewer_bits_lose_more_of_the_outputs_energy(bed):
    fine, coarse = (energy_lost(bed, format)(0)[ENERGY] for format in (FINE, COARSE))
    assert 0 < fine < 0.01 < coarse < 1


def test_the_energy_lost_is_that_of_the_outputs_on_the_calibration_text(bed):
    (layer,) = calibrated_layers(bed, 0)
    inputs = []
    query = bed.model.blocks[0].mixer.query
    hook = query.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for window in bed.calibration(0):
            bed.model(window)
    hook.remove()
    x = torch.cat(inputs)
    rounded = COARSE.decode(COARSE.encode(layer.weight), layer.weight.shape)
    error, whole = ((weight @ x.T).square().sum() for weight in (rounded - layer.weight, layer.weight))
    # sums of some 10^5 float32 products
    assert layer.loss(rounded) == pytest.approx(float(error / whole), rel=1e-4)
