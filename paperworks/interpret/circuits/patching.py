"""Activation patching: put what a model thought of one prompt into its run on another (Heimersheim & Nanda 2024,
arXiv:2404.15255; Zhang & Nanda 2023, arXiv:2309.16042; Meng et al. 2022, arXiv:2202.05262).

Denoising: run on the corrupted prompt, put CLEAN values in: is this enough to restore the behaviour?
Noising: run on the clean prompt, put CORRUPTED values in: is this needed for it?
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.core.errors import unknown
from paperworks.interpret.taps import Edit, edit, record

Metric = Callable[[Float[Tensor, "batch time vocab"]], Float[Tensor, " batch"]]
Direction = Literal["denoise", "noise"]
Value = Literal["patch", "zero", "mean", "resample"]


@dataclass(frozen=True)
class Site:
    """What is replaced: the output of a module, all of it or one position or head.

    Attributes:
        path: a module path, such as `blocks.6` (the residual stream) or `blocks.6.mixer.heads`.
        position: one position (negative counts from the end), or one for each row; None is all of them. Of a pattern
            it is the query's.
        head: one head of a tap that has a dimension for them (`heads` or `pattern`); None is all.
    """

    path: str
    position: int | Int[Tensor, " batch"] | None = None
    head: int | None = None

    def mask(self, value: Tensor) -> Tensor:
        """Where `value`, the module's output, is replaced: booleans that broadcast to it."""
        pattern = self.path.rpartition(".")[2] == "pattern"
        head_dim, time_dim = (1, 2) if pattern else (2, 1)
        chosen = torch.ones([1] * value.dim(), dtype=torch.bool, device=value.device)
        if self.head is not None:
            if self.path.rpartition(".")[2] not in ("heads", "pattern") or value.dim() != 4:
                raise ValueError(
                    f"{self.path} {tuple(value.shape)} has no dimension for heads; patch a head at "
                    f"`blocks.N.mixer.heads` "
                    "or `blocks.N.mixer.pattern`"
                )
            if not 0 <= self.head < value.shape[head_dim]:
                raise ValueError(f"head {self.head} of {self.path}: it has heads 0 to {value.shape[head_dim] - 1}")
            chosen = chosen & _one_hot(torch.tensor([self.head]), value, head_dim)
        if self.position is not None:
            if value.dim() < 3:
                raise ValueError(f"{self.path} {tuple(value.shape)} has no positions; leave Site.position out")
            place = torch.as_tensor(self.position).reshape(-1)
            if bool(((place < -value.shape[time_dim]) | (place >= value.shape[time_dim])).any()):
                raise ValueError(
                    f"position {place.tolist()} of {self.path}: the prompts have positions 0 to "
                    f"{value.shape[time_dim] - 1}"
                )
            chosen = chosen & _one_hot(place % value.shape[time_dim], value, time_dim)
        return chosen


def _one_hot(index: Tensor, value: Tensor, dim: int) -> Tensor:
    """Mark index[b] along `dim` (one index for all rows, or one each), in a shape that broadcasts to `value`."""
    shape = [len(index)] + [1] * (value.dim() - 1)
    shape[dim] = value.shape[dim]
    marks = torch.arange(value.shape[dim], device=value.device) == index.to(value.device)[:, None]
    return marks.view(shape)


def logit_difference(
    answer: Int[Tensor, " batch"], against: Int[Tensor, " batch"], at: int | Int[Tensor, " batch"] = -1
) -> Metric:
    """The metric logit[answer] - logit[against]: linear in the logits, and it sees negative heads."""

    def metric(logits: Tensor) -> Tensor:
        rows, last = _at(logits, at)
        return last[rows, answer.to(last.device)] - last[rows, against.to(last.device)]

    return metric


def answer_probability(answer: Int[Tensor, " batch"], at: int | Int[Tensor, " batch"] = -1) -> Metric:
    """The metric p(answer); it cannot go below 0, so it hides what works against the answer."""

    def metric(logits: Tensor) -> Tensor:
        rows, last = _at(logits, at)
        return last.softmax(-1)[rows, answer.to(last.device)]

    return metric


def kl_divergence(reference: Float[Tensor, "batch time vocab"], at: int | Int[Tensor, " batch"] = -1) -> Metric:
    """The metric KL(reference || logits) in nats: 0 for the run the reference came from."""

    def metric(logits: Tensor) -> Tensor:
        _, last = _at(logits, at)
        target = _at(reference.to(logits.device), at)[1].log_softmax(-1)
        return (target.exp() * (target - last.log_softmax(-1))).sum(-1)

    return metric


def _at(logits: Tensor, at: int | Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(logits), device=logits.device)
    return rows, logits[rows, torch.as_tensor(at, device=logits.device).expand(len(logits))]


