"""Dictionaries made with supervision, and two tests in which an autoencoder can be compared with them.

Makelov, Lange & Nanda 2024, "Towards Principled Evaluations of Sparse Autoencoders", arXiv:2405.08366. What a prompt
says about its attributes (which name is repeated, and where) is known, so the best dictionary for a task can be
written down; what an autoencoder lacks against it is no matter of taste. The third test is in `attributes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from paperworks.core.errors import unknown
from paperworks.interpret.circuits.patching import Site
from paperworks.interpret.sae.autoencoder import SparseAutoencoder
from paperworks.interpret.taps import edit, record

Run = Callable[[Float[Tensor, "n dim"]], Any]  # the model's outputs with these activations in one place
Toward = Literal["activation", "reconstruction"]
ROUNDINGS = 100  # differences of a metric up to this many relative roundings of its values count as none


@dataclass(frozen=True)
class SupervisedDictionary:
    """x' = mean + sum_i codes[i][a_i]: one code for every value of every attribute.

    mean: of the activations. codes: for each attribute, (values, dim); weighted by how often each value occurs, the
    codes of an attribute add up to 0.
    """

    mean: Float[Tensor, " dim"]
    codes: tuple[Float[Tensor, "values dim"], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values each attribute has."""
        return tuple(len(code) for code in self.codes)

    def reconstruct(self, attributes: Int[Tensor, "n attributes"]) -> Float[Tensor, "n dim"]:
        """The activations that attributes stand for."""
        attributes, _ = checked_attributes(attributes, self.sizes)
        return self.mean + torch.stack([code[column] for code, column in self._columns(attributes)]).sum(dim=0)

    def edit(
        self, x: Float[Tensor, "n dim"], attribute: int, old: Int[Tensor, " n"], new: Int[Tensor, " n"]
    ) -> Float[Tensor, "n dim"]:
        """x - u_old + u_new: one attribute changed, and what the dictionary does not explain kept."""
        if not 0 <= attribute < len(self.codes):
            raise ValueError(f"attribute {attribute} is not one of the {len(self.codes)}, counted from 0")
        code = self.codes[attribute]
        for name, values in (("old", old), ("new", new)):
            if values.shape != x.shape[:1] or not bool(((values >= 0) & (values < len(code))).all()):
                raise ValueError(
                    f"{name} must hold one of {len(code)} values for each of {len(x)} rows, got shape "
                    f"{tuple(values.shape)} from {values.min()} to {values.max()}"
                )
        return x - code[old] + code[new]

    def weights(self, attributes: Int[Tensor, "n attributes"]) -> Float[Tensor, "n attributes"]:
        """Each code's share of the reconstruction, u_i . (x' - mean) / ||x' - mean||^2; they add up to 1."""
        away = self.reconstruct(attributes) - self.mean
        parts = torch.stack([(code[column] * away).sum(dim=1) for code, column in self._columns(attributes)], dim=1)
        return parts / away.square().sum(dim=1, keepdim=True)

    def _columns(self, attributes: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.codes, attributes.unbind(dim=1), strict=True))


def checked_attributes(
    attributes: Int[Tensor, "n attributes"], sizes: tuple[int, ...] | None = None, count: int | None = None
) -> tuple[Int[Tensor, "n attributes"], tuple[int, ...]]:
    """Attributes and how many values each has; the largest that occurs decides where `sizes` is None.

    Raises ValueError when attributes are not integers (n, attributes) within the sizes, or not `count` rows.
    """
    if attributes.dim() != 2 or attributes.is_floating_point() or not attributes.numel():
        raise ValueError(
            f"attributes must be integers (n, attributes), values counted from 0, got {attributes.dtype} "
            f"{tuple(attributes.shape)}"
        )
    if count is not None and len(attributes) != count:
        raise ValueError(f"there are {count} activations, but attributes of {len(attributes)}")
    found = sizes or tuple((attributes.amax(dim=0) + 1).tolist())
    if len(found) != attributes.shape[1]:
        raise ValueError(f"sizes name {len(found)} attributes, each row has {attributes.shape[1]}")
    for index, size in enumerate(found):
        low, high = (int(bound) for bound in attributes[:, index].aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"attribute {index} has {size} values, counted from 0; found {low if low < 0 else high}")
    return attributes.long(), found


def mean_codes(
    x: Float[Tensor, "n dim"], attributes: Int[Tensor, "n attributes"], sizes: tuple[int, ...] | None = None
) -> SupervisedDictionary:
    """u_{i,v} = E[x | a_i = v] - E[x]: the mean of the rows with a value, less that of all rows.

    Right where attributes are independent and balanced in the data; otherwise a code takes over part of what goes with
    its value, and `least_squares_codes` does not.

    Args:
        x: activations of one place, one row a prompt.
        attributes: the value of each attribute, counted from 0.
        sizes: values of each attribute; None takes them from the data.

    Raises ValueError when a value never occurs: it has no mean.
    """
    wide, columns = _design(x, attributes, sizes)
    mean = wide.mean(dim=0)
    codes = [column.T @ wide / column.sum(dim=0)[:, None] - mean for column in columns]
    return SupervisedDictionary(mean.to(x.dtype), tuple(code.to(x.dtype) for code in codes))


