"""Nested states (an optimizer's, a data loader's) as JSON with their tensors apart: what safetensors can hold."""

from typing import Any

import torch
from torch import Tensor

TENSOR, TUPLE, ITEMS = "__tensor__", "__tuple__", "__items__"


def flatten(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """`tree` as JSON values; its tensors are put into `tensors`, under names that start with `prefix`.

    Raises TypeError for a value that is neither a tensor, a container of such, nor a JSON value.
    """
    if isinstance(tree, Tensor):
        while prefix in tensors:  # keys such as 1 and "1" read alike in a name
            prefix += "'"
        tensors[prefix] = tree
        return {TENSOR: prefix}
    if isinstance(tree, dict):
        pairs = {key: flatten(value, f"{prefix}.{key}", tensors) for key, value in tree.items()}
        if all(isinstance(key, str) for key in pairs) and not pairs.keys() & {TENSOR, TUPLE, ITEMS}:
            return pairs
        return {ITEMS: [[flatten(key, f"{prefix}.key", tensors), value] for key, value in pairs.items()]}
    if isinstance(tree, tuple | list):
        members = [flatten(value, f"{prefix}.{index}", tensors) for index, value in enumerate(tree)]
        return {TUPLE: members} if isinstance(tree, tuple) else members
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(
        f"{prefix} is a {type(tree).__name__}, which cannot be saved without pickle; keep tensors, numbers, strings, "
        "lists, tuples and dictionaries in states"
    )


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested state that `flatten` took apart."""
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if TENSOR in tree:
        return tensors[tree[TENSOR]]
    if TUPLE in tree:
        return tuple(unflatten(value, tensors) for value in tree[TUPLE])
    if ITEMS in tree:
        return {unflatten(key, tensors): unflatten(value, tensors) for key, value in tree[ITEMS]}
    return {key: unflatten(value, tensors) for key, value in tree.items()}


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: detached, on the CPU, contiguous, no two sharing memory."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        pointer = plain.untyped_storage().data_ptr()
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        if pointer in seen or not whole:
            plain = plain.clone(memory_format=torch.contiguous_format)
        seen.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    return stored
