"""Bidirectional encoders (BERT, T5's first half), and the heads that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.models.tokens import TokenStack, TokenStackModel
from paperworks.nn import Norm, Placement
from paperworks.nn.feedforward.mlp import ACTIVATIONS, Activation

Pooling = Literal["first", "mean", "max", "last"]


@dataclass(frozen=True, kw_only=True)
class Encoder(TokenStack):
    """Tokens (batch, time) -> vectors (batch, time, dim), each token seeing all others of its segment.

    Attributes:
        token_types: kinds of tokens that get a vector of their own (BERT's two sentences); 0 for none.
        pooler: whether there is a `Pooler`, which makes one vector of the first token's.

    All others are those of `TokenStack` and `Stack`. The mixers must not be causal.
    """

    token_types: int = 0
    pooler: bool = False

    def validate(self) -> None:
        """Check sizes, and that blocks look both ways."""
        super().validate()
        if self.token_types < 0:
            raise ValueError(f"Encoder.token_types must be at least 0, got {self.token_types}")
        for block in self.distinct_blocks:
            if getattr(block.mixer, "causal", False):
                raise ValueError("an encoder's tokens see those after them: give its Attention causal=False")

    def build(self) -> EncoderModel:
        """The model with freshly drawn weights."""
        return cast(EncoderModel, EncoderModel(self).initialized())


class EncoderModel(TokenStackModel):
    """The module of `Encoder`. Attributes: `spec`; `tokenizer`, None unless the model was loaded with one."""

    spec: Encoder

    def __init__(self, spec: Encoder) -> None:
        super().__init__(spec)
        self.token_type = nn.Embedding(spec.token_types, spec.dim) if spec.token_types else None
        self.pooler = Pooler(spec.dim) if spec.pooler else None

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        placement: Placement | None = None,
        *,
        token_types: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """One vector a token.

        Args:
            tokens: int64 ids.
            placement: tokens see each other only where its `segments` agree; 0 is padding, `segments_of(lengths)`
                makes them. None: no padding.
            token_types: which kind each token is, from 0; None means kind 0 everywhere.

        Raises:
            ValueError: for a wrong dtype or shape, an id or kind outside its table, or a sequence beyond the context.
        """
        here = self.place(tokens, placement)
        return self.run_blocks(self._embed(tokens, token_types, here), here)

    def _embed(self, tokens: Tensor, token_types: Tensor | None, placement: Placement) -> Tensor:
        if self.token_type is None:
            if token_types is not None:
                raise ValueError("this encoder knows no token types (Encoder.token_types is 0); leave them out")
            return self.embed(tokens, placement)
        kinds = torch.zeros_like(tokens) if token_types is None else token_types
        if kinds.shape != tokens.shape:
            raise ValueError(f"token_types must have the tokens' shape {tuple(tokens.shape)}, got {tuple(kinds.shape)}")
        if kinds.device.type == "cpu" and (int(kinds.min()) < 0 or int(kinds.max()) >= self.spec.token_types):
            raise ValueError(f"token type {int(kinds.max())} is outside the {self.spec.token_types} there are, from 0")
        return self.embed(tokens, placement, self.token_type(kinds))


def segments_of(lengths: Int[Tensor, " batch"], time: int | None = None) -> Int[Tensor, "batch time"]:
    """1 for the first `lengths` tokens of each row and 0 for the padding after them."""
    longest = int(lengths.max()) if time is None else time
    return (torch.arange(longest, device=lengths.device) < lengths[:, None]).long()


def pool(
    hidden: Float[Tensor, "batch time dim"],
    segments: Int[Tensor, "batch time"] | None = None,
    by: Pooling = "mean",
) -> Float[Tensor, "batch dim"]:
    """One vector a row: the first token's, the last real token's, or the mean or maximum of its real tokens.

    Raises ValueError for an unknown pooling, or a row that is all padding.
    """
    if by not in get_args(Pooling):
        raise ValueError(unknown("pooling", str(by), get_args(Pooling)))
    real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if segments is None else segments > 0
    if not bool(real.any(1).all()):
        row = int((~real.any(1)).nonzero()[0])
        raise ValueError(f"row {row} is all padding: it has no vector; leave it out")
    rows = torch.arange(len(hidden), device=hidden.device)
    if by == "first":
        return hidden[rows, real.int().argmax(1)]
    if by == "last":
        return hidden[rows, hidden.shape[1] - 1 - real.flip(1).int().argmax(1)]
    if by == "max":
        return hidden.masked_fill(~real[..., None], -torch.inf).amax(1)
    return (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)


class Pooler(nn.Module):
    """tanh(W h_first + b): BERT's sentence vector. (batch, time, dim) -> (batch, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    def forward(
        self, hidden: Float[Tensor, "batch time dim"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """The vector of each row."""
        return torch.tanh(self.dense(pool(hidden, segments, "first")))


class MaskedLMHead(nn.Module):
    """BERT's: logits = norm(gelu(W h + b)) E^T + bias, E the encoder's embedding (tied).

    (..., dim) -> (..., vocab), so the chosen positions alone may be handed in.
    """

    def __init__(self, encoder: EncoderModel, norm: Norm, activation: Activation = "gelu") -> None:
        super().__init__()
        dim, vocab = encoder.spec.dim, encoder.spec.vocab_size
        self.dense = nn.Linear(dim, dim)
        self.norm = norm.build(dim)
        self.activation = ACTIVATIONS[activation]
        self.unembedding = nn.Linear(dim, vocab)
        self.unembedding.weight = encoder.embedding.weight
        with torch.no_grad():
            self.dense.weight.normal_(0.0, encoder.spec.init_std)
            self.dense.bias.zero_()
            self.unembedding.bias.zero_()

    def forward(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """The logits of the token that stands at each of these places."""
        out: Tensor = self.unembedding(self.norm(self.activation(self.dense(hidden))))
        return out
