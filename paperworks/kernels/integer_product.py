"""Products of int8 matrices, accumulated in int32."""

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

# 127 * 127 * inputs must stay below 2^31
MOST_INPUTS = (2**31 - 1) // 127**2
_EXACT_IN_FLOAT32 = 2**24 // 127**2  # up to this many inputs float32 adds integers without rounding


def int8_product(
    codes: Int8[Tensor, "tokens columns"], weight: Int8[Tensor, "rows columns"]
) -> Int[Tensor, "tokens rows"] | Float[Tensor, "tokens rows"]:
    """Codes weight^T exactly: by the integer kernel where there is one, else in floating point.

    Raises `ValueError` for more inputs than int32 sums can hold (133,144).
    """
    columns = codes.shape[1]
    if columns > MOST_INPUTS:
        raise ValueError(f"int32 holds sums of {MOST_INPUTS:,} products of int8, got {columns:,} inputs")
    try:
        return torch._int_mm(codes, weight.t())
    except (RuntimeError, NotImplementedError):  # shapes or devices that the kernel does not take
        wide = torch.float32 if columns <= _EXACT_IN_FLOAT32 else torch.float64
        return codes.to(wide) @ weight.to(wide).t()
