"""Additive quantization: vectors as sums of one entry of each codebook; the search for codes and for values.

A matrix is What_ij = s_i sum_m C_m[b_ijm] in groups j of g columns. What is minimised is tr(E H E^T), E = What - W,
with a second moment H of the inputs; for H = I it is the plain squared error. All functions are pure.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_SAMPLE = 64  # vectors a centre that k-means looks at: more move the centres no further than the noise of the start
_CHUNK = 2048  # vectors compared with all entries at once: the products stay in the processor's cache


def reconstruct(
    codes: Int[Tensor, "rows groups codebooks"],
    codebooks: Float[Tensor, "codebooks entries group"],
    scales: Float[Tensor, " rows"],
) -> Float[Tensor, "rows columns"]:
    """The weight W-hat of additive codes; differentiable in the codebooks and the scales."""
    rows, groups, count = codes.shape
    total = codebooks[0].index_select(0, codes[..., 0].reshape(-1))
    for book in range(1, count):
        total = total + codebooks[book].index_select(0, codes[..., book].reshape(-1))
    return total.view(rows, groups * codebooks.shape[2]) * scales[:, None]


def nearest_entry(
    vectors: Float[Tensor, "vectors group"], book: Float[Tensor, "entries group"]
) -> Int[Tensor, " vectors"]:
    """The index of the entry nearest to each vector."""
    half = book.square().sum(1) / 2
    return torch.cat([(chunk @ book.T - half).max(1).indices for chunk in vectors.split(_CHUNK)])


def k_means(
    vectors: Float[Tensor, "vectors group"], entries: int, iterations: int, draws: torch.Generator
) -> Float[Tensor, "entries group"]:
    """Centres by Lloyd's iterations from vectors drawn at random; a centre without members moves to one."""
    if len(vectors) > _SAMPLE * entries:
        vectors = vectors[torch.randperm(len(vectors), generator=draws)[: _SAMPLE * entries].to(vectors.device)]
    order = torch.randperm(len(vectors), generator=draws).to(vectors.device)
    centres = vectors[order[torch.arange(entries, device=vectors.device) % len(vectors)]].clone()
    for _ in range(iterations):
        nearest = nearest_entry(vectors, centres)
        counts = torch.bincount(nearest, minlength=entries)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], centres)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty) and entries < len(vectors):
            far = (vectors - centres[nearest]).square().sum(1).topk(min(len(empty), len(vectors))).indices
            centres[empty[: len(far)]] = vectors[far]
    return centres


def cluster(
    vectors: Float[Tensor, "vectors group"], count: int, entries: int, iterations: int, draws: torch.Generator
) -> tuple[Float[Tensor, "codebooks entries group"], Int[Tensor, "vectors codebooks"]]:
    """Residual k-means: each codebook is fitted to what those before it leave over."""
    books, codes = [], []
    for _ in range(count):
        books.append(k_means(vectors, entries, iterations, draws))
        codes.append(nearest_entry(vectors, books[-1]))
        vectors = vectors - books[-1][codes[-1]]
    return torch.stack(books), torch.stack(codes, 1)


