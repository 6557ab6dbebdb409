"""The table of ggml's types: how many values each block holds and in how many bytes (ggml project, 2023)."""

from dataclasses import dataclass

from paperworks.core.errors import unknown


@dataclass(frozen=True)
class BlockFormat:
    """One ggml type: `values` numbers are stored in `bytes` bytes; `type_id` is its number in a file."""

    name: str
    type_id: int
    values: int
    bytes: int

    @property
    def bits_per_value(self) -> float:
        """Stored bits for each value, scales included."""
        return 8 * self.bytes / self.values


BLOCKS: dict[str, BlockFormat] = {
    name: BlockFormat(name, type_id, values, size)
    for name, type_id, values, size in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("I8", 24, 1, 1),
        ("I16", 25, 1, 2),
        ("I32", 26, 1, 4),
        ("I64", 27, 1, 8),
        ("F64", 28, 1, 8),
        ("IQ1_M", 29, 256, 56),
        ("BF16", 30, 1, 2),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36),
        ("Q1_0", 41, 128, 18),
    )
}


def block_format(type: str) -> BlockFormat:
    """Look up a block format by name; raises ValueError that names the nearest known types."""
    if type not in BLOCKS:
        raise ValueError(unknown("ggml type", type, BLOCKS))
    return BLOCKS[type]
