"""Codes of 1 to 8 bits packed tightly: eight codes take as many bytes as a code has bits, each row whole bytes.

The first code of a row stands in the lowest bits. 1, 2, 4 and 8 bits divide a byte and are unpacked byte by byte; the
others (3, 5, 6, 7) are read eight codes at a time through one 64-bit word.
"""

import torch
from jaxtyping import Int, UInt8
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that a row of `count` codes takes."""
    return -(-count * bits // 8)


def pack_codes(codes: Int[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Pack codes between 0 and 2^bits - 1. Raises `ValueError` for bits outside 1..8 and codes that do not fit."""
    _check_bits(bits)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"codes of {bits} bits are 0..{2**bits - 1}, got {int(codes.min())}..{int(codes.max())}")
    rows, columns = codes.shape
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    together = 8 // bits if 8 % bits == 0 else 8  # codes that fill whole bytes
    missing = -columns % together
    padded = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    chunks = padded.reshape(rows, -1, together)
    if 8 % bits == 0:
        packed = chunks[..., 0].clone()
        for place in range(1, together):
            packed |= chunks[..., place] << (bits * place)
        return packed
    word = (chunks.long() << (bits * torch.arange(together, device=codes.device))).sum(-1)
    taken = together * bits // 8
    packed = (word[..., None] >> (8 * torch.arange(taken, device=codes.device))) & 255
    return packed.to(torch.uint8).reshape(rows, -1)[:, : packed_bytes(columns, bits)].contiguous()


def unpack_codes(packed: UInt8[Tensor, "rows bytes"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """Undo `pack_codes`; `columns` is the number of codes a row holds."""
    _check_bits(bits)
    if packed.shape[1] != packed_bytes(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits take {packed_bytes(columns, bits)} bytes a row, got {packed.shape[1]}"
        )
    rows = packed.shape[0]
    if bits == 8:
        return packed
    if 8 % bits == 0:
        codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
        return codes.reshape(rows, -1)[:, :columns]
    missing = -packed.shape[1] % bits
    padded = torch.nn.functional.pad(packed, (0, missing)) if missing else packed
    chunks = padded.reshape(rows, -1, bits).long()
    word = chunks[..., 0]
    for byte in range(1, bits):
        word = word | (chunks[..., byte] << (8 * byte))
    codes = torch.stack([((word >> (bits * place)) & (2**bits - 1)).to(torch.uint8) for place in range(8)], -1)
    return codes.reshape(rows, -1)[:, :columns]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, got {bits}")
