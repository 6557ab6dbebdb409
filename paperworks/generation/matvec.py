"""Matrix-vector products at the speed of memory: what decoding spends its time on.

On a CPU torch multiplies a float32 matrix by one vector on one thread, which reads memory at half the machine's rate.
The same product as a batch of row blocks, one a thread, uses them all, on the same storage and without a copy
(benchmarks/decode.py prints both rates). Half-precision matrices are read fast for one vector, but where the processor
has no instructions for their products (see `nn.half_precision`) several vectors are multiplied in float32 and rounded.
Layers that are stored in four bits are multiplied without being decoded, in bfloat16 (see `compress.packed`).
Everything else (devices, many rows, gradients, subclasses) takes torch's path.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.compress.linear import CompressedLinear
from paperworks.kernels.half_precision import has_native_products
from paperworks.kernels.packed import Packed, pack

MOST_ROWS = 16  # beyond this torch's blocked matrix product is the faster one
_HALVES = (torch.float16, torch.bfloat16)


def product(x: Float[Tensor, "rows columns"], weight: Float[Tensor, "out columns"], blocks: int) -> Tensor:
    """x weight^T, computed as `blocks` products with equal blocks of the weight's rows."""
    parts = weight.view(blocks, -1, weight.shape[1])
    out = torch.bmm(parts, x.t().expand(blocks, -1, -1))
    return out.view(1, -1) if x.shape[0] == 1 else out.flatten(0, 1).t().contiguous()


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Let the plain linear layers of `model` use the faster products inside the context; hooks see the same."""
    swapped: list[nn.Module] = []
    for module in model.modules():
        if "forward" in vars(module):
            continue
        forward = None
        if type(module) is nn.Linear and _suits(module.weight):
            forward = _forward(module)
        elif isinstance(module, CompressedLinear):
            forward = _packed(module)
        if forward is not None:
            module.forward = forward
            swapped.append(module)
    try:
        yield
    finally:
        for module in swapped:
            vars(module).pop("forward", None)


def _suits(weight: Tensor) -> bool:
    if weight.device.type != "cpu":
        return False
    return weight.dtype == torch.float32 or (weight.dtype in _HALVES and not has_native_products(weight.dtype))


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    return _float32(module) if module.weight.dtype == torch.float32 else _half(module)


def _float32(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    blocks, columns = torch.get_num_threads(), module.in_features
    if blocks == 1 or module.out_features % blocks or not module.weight.is_contiguous():
        return lambda x: F.linear(x, module.weight, module.bias)

    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        rows = x.numel() // columns
        if rows > MOST_ROWS or x.dtype != weight.dtype or torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        out = product(x.reshape(rows, columns), weight, blocks).view(*x.shape[:-1], -1)
        return out if bias is None else out.add_(bias)

    return forward


def _packed(module: CompressedLinear) -> Callable[[Tensor], Tensor] | None:
    """A forward pass from four-bit codes, for a layer in bfloat16 on a CPU; None where there is no kernel for it."""
    if module.compute_dtype != torch.bfloat16 or next(iter(module.stored.values())).device.type != "cpu":
        return None
    if any(tensor.requires_grad for tensor in module.stored.values()):
        return None
    packed = _packed_once(module)
    if packed is None:
        return None
    usual = module.forward

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // module.in_features
        if rows > MOST_ROWS or x.dtype != torch.bfloat16 or torch.is_grad_enabled():
            return usual(x)
        out = packed(x.reshape(rows, -1)).view(*x.shape[:-1], -1)
        return out if module.bias is None else out.add_(module.bias.to(out.dtype))

    return forward


# Laying codes out takes seconds for a whole model, so it is done once a layer and kept as long as the layer: 4 bits a
# weight more (8 for codebooks). Another weight in the layer means other tensors, or other versions of them; the tensors
# themselves are kept for the comparison, for an address may be used again.
_KEPT: WeakKeyDictionary[CompressedLinear, tuple[list[tuple[Tensor, int]], Packed | None]] = WeakKeyDictionary()


def _packed_once(module: CompressedLinear) -> Packed | None:
    stored = list(module.stored.values())
    known = _KEPT.get(module)
    if known is not None and len(known[0]) == len(stored):
        pairs = zip(known[0], stored, strict=True)
        if all(before is now and version == now._version for (before, version), now in pairs):
            return known[1]
    grids = module.format.grids(module.stored, module.shape)
    packed = None if grids is None else pack(grids)
    _KEPT[module] = ([(tensor, tensor._version) for tensor in stored], packed)
    return packed


def _half(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if x.numel() == x.shape[-1] or torch.is_grad_enabled() or x.dtype not in _HALVES:
            return F.linear(x, weight, bias)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    return forward
