"""Encoder-decoder models (Vaswani et al. 2017): a sequence in, another out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.models.decoder import Decoder
from paperworks.models.encoder import Encoder
from paperworks.models.model import ModelSpec
from paperworks.nn import Cache, Placement


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(ModelSpec):
    """Source tokens (batch, source) and target tokens (batch, time) -> logits (batch, time, vocab_size).

    Attributes:
        encoder: reads the source.
        decoder: writes the target; at least one of its blocks has a `cross`.
        shared: whether both read one embedding table.
    """

    encoder: Encoder
    decoder: Decoder
    shared: bool = True

    def validate(self) -> None:
        """Check that the decoder reads the encoder, and that a shared table fits both."""
        crosses = [block.cross for block in self.decoder.distinct_blocks if block.cross is not None]
        if not crosses:
            raise ValueError(
                "Seq2Seq.decoder reads nothing: give its Block a cross=CrossAttention(heads=...) or FixedContext()"
            )
        for cross in crosses:
            width = getattr(cross, "context_dim", None) or self.decoder.dim
            if width != self.encoder.dim:
                raise ValueError(
                    f"Seq2Seq.decoder reads vectors of {width}, the encoder gives {self.encoder.dim}: "
                    f"set CrossAttention.context_dim={self.encoder.dim}"
                )
        one, other = self.encoder, self.decoder
        if self.shared and (one.vocab_size, one.dim) != (other.vocab_size, other.dim):
            raise ValueError(
                f"Seq2Seq.shared needs one table for both, but the encoder's is {one.vocab_size} x {one.dim} and the "
                f"decoder's {other.vocab_size} x {other.dim}; set shared=False"
            )

    def build(self) -> Seq2SeqModel:
        """The model with freshly drawn weights."""
        return Seq2SeqModel(self)


class Seq2SeqModel(nn.Module):
    """The module of `Seq2Seq`. Attributes: `spec`; `tokenizer`, None unless the model was loaded with one."""

    def __init__(self, spec: Seq2Seq) -> None:
        super().__init__()
        self.spec = spec
        self.tokenizer: Any = None
        self.encoder = spec.encoder.build()
        self.decoder = spec.decoder.build()
        self.tie()

    def tie(self) -> None:
        """Let parameters that are one by the spec be one tensor: after building, and after loading weights."""
        self.encoder.tie()
        if self.spec.shared:
            self.decoder.embedding.weight = self.encoder.embedding.weight
        self.decoder.tie()

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the residual streams."""
        return self.decoder.dtype

    def encode(
        self, source: Int[Tensor, "batch source"], placement: Placement | None = None
    ) -> Float[Tensor, "batch source dim"]:
        """What the decoder reads. The placement's segments are 0 at the source's padding."""
        context: Tensor = self.encoder(source, placement)
        return context

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        target: Int[Tensor, "batch time"],
        placement: Placement | None = None,
        *,
        source_placement: Placement | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of the token after each of the target's.

        Args:
            source: int64 ids of what is read; target: of what is written so far, beginning with its start token.
            placement, source_placement: where both stand; segments are 0 for padding, and in packed rows a target token
                reads the source of its segment.

        Raises:
            ValueError: as `Decoder` and `Encoder` do; for source and target of unequal batch.
        """
        if len(source) != len(target):
            raise ValueError(f"source has {len(source)} rows and target {len(target)}; they belong together row by row")
        here = (placement or Placement()).copy()
        here.context = self.encode(source, source_placement)
        here.context_segments = None if source_placement is None else source_placement.segments
        logits: Tensor = self.decoder(target, here)
        return logits

    def conditioned(
        self, source: Int[Tensor, "batch source"], placement: Placement | None = None
    ) -> ConditionedDecoder:
        """The decoder reading this source: a model that `generate` and beam search continue."""
        return ConditionedDecoder(self, source, placement)


class ConditionedDecoder(nn.Module):
    """A decoder that reads one source: `forward(tokens, placement, last=)` and `new_cache`, as decoding needs."""

    def __init__(self, model: Seq2SeqModel, source: Tensor, placement: Placement | None) -> None:
        super().__init__()
        self.decoder = model.decoder
        self.tokenizer = model.tokenizer
        self.context_segments = None if placement is None else placement.segments
        with torch.inference_mode():
            encoder, training = model.encoder, model.encoder.training
            encoder.eval()
            self.context = model.encode(source, placement)
            encoder.train(training)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.decoder.device

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache."""
        return self.decoder.new_cache(batch, capacity)

    def forward(
        self, tokens: Int[Tensor, "batch time"], placement: Placement | None = None, *, last: int | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """The decoder's logits; arguments are those of `DecoderModel.forward`.

        Raises ValueError when there are not as many rows as sources.
        """
        here = (placement or Placement()).copy()
        # the rows of a cache may have been multiplied by beam search, and it holds what was read
        if here.cache is None or here.cache.length == 0:
            if len(tokens) != len(self.context):
                raise ValueError(
                    f"there are {len(self.context)} sources and {len(tokens)} rows to write; give one a source"
                )
            here.context, here.context_segments = self.context, self.context_segments
        logits: Tensor = self.decoder(tokens, here, last=last)
        return logits
