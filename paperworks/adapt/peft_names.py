"""The names of tensors in peft's files: which layer and which part of an adapter each of them is."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from paperworks.adapt.stacked import Matrices, stacked_parameters

PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"(?P<place>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(\.(?!weight$)[^.]+)?(?P<weight>\.weight)?"
)
FROZEN = "base_layer.weight"
_PAIRS = {"lora_A": "lora_B", "lora_B": "lora_A"}


def kept_whole(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of modules saved whole, by the module's path and then by their names in it.

    Args:
        tensors: of the file.
        names: `modules_to_save` of the configuration: paths or ends of paths.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(PREFIX).split(".")
        for length in range(1, len(parts)):
            place = ".".join(parts[:length])
            if place.endswith(tuple(names)):  # peft compares letters, not parts of paths
                found.setdefault(place, {})[".".join(parts[length:])] = tensor
                break
    return found


def stack_keys(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """From the places of stacked parameters in a file to their paths in the model.

    peft wraps a module once for each adapted parameter, in their order: the last is outermost, the others are below
    `base_layer`.
    """
    owners: dict[str, list[str]] = {}
    for path in stacked_parameters(model):
        if any(path == name or path.endswith(f".{name}") for name in names):
            owners.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        owner + ".base_layer" * (len(paths) - 1 - depth): path
        for owner, paths in owners.items()
        for depth, path in enumerate(paths)
    }


def tensor_keys(bases: Mapping[str, nn.Module]) -> dict[str, str]:
    """From the places of adapted layers to the places their tensors have in a file: `stack_keys` the other way."""
    keys = {place: place for place in bases}
    owners: dict[str, list[str]] = {}
    for place, base in bases.items():
        if isinstance(base, Matrices):
            owners.setdefault(place.rpartition(".")[0], []).append(place)
    for owner, places in owners.items():
        base = bases[places[0]]
        assert isinstance(base, Matrices)
        order = [name for name, _ in base.owner[0].named_parameters(recurse=False)]
        places.sort(key=lambda place: order.index(place.rpartition(".")[2]))
        for depth, place in enumerate(places):
            keys[place] = owner + ".base_layer" * (len(places) - 1 - depth)
    return keys


def layer_tensors(
    tensors: Mapping[str, Tensor], stacks: Mapping[str, str], problems: list[str]
) -> dict[str, dict[str, Tensor]]:
    """The parts of each adapted layer by its path and then by peft's names; adds what is none of them to `problems`.

    Where embeddings are adapted peft saves their frozen tables, and the unembedding's, as well: "base_layer.weight".
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        frozen = key.removesuffix(f".{FROZEN}")
        if frozen != key and (f"{frozen}.lora_B.weight" in tensors or f"{frozen}.lora_embedding_B" in tensors):
            parts.setdefault(frozen.removeprefix(PREFIX), {})[FROZEN] = tensor
            continue
        match = _TENSOR.fullmatch(key)
        part = match["part"] if match else ""
        dims = 1 if part == "lora_magnitude_vector" else 2
        if match is None or tensor.dim() != dims or not tensor.is_floating_point():
            problems.append(
                f"{key}, {tensor.dtype} of shape {tuple(tensor.shape)}, is no LoRA matrix of a linear layer"
            )
            continue
        place = match["place"].removeprefix(PREFIX)
        parts.setdefault(stacks.get(place, place), {})[part + ".weight" * (part in _PAIRS)] = tensor
    for place, held in list(parts.items()):
        for part, other in _PAIRS.items():
            if f"{part}.weight" in held and f"{other}.weight" not in held:
                problems.append(f"{place}: {other} is missing")
                del parts[place]
                break
    return parts
