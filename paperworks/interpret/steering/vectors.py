"""Control vectors: directions that steer a model when added to its residual stream, amplified in it or removed.

Representation engineering (Zou et al. 2023, arXiv:2310.01405), control vectors in the form of vgel's repeng (2024).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.interpret.taps import edit

Method = Literal["mean_difference", "pca_difference"]


def mean_difference(
    positive: Float[Tensor, "pairs dim"], negative: Float[Tensor, "pairs dim"]
) -> Float[Tensor, " dim"]:
    """The unit vector from the mean of the negatives to the mean of the positives."""
    return _unit((positive.double() - negative.double()).mean(0)).to(positive.dtype)


def pca_difference(positive: Float[Tensor, "pairs dim"], negative: Float[Tensor, "pairs dim"]) -> Float[Tensor, " dim"]:
    """The unit top eigenvector of sum d d^T over the differences d, not centred; positives project higher.

    Equal to the first principal component of both sides after each pair's midpoint is subtracted (repeng's pca_center).
    """
    differences = positive.double() - negative.double()
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    higher = (differences @ direction > 0).sum()
    if 2 * higher < len(differences):
        direction = -direction
    return _unit(direction).to(positive.dtype)


def _unit(vector: Tensor) -> Tensor:
    norm = vector.norm()
    if not bool(norm > 0) or not bool(torch.isfinite(norm)):
        raise ValueError("positives and negatives do not differ (or hold NaN): there is no direction between them")
    out: Tensor = vector / norm
    return out


_METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_difference": mean_difference,
    "pca_difference": pca_difference,
}


@dataclass(frozen=True)
class ControlVector:
    """One direction a module path; adds, subtracts, scales. `apply` steers a model with it."""

    directions: Mapping[str, Float[Tensor, " dim"]]

    def __add__(self, other: "ControlVector") -> "ControlVector":
        paths = dict.fromkeys([*self.directions, *other.directions])
        return ControlVector({path: _sum(self.directions.get(path), other.directions.get(path)) for path in paths})

    def __mul__(self, factor: float) -> "ControlVector":
        return ControlVector({path: factor * direction for path, direction in self.directions.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "ControlVector":
        return self * -1.0

    def __sub__(self, other: "ControlVector") -> "ControlVector":
        return self + -other

    def apply(
        self, model: nn.Module, strength: float = 1.0, *, keep_norm: bool = False
    ) -> AbstractContextManager[nn.Module]:
        """Add strength * direction to the output of each module at every position, inside the context.

        With `keep_norm` each position is scaled back to the norm it had (repeng's option).
        """

        def steer(direction: Tensor) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                moved = x + strength * direction.to(x)
                return moved * (x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)) if keep_norm else moved

            return change

        if strength == 0:
            return edit(model, {path: lambda x: x for path in self.directions})
        return edit(model, {path: steer(direction) for path, direction in self.directions.items()})

    def amplify(self, model: nn.Module, strength: float = 1.0) -> AbstractContextManager[nn.Module]:
        """Add strength * sign(x . v) * v at every position: more of what is there, in either direction (piecewise).

        For unit v, |x . v| grows by `strength` and keeps its sign; a position with x . v = 0 stays.
        """

        def push(direction: Tensor) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                v = direction.to(x)
                return x + strength * torch.sign(x @ v)[..., None] * v

            return change

        return edit(model, {path: push(direction) for path, direction in self.directions.items()})

    def remove(self, model: nn.Module, *, longest: float | None = None) -> AbstractContextManager[nn.Module]:
        """Project the direction out at every position: x - (x . v / ||v||^2) v, after which x . v = 0.

        Positions with ||x|| above `longest` are left alone: attention sinks, usually the first token, are so long that
        a share of one taken away disturbs everything that attends to it.
        """

        def project(path: str, direction: Tensor) -> Callable[[Tensor], Tensor]:
            if not bool(direction.norm() > 0):
                raise ValueError(f"the direction at {path} is zero: there is nothing to project out")

            def change(x: Tensor) -> Tensor:
                v = (direction / direction.norm()).to(x)
                removed = x - (x @ v)[..., None] * v
                return removed if longest is None else torch.where(x.norm(dim=-1, keepdim=True) > longest, x, removed)

            return change

        return edit(model, {path: project(path, direction) for path, direction in self.directions.items()})


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor:
    if one is None or other is None:
        found = one if one is not None else other
        assert found is not None
        return found
    return one + other


def control_vector(
    positive: Mapping[str, Float[Tensor, "pairs dim"]],
    negative: Mapping[str, Float[Tensor, "pairs dim"]],
    method: Method = "mean_difference",
) -> ControlVector:
    """The control vector between paired activations.

    Args:
        positive, negative: by module path, the activations of each pair's two texts (their last token, say).
        method: "mean_difference" or "pca_difference".

    Raises:
        ValueError: when the two sides differ in paths or shapes, or a direction does not exist.
    """
    if positive.keys() != negative.keys():
        raise ValueError(f"both sides need the same paths, got {sorted(positive)} and {sorted(negative)}")
    for path in positive:
        if positive[path].shape != negative[path].shape or positive[path].dim() != 2:
            raise ValueError(
                f"{path}: activations must pair up as (pairs, dim), got {tuple(positive[path].shape)} "
                f"and {tuple(negative[path].shape)}"
            )
    return ControlVector({path: _METHODS[method](positive[path], negative[path]) for path in positive})


def random_vector(like: ControlVector, seed: int) -> ControlVector:
    """Directions drawn at random, each as long as the one it stands for: the control of a control vector."""
    draws = torch.Generator().manual_seed(seed)
    drawn = {}
    for path, direction in like.directions.items():
        noise = torch.randn(direction.shape, generator=draws).to(direction)
        drawn[path] = noise * (direction.norm() / noise.norm())
    return ControlVector(drawn)


def last_token_activations(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[str],
    *,
    batch: int = 1,
    forward: Callable[[Tensor], object] | None = None,
) -> dict[str, Float[Tensor, "prompts dim"]]:
    """The outputs of the chosen modules at each prompt's last token.

    Nothing is padded: a forward pass takes up to `batch` prompts of one length.

    Args:
        model: any module that takes tokens (batch, time).
        prompts: token ids.
        targets: glob patterns over module paths whose outputs are (batch, time, dim).
        batch: how many prompts of equal length share a forward pass.
        forward: what runs on the tokens, the model itself by default; `model.hidden` of ours spares the logits.

    Raises:
        ValueError: when a prompt is empty, or `batch` is below 1.
    """
    from paperworks.interpret.taps import record

    if batch < 1:
        raise ValueError(f"batch is how many prompts share a forward pass, at least 1, got {batch}")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: it has no last token")
    device = next(model.parameters()).device
    run = forward if forward is not None else model
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    found: dict[str, dict[int, Tensor]] = {}
    with torch.no_grad():
        for rows in by_length.values():
            for start in range(0, len(rows), batch):
                some = rows[start : start + batch]
                with record(model, list(targets)) as seen:
                    run(torch.tensor([list(prompts[row]) for row in some], device=device))
                for path, value in seen.items():
                    found.setdefault(path, {}).update(zip(some, value[:, -1].clone(), strict=True))
    return {path: torch.stack([values[row] for row in range(len(prompts))]) for path, values in found.items()}