def gaussian_corruption(
    model: nn.Module,
    positions: Sequence[int],
    *,
    scale: float = 3.0,
    embedding: str = "embedding",
    seed: int = 0,
) -> dict[str, Edit]:
    """The edit that adds noise N(0, (scale x std of the embedding table)^2) to the embeddings at some positions.

    The corruption of Meng et al. 2022, where `positions` are the subject's. The noise is the same in every run.
    """
    table: Any = model.get_submodule(embedding)
    sigma = scale * table.weight.detach().float().std().item()

    def add(x: Tensor) -> Tensor:
        noise = torch.zeros(x.shape)
        drawn = torch.randn(x.shape[0], len(positions), x.shape[2], generator=torch.Generator().manual_seed(seed))
        noise[:, list(positions)] = sigma * drawn
        return x + noise.to(x)

    return {embedding: add}


def aligned(
    clean: Sequence[str] | Sequence[Sequence[int]],
    corrupted: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: Any = None,
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Two batches of tokens whose positions correspond, for patching position by position.

    Args:
        clean, corrupted: paired texts (with a tokenizer that has `encode` and `decode`) or lists of ids.
        tokenizer: of the model.

    Raises:
        ValueError: when the two of a pair differ in their number of tokens, or pairs differ from each other; shows how
            the tokens stand side by side.
    """
    if len(clean) != len(corrupted) or not len(clean):
        raise ValueError(f"prompts come in pairs: got {len(clean)} clean and {len(corrupted)} corrupted ones")

    def ids(prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("the prompts are texts: give the model's tokenizer")
            return list(tokenizer.encode(prompt))
        return [int(token) for token in prompt]

    pairs = [(ids(one), ids(other)) for one, other in zip(clean, corrupted, strict=True)]
    for index, (one, other) in enumerate(pairs):
        if len(one) != len(other):
            raise ValueError(
                f"pair {index} has {len(one)} clean and {len(other)} corrupted tokens, so positions do not "
                f"correspond:\n"
                f"{_side_by_side(one, other, tokenizer)}\nreplace words by others of as many tokens"
            )
        if len(one) != len(pairs[0][0]):
            raise ValueError(
                f"pair {index} has {len(one)} tokens and pair 0 {len(pairs[0][0])}; patch pairs of one length "
                f"together:\n"
                f"{_side_by_side(pairs[0][0], one, tokenizer)}"
            )
    return torch.tensor([one for one, _ in pairs]), torch.tensor([other for _, other in pairs])


def _side_by_side(one: list[int], other: list[int], tokenizer: Any) -> str:
    """Show two token lists one under the other, with marks where they differ."""

    def shown(tokens: list[int]) -> list[str]:
        if tokenizer is None:
            return [str(token) for token in tokens]
        return [repr(tokenizer.decode([token]))[1:-1] for token in tokens]

    columns = max(len(one), len(other))
    rows = [shown(row) + ["-"] * (columns - len(row)) for row in (one, other)]
    marks = [
        "^" if index >= min(len(one), len(other)) or one[index] != other[index] else "" for index in range(columns)
    ]
    widths = [max(len(row[index]) for row in (*rows, marks)) for index in range(columns)]
    lines = ["|".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (*rows, marks)]
    labels = ("clean      ", "corrupted  ", "           ")
    return "\n".join(label + line for label, line in zip(labels, lines, strict=True)).rstrip()


@dataclass
class Patching:
    """Two runs of a model, and what happens to a metric when parts of one are put into the other.

    Attributes:
        model: any module that maps `clean` to an output the metric can read.
        clean: tokens (batch, time), or whatever the model takes.
        metric: output -> one number a row. For KL the reference is the clean run's logits.
        corrupted: the other prompt, position by position the same length; None when `corruption` is given.
        corruption: edits that make a run a corrupted one (see `gaussian_corruption`).
        direction: "denoise" puts clean values into the corrupted run, "noise" corrupted values into the clean run.
        value: what is put in: "patch" the other run's value; or an ablation of this run: "zero", "mean" (over the
            rows of the other run), "resample" (the next row of the other run).
    """

    model: nn.Module
    clean: Tensor
    metric: Metric
    corrupted: Tensor | None = None
    corruption: Mapping[str, Edit] | None = None
    direction: Direction = "denoise"
    value: Value = "patch"
    _sources: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(unknown("direction", self.direction, get_args(Direction)))
        if self.value not in get_args(Value):
            raise ValueError(unknown("value", self.value, get_args(Value)))
        if (self.corrupted is None) == (self.corruption is None):
            raise ValueError("give either corrupted tokens or a corruption of the clean ones")
        if self.corrupted is not None and self.corrupted.shape != self.clean.shape:
            raise ValueError(
                f"clean {tuple(self.clean.shape)} and corrupted {tuple(self.corrupted.shape)} prompts must have the "
                f"same "
                "shape; `patching.aligned` shows where they part:\n"
                + _side_by_side(self.clean.flatten(1)[0].tolist(), self.corrupted.flatten(1)[0].tolist(), None)
            )
        self.clean_score = self._score("clean", nullcontext())
        self.corrupted_score = self._score("corrupted", nullcontext())

    def _context(self, run: str) -> AbstractContextManager[Any]:
        return edit(self.model, self.corruption) if run == "corrupted" and self.corruption else nullcontext()

    @torch.no_grad()
    def _score(self, run: str, inside: AbstractContextManager[Any]) -> float:
        tokens = self.corrupted if run == "corrupted" and self.corrupted is not None else self.clean
        with self._context(run), inside:
            return self.metric(self.model(tokens)).double().mean().item()

    @property
    def _base(self) -> str:
        return "corrupted" if self.direction == "denoise" else "clean"

    @torch.no_grad()
    def _record(self, paths: Iterable[str]) -> None:
        """Record what is put in, in one run of the other prompt."""
        missing = [path for path in dict.fromkeys(paths) if path not in self._sources]
        if not missing or self.value == "zero":
            return
        other = "clean" if self._base == "corrupted" else "corrupted"
        tokens = self.corrupted if other == "corrupted" and self.corrupted is not None else self.clean
        with self._context(other), record(self.model, missing) as seen:
            self.model(tokens)
        self._sources.update(seen)

    def _replacement(self, path: str, value: Tensor) -> Tensor:
        if self.value == "zero":
            return torch.zeros_like(value)
        source = self._sources[path]
        if self.value == "mean":
            return source.mean(0, keepdim=True).expand_as(value)
        return source.roll(1, 0) if self.value == "resample" else source

    def score(self, sites: Iterable[Site]) -> float:
        """The mean metric with all of `sites` replaced at once."""
        by_path: dict[str, list[Site]] = {}
        for site in sites:
            by_path.setdefault(site.path, []).append(site)
        self._record(by_path)

        def change(path: str) -> Edit:
            def put(value: Tensor) -> Tensor:
                mask = by_path[path][0].mask(value)
                for site in by_path[path][1:]:
                    mask = mask | site.mask(value)
                return torch.where(mask, self._replacement(path, value), value)

            return put

        return self._score(self._base, edit(self.model, {path: change(path) for path in by_path}))

    def effect(self, sites: Iterable[Site]) -> float:
        """How far the metric moves: 0 as if nothing was replaced, 1 all the way to the other run.

        Denoising (m - m_corrupted) / (m_clean - m_corrupted), noising (m - m_clean) / (m_corrupted - m_clean); each m a
        mean over rows, for a ratio of single rows explodes where the two runs hardly differ.

        Raises:
            ValueError: when the two runs have the same mean metric.
        """
        return self.normalized(self.score(sites))

    def normalized(self, score: float) -> float:
        """The effect that a score of `score` stands for."""
        if self.clean_score == self.corrupted_score:
            raise ValueError(
                f"the metric is {self.clean_score:.4g} on the clean and on the corrupted run alike: there is no "
                f"effect to "
                "take a share of; use `score`, or prompts whose answers differ"
            )
        start, end = self.corrupted_score, self.clean_score
        if self.direction == "noise":
            start, end = end, start
        return (score - start) / (end - start)

    def sweep(
        self, groups: Sequence[Sequence[Site]], on_each: Callable[[], None] | None = None
    ) -> Float[Tensor, " groups"]:
        """The effect of each group of sites, one run each; `on_each` is called after each."""
        self._record(site.path for group in groups for site in group)
        effects = []
        for group in groups:
            effects.append(self.effect(group))
            if on_each is not None:
                on_each()
        return torch.tensor(effects)

    def by_position(
        self,
        paths: Sequence[str],
        positions: Sequence[int],
        *,
        window: int = 1,
        on_each: Callable[[], None] | None = None,
    ) -> Float[Tensor, "paths positions"]:
        """The effect of each path at each position; with `window`, of so many neighbouring paths at once.

        Row i patches paths i - window // 2 to i + (window - 1) // 2, as far as there are any (the sliding windows of
        Meng et al.).
        """
        if window < 1:
            raise ValueError(f"window is a number of neighbouring paths, at least 1; got {window}")
        groups = [
            [Site(path, position) for path in paths[max(0, row - window // 2) : row + (window - 1) // 2 + 1]]
            for row in range(len(paths))
            for position in positions
        ]
        return self.sweep(groups, on_each).view(len(paths), len(positions))

    def by_head(
        self,
        paths: Sequence[str],
        heads: int,
        *,
        position: int | Tensor | None = None,
        on_each: Callable[[], None] | None = None,
    ) -> Float[Tensor, "paths heads"]:
        """The effect of each head of each path (`blocks.N.mixer.heads`), at all positions or one."""
        groups = [[Site(path, position, head)] for path in paths for head in range(heads)]
        return self.sweep(groups, on_each).view(len(paths), heads)