def least_squares_codes(
    x: Float[Tensor, "n dim"], attributes: Int[Tensor, "n attributes"], sizes: tuple[int, ...] | None = None
) -> SupervisedDictionary:
    """The codes with the least sum of ||x - x'||^2: a linear regression on one-hot attributes.

    Adding a vector to all codes of one attribute and taking it from all of another changes nothing; the codes returned
    are those whose mean over the data is 0 in each attribute. Equal to `mean_codes` on balanced, independent data.

    Raises ValueError when a value never occurs, or attributes go together so that their codes cannot be told apart.
    """
    wide, columns = _design(x, attributes, sizes)
    mean = wide.mean(dim=0)
    design = torch.cat(columns, dim=1)
    gram = design.T @ design
    needed = design.shape[1] - len(columns) + 1
    rank = int(torch.linalg.matrix_rank(gram, hermitian=True))
    if rank < needed:
        raise ValueError(
            f"attributes go together in the data: their {design.shape[1]} values span {rank} dimensions, {needed} are "
            "needed to tell the codes apart; add prompts in which they vary independently, or merge attributes"
        )
    solved = torch.linalg.pinv(gram, hermitian=True) @ (design.T @ (wide - mean))
    codes = []
    for column, code in zip(columns, solved.split([column.shape[1] for column in columns]), strict=True):
        codes.append((code - column.mean(dim=0) @ code).to(x.dtype))
    return SupervisedDictionary(mean.to(x.dtype), tuple(codes))


def _design(x: Tensor, attributes: Tensor, sizes: tuple[int, ...] | None) -> tuple[Tensor, list[Tensor]]:
    """Activations and one-hot columns of each attribute, in float64."""
    if x.dim() != 2:
        raise ValueError(f"activations must have shape (n, dim), one row a prompt, got {tuple(x.shape)}")
    attributes, sizes = checked_attributes(attributes, sizes, len(x))
    columns = [one_hot(values, size).double() for values, size in zip(attributes.unbind(dim=1), sizes, strict=True)]
    for index, column in enumerate(columns):
        missing = (column.sum(dim=0) == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"attribute {index} never has value {missing[0]} in the data, so that it has no code")
    return x.detach().double(), columns


@dataclass(frozen=True)
class Location:
    """One vector a prompt inside a model: what a module gives at one position, and for one head.

    model, prompts: any module and a batch of its inputs, (n, time). site: see `Site`; with a position.
    """

    model: nn.Module
    prompts: Tensor
    site: Site

    @torch.no_grad()
    def read(self) -> Float[Tensor, "n dim"]:
        """The activations. Raises ValueError when the site is more than one vector a prompt."""
        with record(self.model, self.site.path) as seen:
            self.model(self.prompts)
        value = seen[self.site.path]
        mask = self.site.mask(value).expand(*value.shape[:-1], 1)
        if bool((mask.flatten(1).sum(dim=1) != 1).any()):
            raise ValueError(
                f"{self.site.path} {tuple(value.shape)} holds several vectors a prompt: give the site a position, and "
                "a head where there are heads"
            )
        return value[mask[..., 0]]

    @torch.no_grad()
    def run(self, x: Float[Tensor, "n dim"]) -> Any:
        """The model's output with `x` in the place of the activations."""

        def put(value: Tensor) -> Tensor:
            rows = x.view(len(x), *[1] * (value.dim() - 2), x.shape[1]).to(value.dtype)
            return torch.where(self.site.mask(value), rows, value)

        with edit(self.model, {self.site.path: put}):
            return self.model(self.prompts)


@dataclass(frozen=True)
class Approximation:
    """How much of what a model does with its activations a reconstruction carries; 1 is all, 0 nothing.

    sufficiency: with x' in place of x. necessity: with what x' leaves out, mean + x - x', in place of x.
    clean, ablated: the metric with x, and with the mean of x for all.
    """

    sufficiency: float
    necessity: float
    clean: float
    ablated: float


