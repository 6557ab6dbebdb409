"""What a linear layer's inputs looked like: gathered batch by batch, in memory that does not grow with the data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

SAMPLES = 1024  # rows of input kept where a method asks for samples


@dataclass(frozen=True)
class Statistics:
    """Of the inputs x of one linear layer, over all calibration tokens; what was not asked for is None.

    Attributes:
        count: the number of tokens seen.
        second_moment: the mean of x x^T, float32; half the Hessian of GPTQ.
        absolute_mean: the mean of |x| of each input feature.
        absolute_max: the largest |x| of each input feature.
        minimum, maximum: the range of each input feature.
        samples: some inputs, each equally likely to be kept.
    """

    count: int
    second_moment: Float[Tensor, "columns columns"] | None = None
    absolute_mean: Float[Tensor, " columns"] | None = None
    absolute_max: Float[Tensor, " columns"] | None = None
    minimum: Float[Tensor, " columns"] | None = None
    maximum: Float[Tensor, " columns"] | None = None
    samples: Float[Tensor, "samples columns"] | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The statistics there are."""
        return tuple(field.name for field in fields(cls) if field.name != "count")

    @classmethod
    def of(cls, inputs: Float[Tensor, "... columns"], needs: Iterable[str] | None = None) -> "Statistics":
        """The statistics of inputs at hand; all of them if `needs` is None."""
        gatherer = Gatherer(inputs.shape[-1], cls.names() if needs is None else needs)
        gatherer.add(inputs)
        return gatherer.statistics()

    @classmethod
    def neutral(cls, columns: int) -> "Statistics":
        """Those of inputs that tell no feature from another: unit second moment, one sample a feature."""
        ones = torch.ones(columns)
        return cls(columns, torch.eye(columns), ones, ones, -ones, ones, torch.eye(columns))

    def required(self, name: str) -> Tensor:
        """A statistic that `needs` names."""
        value: Tensor = getattr(self, name)
        if value is None:
            raise ValueError(f"the statistic {name!r} was not gathered: name it in the format's needs")
        return value


class Gatherer:
    """Adds up the statistics of one input, batch by batch.

    Raises:
        ValueError: for statistics that do not exist, and (in `add`) for inputs that are NaN or infinite.
    """

    def __init__(self, columns: int, needs: Iterable[str], samples: int = SAMPLES, seed: int = 0) -> None:
        self.columns, self.needs, self.count = columns, set(needs), 0
        unknown_names = self.needs - set(Statistics.names())
        if unknown_names:
            raise ValueError(f"there are no statistics {sorted(unknown_names)}; there are {Statistics.names()}")
        self._room = samples
        self._draws = torch.Generator().manual_seed(seed)
        self._sums: dict[str, Tensor] = {}
        self._samples: Tensor | None = None
        self._keys: Tensor | None = None

    @torch.no_grad()
    def add(self, inputs: Float[Tensor, "... columns"]) -> None:
        """Count another batch of inputs, of any leading shape."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if x.shape[1] != self.columns:
            raise ValueError(f"the layer takes {self.columns} features, the input has {x.shape[1]}")
        if not len(x):
            return
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{int((~torch.isfinite(x)).sum())} of its inputs are NaN or infinite")
        self.count += len(x)
        if "second_moment" in self.needs:
            if "second_moment" in self._sums:
                self._sums["second_moment"].addmm_(x.T, x)
            else:
                self._sums["second_moment"] = x.T @ x
        magnitude = x.abs() if self.needs & {"absolute_mean", "absolute_max"} else x
        if "absolute_mean" in self.needs:
            self._fold("absolute_mean", magnitude.sum(0), torch.add)
        if "absolute_max" in self.needs:
            self._fold("absolute_max", magnitude.amax(0), torch.maximum)
        if "minimum" in self.needs:
            self._fold("minimum", x.amin(0), torch.minimum)
        if "maximum" in self.needs:
            self._fold("maximum", x.amax(0), torch.maximum)
        if "samples" in self.needs:
            self._sample(x)

    def _fold(self, name: str, value: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._sums[name] = join(self._sums[name], value) if name in self._sums else value

    def _sample(self, x: Tensor) -> None:
        """Keep the rows with the largest of one random key a row: a uniform sample of everything seen."""
        keys = torch.rand(len(x), generator=self._draws)
        if self._samples is not None and self._keys is not None:
            x, keys = torch.cat((self._samples, x)), torch.cat((self._keys, keys))
        if len(keys) > self._room:
            kept = keys.topk(self._room).indices.sort().values
            x, keys = x[kept.to(x.device)], keys[kept]
        self._samples, self._keys = x.clone(), keys

    def statistics(self) -> Statistics:
        """What was gathered. Raises `ValueError` if nothing was."""
        if not self.count:
            raise ValueError("no calibration token reached it")
        found = {
            name: total / self.count if name in ("second_moment", "absolute_mean") else total
            for name, total in self._sums.items()
        }
        return Statistics(self.count, samples=self._samples, **found)
