"""Half-precision matrix products on processors that have no instructions for them.

Where a CPU lacks them, torch multiplies bfloat16 and float16 matrices one number at a time, some hundred times slower
than float32 (benchmarks/train.py prints the rates). There the product is computed in float32 and rounded back: the
products of two halves are exact in float32, so this is what such an instruction computes, up to the order of the sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_HALVES = (torch.bfloat16, torch.float16)


@cache
def has_native_products(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of `dtype` with instructions made for it."""
    if dtype not in _HALVES:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    ops: Any = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


def products_in_float32(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside the context, compute CPU matrix products and attention of `dtype` in float32 where that is faster."""
    return nullcontext() if has_native_products(dtype) else _Wide()  # type: ignore[no-untyped-call]


class _Wide(TorchDispatchMode):
    """Lets the operations below see float32 copies of half-precision arguments, and rounds what they return."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        half = next((a.dtype for a in _tensors(args, kwargs) if a.dtype in _HALVES and a.device.type == "cpu"), None)
        if half is None:
            return func(*args, **kwargs)
        out = func(*(_widen(a) for a in args), **{name: _widen(a) for name, a in kwargs.items()})
        if func in _ATTENTION:  # (output, log-sum-exp) or the gradients: the statistics stay float32
            return tuple(_narrow(each, half) if each.dim() == 4 else each for each in out)
        return _narrow(out, half)


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    yield from (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)


_aten: Any = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
_PRODUCTS = _ATTENTION | {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
