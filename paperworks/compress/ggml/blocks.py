"""ggml's block formats: short rows of values that share a scale, as stored in GGUF files (ggml project, 2023).

A block of 32 or 256 values along a row is a few bytes: one or two float16 scales and the packed integers.
`decode` reads every type the `gguf` package can read, the common ones with vectorised torch; `encode` writes
the plain types and the 32-value blocks, byte for byte like the reference.
"""

from collections.abc import Callable
from math import prod

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from paperworks.compress.ggml.encode import WRITABLE, encode
from paperworks.compress.ggml.kquants import K_DECODERS, q4_k_parts
from paperworks.compress.ggml.layouts import BLOCKS, BlockFormat, block_format

__all__ = ["BLOCKS", "WRITABLE", "BlockFormat", "block_format", "decode", "encode", "four_bit_parts"]

_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

# On a CPU a step stays below 32,768 values, the size from which torch wakes its thread pool: that costs more than
# these short memory-bound steps, and one step's temporaries then fit in the cache. A GPU wants few large steps.
_STEP_VALUES = {"cpu": 31_744}
_STEP_VALUES_ELSEWHERE = 1 << 24


def decode(
    raw: UInt8[Tensor, "*rows bytes"], type: str, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Float[Tensor, "*rows values"]:
    """Turn stored rows into numbers.

    Args:
        raw: the bytes, whole blocks along the last dimension; a view over a memory-mapped file will do.
        type: a name of `BLOCKS`.
        dtype: the floating dtype of the result; values are computed in float32 and rounded once.
        out: a contiguous tensor to fill instead of a new one, of the result's size and any floating dtype.

    Raises:
        ValueError: a type unknown here and to the gguf package, bytes that are not whole blocks, an unfit `out`.
    """
    block = block_format(type)
    if raw.dtype != torch.uint8 or raw.ndim == 0 or raw.shape[-1] % block.bytes:
        raise ValueError(
            f"{type} rows are uint8 with a multiple of {block.bytes} bytes, got {raw.dtype} of shape {tuple(raw.shape)}"
        )
    shape = (*raw.shape[:-1], raw.shape[-1] // block.bytes * block.values)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=raw.device)
    elif out.numel() != prod(shape) or not out.is_contiguous() or not out.is_floating_point():
        raise ValueError(
            f"out must be a contiguous floating tensor of {prod(shape)} values, got {out.dtype} {tuple(out.shape)}"
        )
    if out.numel():
        _decode_into(out.detach().view(-1, block.values), _aligned(raw).view(-1, block.bytes), block)
    return out


def _aligned(raw: Tensor) -> Tensor:
    """Contiguous bytes that begin on an 8-byte address, which viewing them as wider numbers needs."""
    raw = raw.contiguous()
    return raw if raw.data_ptr() % 8 == 0 and raw.storage_offset() % 8 == 0 else raw.clone()


def _decode_into(out: Tensor, blocks: Tensor, block: BlockFormat) -> None:
    if block.name in _PLAIN:
        out.copy_(blocks.view(_PLAIN[block.name]).view(-1, 1))
        return
    decoder = _DECODERS.get(block.name)
    if decoder is None:
        _decode_with_package(out, blocks, block)
        return
    step = max(1, _STEP_VALUES.get(out.device.type, _STEP_VALUES_ELSEWHERE) // block.values)
    direct = out.dtype == torch.float32
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step]
        target = out[start : start + step]
        values = target if direct else torch.empty(target.shape, dtype=torch.float32, device=out.device)
        decoder(piece, values)
        if not direct:
            target.copy_(values)


def _decode_with_package(out: Tensor, blocks: Tensor, block: BlockFormat) -> None:
    """Fill `out` through the gguf package, which knows the rarer formats and their code books."""
    import gguf

    type_id = gguf.GGMLQuantizationType(block.type_id)
    step = max(1, (1 << 22) // block.values)  # its temporaries are several times the output: 16 MiB of values a step
    for start in range(0, len(blocks), step):
        try:
            values = gguf.quants.dequantize(blocks[start : start + step].cpu().numpy(), type_id)
        except NotImplementedError as error:
            raise ValueError(
                f"{block.name} can be neither decoded here nor by the installed gguf package; "
                "a newer one (pip install --upgrade gguf) may know it"
            ) from error
        out[start : start + step].copy_(torch.from_numpy(values))


def _half_column(blocks: Tensor, index: int) -> Tensor:
    """Column `index` of the blocks read as float16 numbers, as a float32 column."""
    return blocks.view(torch.float16)[:, index : index + 1].float()


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """Element j is the low half of byte j, element j + 16 its high half."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


def _fifth_bits(packed: Tensor, out: Tensor) -> None:
    """Add 16 to element j where bit j of the four bytes is set."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts & 1).view(-1, 32)
    out.add_(bits, alpha=16)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), _half_column(blocks, 0), out=out)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half_column(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half_column(blocks, 0)).add_(_half_column(blocks, 1))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 6:], out)
    _fifth_bits(blocks[:, 2:6], out)
    out.sub_(16).mul_(_half_column(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 8:], out)
    _fifth_bits(blocks[:, 4:8], out)
    out.mul_(_half_column(blocks, 0)).add_(_half_column(blocks, 1))


def four_bit_parts(raw: UInt8[Tensor, "rows bytes"], type: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """(codes 0..15, scales, minima) of rows of which x = scale code + minimum in groups of 32; else None.

    Codes are (rows, values), the others (rows, values / 32).
    """
    if type not in _FOUR_BITS:
        return None
    parts = _FOUR_BITS[type](_aligned(raw).view(-1, block_format(type).bytes))
    codes, scales, minima = (part.reshape(len(raw), -1) for part in parts)
    return codes, scales, minima


def _q4_parts(blocks: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.cat((blocks[:, start:] & 15, blocks[:, start:] >> 4), 1)
    scale = _half_column(blocks, 0)
    return codes, scale, _half_column(blocks, 1) if start == 4 else -8 * scale


_FOUR_BITS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "Q4_0": lambda blocks: _q4_parts(blocks, 2),
    "Q4_1": lambda blocks: _q4_parts(blocks, 4),
    "Q4_K": q4_k_parts,
}

_DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    **K_DECODERS,
}
