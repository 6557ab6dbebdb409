"""ggml's block formats as weight formats: a layer can keep the bytes that a GGUF file holds."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from paperworks.compress import ggml
from paperworks.compress.format import Stored, WeightFormat, check_weight
from paperworks.errors import unknown


@dataclass(frozen=True, kw_only=True)
class GGML(WeightFormat):
    """A block format of ggml by name ("Q8_0", "Q4_0", "Q4_1", "Q6_K" ...); blocks run along rows."""

    kind: str

    def validate(self) -> None:
        """Check the name."""
        if self.kind not in ggml.BLOCKS:
            raise ValueError(unknown("ggml type", self.kind, ggml.BLOCKS))

    def encode(self, weight: Float[Tensor, "rows columns"]) -> Stored:
        """Return the raw blocks (rows, bytes a row)."""
        check_weight(weight, f"GGML(kind={self.kind!r})")
        return {"blocks": ggml.encode(weight.detach().float(), self.kind)}

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """Return the weight."""
        return ggml.decode(stored["blocks"], self.kind).view(shape)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Return the block's bytes over its values, in bits."""
        block = ggml.BLOCKS[self.kind]
        return 8 * block.bytes / block.values
