"""More tokens for a trained model: start, delimiter, extract, and whatever else a task marks its parts with."""

from __future__ import annotations

from dataclasses import replace

import torch

from paperworks.models.decoder import DecoderModel
from paperworks.models.surgery.rebuilding import rebuilt, require_plain


@torch.no_grad()
def with_more_tokens(model: DecoderModel, count: int, *, std: float | None = None) -> DecoderModel:
    """The model with `count` more token ids after its own; the given model is left as it is.

    Embeddings of the new tokens (and their rows of an untied unembedding) are drawn from N(0, std^2), `init_std` where
    None; all other weights are copied.
    Raises ValueError for a count below 1, TypeError for a model with adapters or compressed weights.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 new token, got {count}")
    require_plain(model)
    spec = replace(model.spec, vocab_size=model.spec.vocab_size + count)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = torch.empty(count, spec.dim, device=model.device, dtype=model.dtype)
    fresh.normal_(0.0, (spec.embedding_std or spec.init_std) if std is None else std)
    state["embedding.weight"] = torch.cat((state["embedding.weight"], fresh))
    rows = fresh if spec.tied else torch.empty_like(fresh).normal_(0.0, spec.init_std if std is None else std)
    state["unembedding.weight"] = torch.cat((state["unembedding.weight"], rows))
    return rebuilt(model, spec, state)
