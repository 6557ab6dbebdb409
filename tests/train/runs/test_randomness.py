import json
import random

import numpy as np
import pytest
import torch

from paperworks.train.runs import randomness


def draws() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.randn(2).tolist()


def test_every_generator_goes_on_from_what_json_kept() -> None:
    draws()  # a gauss and a randn leave half a pair behind, which is state too
    kept = json.loads(json.dumps(randomness.to_json(randomness.capture())))
    expected = draws()
    draws()
    randomness.restore(randomness.from_json(kept))
    assert draws() == expected


def test_a_block_can_draw_without_a_trace() -> None:
    randomness.seed(3)
    expected = draws()
    randomness.seed(3)
    with pytest.raises(ZeroDivisionError), randomness.undisturbed():
        _ = draws()[0] / 0
    assert draws() == expected


def test_deterministic_kernels_are_asked_for_inside_the_block_only() -> None:
    with randomness.deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with randomness.deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()
