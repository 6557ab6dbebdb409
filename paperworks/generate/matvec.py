"""Matrix-vector products at the speed of memory: what decoding spends its time on.

On a CPU the product of a float32 matrix with one or a few vectors through torch reads memory at about half the rate
that NumPy's BLAS reaches on the same storage (benchmarks/decode.py prints both), so decoding hands these products to
NumPy, without a copy. Everything else (other dtypes, devices, many rows, gradients, subclasses) takes torch's path.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_ROWS = 16  # beyond this torch's blocked matrix product is the faster one


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch on one thread inside the context: two pools of spinning threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[bool]:
    """Let the plain linear layers of `model` use NumPy's products inside the context; hooks see what they always see.

    Gives whether any layer does; then small steps should run inside `one_torch_thread`.
    """
    swapped = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and _suits(module.weight) and "forward" not in vars(module)
    ]
    for module in swapped:
        module.forward = _forward(module)  # type: ignore[method-assign, assignment]
    try:
        yield bool(swapped)
    finally:
        for module in swapped:
            vars(module).pop("forward", None)


def _suits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight, module.bias
    matrix, storage = weight.detach().numpy().T, weight.data_ptr()

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows > MOST_ROWS or x.dtype != torch.float32 or torch.is_grad_enabled() or module.weight is not weight:
            return F.linear(x, module.weight, module.bias)
        if weight.data_ptr() != storage:  # the storage was swapped under the parameter (.data = ...)
            return F.linear(x, weight, bias)
        out = torch.from_numpy(x.reshape(rows, -1).numpy() @ matrix).view(*x.shape[:-1], -1)
        return out if bias is None else out.add_(bias)

    return forward