def tune_values(
    weight: Float[Tensor, "rows columns"],
    moment: Float[Tensor, "columns columns"],
    codebooks: Float[Tensor, "codebooks entries group"],
    scales: Float[Tensor, " rows"],
    codes: Int[Tensor, "rows groups codebooks"],
    steps: int,
    lr: float,
    state: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Adam (betas 0 and 0.95, AMSGrad) on codebooks and scales; return them, and the loss at the start.

    The gradient of the quadratic loss is written out: 2 E H, one product of matrices a step. `state` carries the second
    moments from one call to the next. The best values met are returned, so the loss never rises.
    """
    state = {} if state is None else state
    values = {"codebooks": codebooks.clone(), "scales": scales.clone()}
    best, least, first = (codebooks, scales), float("inf"), float("inf")
    for step in range(steps + 1):
        unit = reconstruct(codes, values["codebooks"], torch.ones_like(scales))
        error = unit * values["scales"][:, None] - weight
        slope = error @ moment
        loss = float((slope * error).sum())
        first = loss if step == 0 else first
        if loss < least:
            best, least = (values["codebooks"].clone(), values["scales"].clone()), loss
        if step == steps:
            break
        gradients = {
            "codebooks": _entry_gradients(slope * values["scales"][:, None], codes, values["codebooks"]),
            # relative to the scale, so that one learning rate suits rows of any size
            "scales": (slope * unit).sum(1) * values["scales"],
        }
        state["step"] = state.get("step", torch.zeros(())) + 1
        for name, gradient in gradients.items():
            square = state[name] = state.get(name, torch.zeros_like(gradient)) * 0.95 + 0.05 * gradient.square()
            square = square / (1 - 0.95 ** state["step"])
            largest = state[name + " max"] = torch.maximum(state.get(name + " max", square), square)
            move = lr * gradient / (largest.sqrt() + 1e-12)
            values[name] -= move * values["scales"] if name == "scales" else move
    return *best, first


def _entry_gradients(slope: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sum, for each entry, of the slopes of all groups that use it."""
    out = torch.zeros_like(codebooks)
    flat = slope.reshape(-1, codebooks.shape[2])
    for book in range(len(codebooks)):
        out[book].index_add_(0, codes[..., book].reshape(-1), flat)
    return out


def beam_search(
    weight: Float[Tensor, "rows columns"],
    moment: Float[Tensor, "columns columns"],
    codebooks: Float[Tensor, "codebooks entries group"],
    scales: Float[Tensor, " rows"],
    codes: Int[Tensor, "rows groups codebooks"],
    beam: int = 1,
) -> Int[Tensor, "rows groups codebooks"]:
    """Go through the groups and codebooks once; keep the `beam` best sets of codes of each row. The loss never rises.

    Replacing a vector by c changes the loss of a row by 2 d.(E H)_j + d H_jj d^T, d = s_i (c - old): computed for all
    entries and rows as one product of matrices.
    """
    rows, groups, count = codes.shape
    size = codebooks.shape[2]
    kept = 1
    held = codes.long()[None].clone()  # (kept, rows, groups, codebooks)
    error = (reconstruct(codes, codebooks, scales) - weight)[None]  # (kept, rows, columns)
    losses = ((error @ moment) * error).sum(-1)
    for group in range(groups):
        block = slice(group * size, (group + 1) * size)
        curvature = moment[block, block]
        slope = error @ moment[:, block]  # (kept, rows, size)
        for book in range(count):
            entries = codebooks[book]
            old = entries[held[..., group, book]]
            # d = s (c - old): 2 s c.(slope - s H old) + s^2 c H c, and the terms without c
            toward = slope - scales[:, None] * (old @ curvature)
            bend = ((entries @ curvature) * entries).sum(1)
            fixed = scales**2 * ((old @ curvature) * old).sum(-1) - 2 * scales * (slope * old).sum(-1)
            change = 2 * scales[:, None] * (toward @ entries.T) + scales[:, None] ** 2 * bend + fixed[..., None]
            total = (losses[..., None] + change).movedim(0, 1).reshape(rows, -1)  # (rows, kept x entries)
            if beam == 1:
                losses, chosen = total.min(1)
                losses, chosen = losses[None], chosen[None]
            else:
                losses, chosen = (x.T for x in total.topk(min(beam, total.shape[1]), 1, largest=False))
            parent, entry = chosen // len(entries), chosen % len(entries)
            row = torch.arange(rows, device=codes.device)
            if kept > 1 or len(chosen) > 1:
                held, error, slope, old = (x[parent, row] for x in (held, error, slope, old))
            kept = len(chosen)
            step = scales[:, None] * (entries[entry] - old)
            held[..., group, book] = entry
            error = error.clone() if group == 0 and book == 0 else error
            error[..., block] += step
            slope = slope + step @ curvature
    return held[losses.argmin(0), torch.arange(rows, device=codes.device)]


def search_apart(
    weight: Float[Tensor, "rows columns"],
    codebooks: Float[Tensor, "codebooks entries group"],
    scales: Float[Tensor, " rows"],
    codes: Int[Tensor, "rows groups codebooks"],
    beam: int = 1,
) -> Int[Tensor, "rows groups codebooks"]:
    """`beam_search` for H = I, where no group has a say in another's codes: all of them are searched at once."""
    size = codebooks.shape[2]
    same = torch.eye(size, dtype=weight.dtype, device=weight.device)
    parts = zip(
        weight.reshape(-1, size).split(_CHUNK),
        scales.repeat_interleave(codes.shape[1]).split(_CHUNK),
        codes.reshape(-1, 1, codes.shape[2]).split(_CHUNK),
        strict=True,
    )
    return torch.cat([beam_search(part, same, codebooks, s, held, beam) for part, s, held in parts]).view(codes.shape)
