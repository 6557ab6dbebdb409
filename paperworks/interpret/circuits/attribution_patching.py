"""Attribution patching: all activation patches at once, to first order (Nanda 2023; edges: Syed et al. 2023,
arXiv:2310.10348; integrated: Hanna et al. 2024, arXiv:2403.17806).

effect(a) = (a_clean - a_corrupted) . d metric / d a at the corrupted run: two forward passes and one backward.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.core.selection import Targets, select
from paperworks.interpret.circuits.edges import EdgeGraph
from paperworks.interpret.circuits.patching import Direction, Metric
from paperworks.interpret.taps import edit, record

Run = Literal["clean", "corrupted"]


def attribute_nodes(
    model: nn.Module,
    clean: Int[Tensor, "batch time"],
    corrupted: Int[Tensor, "batch time"],
    metric: Metric,
    targets: Targets,
    *,
    direction: Direction = "denoise",
    steps: int = 1,
    start: str = "embedding",
) -> dict[str, Float[Tensor, "batch time *heads"]]:
    """Estimate, for every position (and head) of every target, how patching it would change the metric.

    Denoising: (clean - corrupted) . gradient at the corrupted run. Noising: (corrupted - clean) . gradient at the clean
    run. With `steps` n > 1 the gradient is the mean over the embeddings' path between the runs (midpoints of n parts),
    and the attributions of `start` add up to metric(clean) - metric(corrupted) as n grows.

    Args:
        model: one of ours, or of another library.
        clean, corrupted: prompts of equal length, position by position.
        metric: output -> one number a row. Not KL to the run the gradient is taken at: it is at its minimum there.
        targets: glob patterns; see `nn.select`. Of a pattern (batch, heads, query, key) keys are summed over.
        direction: "denoise" or "noise".
        steps: how many points of the path the gradient is averaged over.
        start: the module whose output the model begins with; all targets must come after it (or be it).

    Returns:
        By path, (batch, time) or, of `heads`, (batch, time, heads); for patterns (batch, heads, time). Not normalized:
        in units of the metric.

    Raises:
        ValueError: for prompts of different shape, or a gradient that is zero everywhere.
    """
    if direction not in get_args(Direction):
        raise ValueError(unknown("direction", direction, get_args(Direction)))
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"clean {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)} prompts must have the same shape; "
            "`patching.aligned` shows where they part"
        )
    if steps < 1:
        raise ValueError(f"steps is the number of points the gradient is averaged over, at least 1; got {steps}")
    base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen = set(select(model, wanted))
    with torch.no_grad(), record(model, [start, *wanted]) as there:
        model(other)
    total: dict[str, Tensor] = {}
    here: dict[str, Tensor] = {}
    if steps > 1:
        with torch.no_grad(), record(model, [start, *wanted]) as before:
            model(base)
        here = dict(before)
    for step in range(steps):
        share = (step + 0.5) / steps if steps > 1 else 0.0

        def begin(x: Tensor, share: float = share) -> Tensor:
            # a leaf of its own: gradients reach it even where all parameters are frozen
            return (x + share * (there[start] - x)).detach().requires_grad_()

        # a copied pattern takes the fused kernel's place, so that the output depends on it
        through = {path: torch.clone for path in chosen if path.rpartition(".")[2] == "pattern"}
        with (
            torch.enable_grad(),
            edit(model, {start: begin, **through}),
            record(model, [start, *wanted], detach=False) as places,
        ):
            score = metric(model(base)).sum()
        paths = [path for path in places if path in chosen]
        gradients = torch.autograd.grad(score, [places[path] for path in paths], allow_unused=True)
        for path, gradient in zip(paths, gradients, strict=True):
            slope = torch.zeros_like(places[path]) if gradient is None else gradient
            total[path] = total.get(path, 0) + slope / steps
            if steps == 1:
                here[path] = places[path].detach()
    if not any(bool(gradient.any()) for gradient in total.values()):
        raise ValueError(
            "the gradient of the metric is zero everywhere: is it a KL to the run the gradient is taken at (at its "
            "minimum there), or does it not depend on the targets?"
        )
    return {path: ((there[path] - here[path]) * gradient).sum(-1) for path, gradient in total.items()}


def attribute_edges(
    graph: EdgeGraph,
    clean: Int[Tensor, "batch time"],
    corrupted: Int[Tensor, "batch time"],
    metric: Metric,
    *,
    at: Run = "clean",
) -> Float[Tensor, "receivers senders"]:
    """Estimate how much the mean metric would fall if each edge alone carried the corrupted output.

    score(w -> v) = (clean output of w - corrupted output of w) . d metric / d (input of v), summed over positions and
    averaged over rows; the gradient is that of the clean or of the corrupted run. Edges are ranked by the absolute
    value. Edges that do not exist score 0.

    Raises:
        ValueError: for prompts of different shape, an unknown run, or a gradient that is zero everywhere.
    """
    if at not in get_args(Run):
        raise ValueError(unknown("run", at, get_args(Run)))
    if clean.shape != corrupted.shape:
        raise ValueError(f"clean {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)} must have the same shape")
    ours, theirs = graph.outputs(clean), graph.outputs(corrupted)
    tokens, corrupted_outputs = (clean, theirs) if at == "clean" else (corrupted, ours)
    inputs: list[Tensor] = []
    with torch.enable_grad(), edit(graph.model, {"dropout": lambda x: x.detach().requires_grad_()}):
        score = metric(graph.run(tokens, graph.possible, corrupted_outputs, inputs)).mean()
    gradient = torch.cat(torch.autograd.grad(score, inputs))
    if not bool(gradient.any()):
        raise ValueError(
            "the gradient of the metric is zero everywhere: is it a KL to the run the gradient is taken at, where it "
            "is at "
            "its minimum?"
        )
    scores = torch.einsum("rbtd,sbtd->rs", gradient, ours - theirs)
    return scores * graph.possible.to(scores)
