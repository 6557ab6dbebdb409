"""FSDP2 (Zhao et al. 2023, arXiv:2304.11277): each process holds a share of weights, gradients and optimizer state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paperworks.train.distributed import distribution
from paperworks.train.distributed.rank_local import RankLocalState


def shard(model: nn.Module, device: torch.device) -> None:
    """Distribute the model's parameters over processes in place, block by block; its weights become DTensors.

    Blocks are the children of the model's module lists. Gradients are summed over processes, not averaged: the loop
    divides by the elements of all. Does nothing in one process.
    """
    if distribution.processes() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (distribution.processes(),))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for name in ("hidden", "logits", "encode"):  # entered from outside too, by losses that need less than all logits
        if callable(getattr(model, name, None)):
            register_fsdp_forward_method(model, name)


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds only a share of the tensor."""
    if not (isinstance(tensor, Tensor) and dist.is_available()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Whole tensor, gathered from all processes, which must call this together."""
    full: Any = tensor
    return full.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Part of a tensor that this process holds."""
    part: Any = tensor
    return part.to_local() if is_sharded(tensor) else tensor


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """`tensor`, distributed over processes as `pattern` is."""
    if not is_sharded(pattern) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    spread: Any = pattern
    out: Tensor = distribute_tensor(tensor.to(pattern.device), spread.device_mesh, spread.placements)
    return out


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """State of the model as whole tensors, after training with `Settings(sharded=True)` or `ParallelExperts`.

    Every process must call it; each gets all of it. Experts that others keep come on the CPU.
    """
    here = {name: whole(value).detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return RankLocalState(model).whole(here)
