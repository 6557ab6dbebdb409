"""What a transformation of a model's weights reached, and what it left out."""

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from paperworks.core.linear import features, is_linear_like, linear_kind
from paperworks.core.selection import grouped


class CoverageWarning(UserWarning):
    """A named set of targets left out matrices that a reader would count to it, such as stacked experts."""


@dataclass(frozen=True)
class Coverage:
    """Weights of a model that a transformation reached, and those it left out by what they are.

    Attributes:
        weights: numbers in all parameters (and formats' decoded weights), tied ones once.
        reached: those in the layers that were chosen.
        left_out: numbers left out, by kind: "linear layers", "stacked experts", "matrices held directly" (such as the
            fused input projection of torch's attention), "embeddings", "norms and biases".
        paths: examples of each kind, with `*` for numbers.
    """

    weights: int
    reached: int
    left_out: dict[str, int]
    paths: dict[str, tuple[str, ...]]

    @property
    def share(self) -> float:
        """reached / weights."""
        return self.reached / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        parts = [
            f"{kind} {count / self.weights:.1%} ({', '.join(self.paths[kind][:3])})"
            for kind, count in sorted(self.left_out.items(), key=lambda item: -item[1])
        ]
        return f"{self.share:.1%} of {self.weights:,} weights reached" + (
            f"; left out: {'; '.join(parts)}" if parts else ""
        )


_MATRICES = ("stacked experts", "matrices held directly")


def coverage_of(
    model: nn.Module, chosen: Collection[str], rename: Callable[[str], str | None] = lambda name: name
) -> Coverage:
    """The share of the model's weights that lies in `chosen`, paths of modules or of parameters.

    Args:
        model: any module.
        chosen: what was reached; for a module, all that it holds.
        rename: from the name of a parameter to what it is called in `chosen`; None for one that is not the model's own.
    """
    under = tuple(f"{path}." for path in chosen)
    reached = 0
    left: dict[str, int] = {}
    paths: dict[str, list[str]] = {}
    for name, owner, kind, count in _weights(model):
        renamed = rename(name)
        if renamed is None:
            continue
        if renamed in chosen or renamed.startswith(under):
            reached += count
            continue
        left[kind] = left.get(kind, 0) + count
        paths.setdefault(kind, []).append(renamed if kind in _MATRICES else owner)
    examples = {kind: tuple(path for path, _ in grouped(found)) for kind, found in paths.items()}
    return Coverage(reached + sum(left.values()), reached, left, examples)


def _weights(model: nn.Module) -> Iterator[tuple[str, str, str, int]]:
    """Name, owner, kind and count of each parameter, and of each weight that is stored in a format."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        yield name, owner, _kind(modules[owner], parameter), parameter.numel()
    for path, module in modules.items():
        if is_linear_like(module) and not any(True for _ in module.children()) and "weight" not in module._parameters:
            yield f"{path}.weight", path, "linear layers", features(module)[0] * features(module)[1]


def _kind(owner: nn.Module, parameter: Tensor) -> str:
    kind = linear_kind(owner)
    if parameter.dim() < 2:
        return "norms and biases"
    if kind is not None:
        return "embeddings" if kind == "lookup" else "linear layers"
    if "Embedding" in type(owner).__name__:
        return "embeddings"
    return "stacked experts" if parameter.dim() == 3 else "matrices held directly"


def warn_of_gaps(found: Coverage, what: str, advice: str, stacklevel: int = 3) -> None:
    """Warn in one line where matrices that are no layers of their own were left out."""
    gaps = {kind: count for kind, count in found.left_out.items() if kind in _MATRICES and count}
    if gaps:
        largest = sorted(gaps, key=lambda kind: -gaps[kind])
        named = "; ".join(f"{kind} ({', '.join(found.paths[kind][:3])})" for kind in largest)
        share = sum(gaps.values()) / found.weights
        warnings.warn(
            f"{what} reaches {found.share:.0%} of the model's weights and leaves out {share:.0%} in {named}; {advice}",
            CoverageWarning,
            stacklevel=stacklevel,
        )
