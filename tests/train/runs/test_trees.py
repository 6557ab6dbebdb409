import json

import pytest
import torch

from paperworks.train.runs import trees


def test_nested_states_come_back_as_they_were() -> None:
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "history": [torch.ones(2), (1, "a", None)]}, "0": torch.zeros(1)},
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "large": float("inf"),
        "__tensor__": "a key of the caller's own",
    }
    tensors: dict[str, torch.Tensor] = {}
    back = trees.unflatten(json.loads(json.dumps(trees.flatten(tree, "t", tensors))), tensors)
    assert str(back) == str(tree)
    assert len(tensors) == 3  # also of the keys 0 and "0", which read alike


def test_what_only_pickle_could_save_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"t\.a\.0 is a set, which cannot be saved without pickle"):
        trees.flatten({"a": [{1, 2}]}, "t", {})


def test_stored_tensors_share_no_memory_and_keep_their_values() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "same": base, "row": base[1], "turned": base.T, "none": torch.empty(0, 3)}
    stored = trees.storable(tensors)
    assert all(torch.equal(stored[name], tensors[name]) and stored[name].is_contiguous() for name in tensors)
    pointers = [tensor.data_ptr() for tensor in stored.values() if tensor.numel()]
    assert len(set(pointers)) == len(pointers)
