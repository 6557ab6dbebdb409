"""The residual block: a mixer and a feed-forward part around one stream, in the four published arrangements."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from paperworks.nn import Feedforward, Mixer, Norm, Spec, Stream


@dataclass(frozen=True, kw_only=True)
class Block(Spec):
    """One layer.

    Attributes:
        norm: the norm before (or after) each part.
        mixer: what moves information along time.
        feedforward: what works on each position; None for a block that only mixes.
        arrangement: where the norms stand:
            "pre": x + f(norm(x)) (GPT-2, Llama); "post": norm(x + f(x)) (the original Transformer);
            "parallel": x + mixer(norm1(x)) + feedforward(norm2(x)) (GPT-NeoX); "sandwich": x + norm2(f(norm1(x)))
            (Gemma 2).
        shared_norm: in a parallel block, whether both parts read one norm (GPT-J).
        dropout: the share of each part's output dropped in training.
    """

    norm: Norm
    mixer: Mixer
    feedforward: Feedforward | None = None
    arrangement: Literal["pre", "post", "parallel", "sandwich"] = "pre"
    shared_norm: bool = False
    dropout: float = 0.0

    def validate(self) -> None:
        """Check that the options fit the arrangement."""
        if self.shared_norm and self.arrangement != "parallel":
            raise ValueError(f"Block.shared_norm needs arrangement='parallel', got {self.arrangement!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Block.dropout must be in [0, 1), got {self.dropout}")

    def build(self, dim: int) -> nn.Module:
        """Return the module for a residual stream of `dim` numbers."""
        return BlockModule(dim, self)


class BlockModule(nn.Module):
    """The module of `Block`; its output is the residual stream after it."""

    def __init__(self, dim: int, spec: Block) -> None:
        super().__init__()
        sandwich = spec.arrangement == "sandwich"
        self.arrangement = spec.arrangement
        self.mixer_norm = spec.norm.build(dim)
        self.mixer = spec.mixer.build(dim)
        self.mixer_post_norm = spec.norm.build(dim) if sandwich else None
        has_feedforward = spec.feedforward is not None
        self.feedforward_norm = spec.norm.build(dim) if has_feedforward and not spec.shared_norm else None
        self.feedforward = spec.feedforward.build(dim) if spec.feedforward is not None else None
        self.feedforward_post_norm = spec.norm.build(dim) if sandwich and has_feedforward else None
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Float[Tensor, "batch time dim"], stream: Stream) -> Float[Tensor, "batch time dim"]:
        """Return the residual stream after this block."""
        if self.arrangement == "parallel":
            mixed = self.mixer_norm(x)
            out = x + self.dropout(self.mixer(mixed, stream))
            if self.feedforward is None:
                return out
            return out + self.dropout(self.feedforward(self.feedforward_norm(x) if self.feedforward_norm else mixed))
        if self.arrangement == "post":
            x = self.mixer_norm(x + self.dropout(self.mixer(x, stream)))
            if self.feedforward is None or self.feedforward_norm is None:
                return x
            return self.feedforward_norm(x + self.dropout(self.feedforward(x)))
        mixed = self.mixer(self.mixer_norm(x), stream)
        if self.mixer_post_norm is not None:
            mixed = self.mixer_post_norm(mixed)
        x = x + self.dropout(mixed)
        if self.feedforward is None or self.feedforward_norm is None:
            return x
        fed = self.feedforward(self.feedforward_norm(x))
        if self.feedforward_post_norm is not None:
            fed = self.feedforward_post_norm(fed)
        return x + self.dropout(fed)
