"""Encoder-decoder models (Vaswani et al. 2017): a sequence in, another out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.models.decoder import Decoder
from paperworks.models.encoder import Encoder
from paperworks.nn import Cache, Spec


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Spec):
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
        crosses = [block.cross for block in dict.fromkeys(self.decoder.blocks) if block.cross is not None]
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
        """Return the model with freshly initialized weights."""
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
        self, source: Int[Tensor, "batch source"], *, segments: Int[Tensor, "batch source"] | None = None
    ) -> Float[Tensor, "batch source dim"]:
        """Return what the decoder reads. `segments` is 0 at the source's padding."""
        return self.encoder(source, segments=segments)

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        target: Int[Tensor, "batch time"],
        *,
        source_segments: Int[Tensor, "batch source"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """Return the logits of the token after each of the target's.

        Args:
            source: int64 ids of what is read; target: of what is written so far, beginning with its start token.
            source_segments, segments: 0 for padding. In packed rows a target token reads the source of its segment.

        Raises:
            ValueError: as `Decoder` and `Encoder` do; for source and target of unequal batch.
        """
        if len(source) != len(target):
            raise ValueError(f"source has {len(source)} rows and target {len(target)}; they belong together row by row")
        context = self.encode(source, segments=source_segments)
        return self.decoder(target, segments=segments, context=context, context_segments=source_segments)

    def given(
        self, source: Int[Tensor, "batch source"], *, segments: Int[Tensor, "batch source"] | None = None
    ) -> Given:
        """Return the decoder with this source before its eyes: a model that `generate` and beam search continue."""
        return Given(self, source, segments)


class Given(nn.Module):
    """A decoder that reads one source: forward(tokens, segments=, cache=, last=) and new_cache, as decoding needs."""

    def __init__(self, model: Seq2SeqModel, source: Tensor, segments: Tensor | None) -> None:
        super().__init__()
        self.decoder = model.decoder
        self.tokenizer = model.tokenizer
        self.context_segments = segments
        with torch.inference_mode():
            encoder, training = model.encoder, model.encoder.training
            encoder.eval()
            self.context = model.encode(source, segments=segments)
            encoder.train(training)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.decoder.device

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Return an empty cache."""
        return self.decoder.new_cache(batch, capacity)

    def forward(self, tokens: Int[Tensor, "batch time"], **options: Any) -> Float[Tensor, "batch time vocab"]:
        """Return the decoder's logits; options are those of `DecoderModel.forward`.

        Raises ValueError when there are not as many rows as sources.
        """
        cache = options.get("cache")
        filled = cache is not None and cache.length > 0  # its rows may have been multiplied by beam search
        if not filled and len(tokens) != len(self.context):
            raise ValueError(
                f"there are {len(self.context)} sources and {len(tokens)} rows to write; give one a source"
            )
        context = None if filled else self.context
        segments = None if filled else self.context_segments
        return self.decoder(tokens, context=context, context_segments=segments, **options)