def approximation(
    x: Float[Tensor, "n dim"],
    reconstruction: Float[Tensor, "n dim"],
    run: Run,
    metric: Callable[[Any], Float[Tensor, " n"]],
    mean: Float[Tensor, " dim"] | None = None,
) -> Approximation:
    """Sufficiency 1 - |M(x) - M(x')| / |M(x) - M(mean)|, necessity 1 - |M(mean) - M(mean + x - x')| / the same.

    M is the metric's mean over prompts. Both are lowered alike by too little effect and by too much.

    Args:
        x, reconstruction: the activations, and x'.
        run: what the model does with activations: `Location.run`.
        metric: metric(output) -> one number a prompt, such as a logit difference.
        mean: of the activations; None is that of `x`.

    Raises ValueError when the metric is the same with and without the activations, up to rounding, or shapes differ.
    """
    if x.shape != reconstruction.shape:
        raise ValueError(f"activations {tuple(x.shape)} and reconstruction {tuple(reconstruction.shape)} differ")
    mean = x.mean(dim=0) if mean is None else mean

    size, precision = 0.0, torch.finfo(x.dtype).eps

    def score(activations: Tensor) -> float:
        nonlocal size, precision
        values = metric(run(activations))
        if values.is_floating_point():
            precision = max(precision, torch.finfo(values.dtype).eps)
        size = max(size, float(values.double().abs().mean()))
        return float(values.double().mean())

    clean, ablated = score(x), score(mean.expand_as(x))
    whole = abs(clean - ablated)
    # A metric that the activations do not change differs by the rounding of what computes it, some tens of roundings.
    if whole <= ROUNDINGS * precision * size:
        raise ValueError(
            f"the metric is {clean:.4g} with the activations and with their mean alike: nothing here to approximate; "
            f"they differ by {whole:.1g}, as rounding does. Take a metric that the activations change"
        )
    spliced, left = score(reconstruction), score(mean + x - reconstruction)
    return Approximation(1 - abs(clean - spliced) / whole, 1 - abs(ablated - left) / whole, clean, ablated)


@dataclass(frozen=True)
class SparseEdit:
    """Activations with a few latents set to what they are for other activations.

    x: the edited ones. changed: which latents were set. moved: the share of the reconstruction that was taken away,
    sum over them of max(f_i - f_i', 0) d_i . (x' - b) / ||x' - b||^2.
    """

    x: Float[Tensor, "n dim"]
    changed: Bool[Tensor, "n latents"]
    moved: Float[Tensor, " n"]


@torch.no_grad()
def sparse_edit(
    sae: SparseAutoencoder,
    x: Float[Tensor, "n dim"],
    target: Float[Tensor, "n dim"],
    k: int,
    toward: Toward = "activation",
) -> SparseEdit:
    """Set at most k latents of x to their values for `target`, each time the one that leads nearest to it.

    A change adds (f_i(target) - f_i(x)) d_i to x, so that the autoencoder's error on x stays as it is and no help can
    come from it. One feature taken out and another put in are two changes. A row stops early when nothing helps.

    Args:
        sae: the autoencoder.
        x, target: activations, and those of the counterfactual prompts.
        k: the most latents a row may have changed.
        toward: what must come near: x to the target, or reconstruction to reconstruction.

    Raises ValueError for a negative k, unequal shapes or an unknown `toward`.
    """
    if toward not in get_args(Toward):
        raise ValueError(unknown("toward", toward, get_args(Toward)))
    if k < 0 or x.shape != target.shape or x.dim() != 2:
        raise ValueError(
            f"k must be 0 or more and activations (n, dim) like the target's, got k {k}, {tuple(x.shape)} and "
            f"{tuple(target.shape)}"
        )
    x, target = sae.check(x), sae.check(target)
    before, after = sae.encode(x), sae.encode(target)
    step = after - before
    away = target - x if toward == "activation" else sae.decode(after) - sae.decode(before)
    cost = step.square() * sae.decoder.square().sum(dim=1)
    rows = torch.arange(len(x), device=x.device)
    changed = torch.zeros_like(step, dtype=torch.bool)
    edited = x.clone()
    for _ in range(min(k, sae.latents)):
        # ||away||^2 - ||away - step_i d_i||^2
        gain = (2 * step * (away @ sae.decoder.T) - cost).masked_fill(changed, -torch.inf)
        best, chosen = gain.max(dim=1)
        helps = best > 0
        if not bool(helps.any()):
            break
        change = torch.where(helps, step[rows, chosen], 0.0)[:, None] * sae.decoder[chosen]
        edited, away = edited + change, away - change
        changed[rows[helps], chosen[helps]] = True
    written = before @ sae.decoder
    along = written @ sae.decoder.T / written.square().sum(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    moved = ((before - after).clamp_min(0) * along * changed).sum(dim=1)
    return SparseEdit(edited, changed, moved)


def agreement(
    run: Run, edited: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"], answer: Callable[[Any], Tensor]
) -> float:
    """The share of prompts for which the model answers as it does with the true counterfactual's activations.

    answer: answer(output) -> what the model says for each prompt, (n,) or (n, parts), all of which must agree.
        Agreement is asked for, not that a logit difference changes its sign: an edit that breaks the model does that.
    """
    given, wanted = answer(run(edited)), answer(run(target))
    if given.is_floating_point() or given.shape != wanted.shape or given.dim() < 1:
        raise ValueError(f"answer must give discrete answers, one row a prompt, got {given.dtype} {tuple(given.shape)}")
    return float((given == wanted).view(len(given), -1).all(dim=1).double().mean())
