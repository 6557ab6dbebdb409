"""Where torch has one kernel for a whole optimizer step."""

import torch

from paperworks.train.optim.optimizer import ParameterGroups

# Since torch 2.9; on a CPU they take a seventh of the time of the default (30M parameters).
FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
FUSED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def has_fused_kernels(groups: ParameterGroups) -> bool:
    """Whether the fused kernels take every parameter of the groups."""
    parameters = (parameter for group in groups for parameter in group["params"])
    return all(p.device.type in FUSED_DEVICES and p.dtype in FUSED_DTYPES for p in parameters)
