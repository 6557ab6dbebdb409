"""GPTQ: rounding that makes up for its own errors, column by column (Frantar et al. 2022, arXiv:2210.17323)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.compress.calibration.feedback import feed_back, upper_factor
from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, check_weight
from paperworks.compress.formats.grids import Grid
from paperworks.compress.formats.uniform import Uniform
from paperworks.kernels.packed import Grids


@dataclass(frozen=True, kw_only=True)
class GPTQ(Uniform):
    """Least |W X - Q X|^2 on the calibration inputs: see `feedback` for the equation. Stored and decoded as `Uniform`.

    The scales of a group are chosen when its first column is reached, from the weights as corrected until then; those
    of whole rows (`group=None`) at the start. An input that was zero in all of calibration is rounded to nearest, where
    the authors' code sets its weights to zero: the data say nothing of it either way.

    Heads of language models look at the first token of a sequence, which is one of hundreds in the second moment, and
    GPTQ moves errors to what is rare. Sequences of one token count it more often: with
    `calibration=[*batches, *(batch[:, :1].repeat(63, 1) for batch in batches)]` the perplexity of SmolLM2 at 4 bits, a
    scale a row and calibrated in one pass, was 28.6 and not 33.2 (rounded to nearest 35.3, as loaded 22.2).

    Attributes:
        damping: added to the second moment, in units of its mean diagonal.
        act_order: do the inputs in order of falling mean square, so that errors end up where they matter least. With
            groups the codes are then kept in that order, and the order with them, in 16 bits an input.
        static_groups: choose all scales before the first column, from groups in the inputs' own order.
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    needs: ClassVar[tuple[str, ...]] = ("second_moment",)

    def validate(self) -> None:
        """Check damping and granularity."""
        super().validate()
        if self.damping < 0:
            raise ValueError(f"GPTQ.damping must not be negative, got {self.damping}")
        if self.granularity != "row":
            raise ValueError(
                f"GPTQ.granularity must be 'row', got {self.granularity!r}: rows are rounded independently"
            )

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """Codes, scales and zero points. Warns where the calibration inputs do not span the layer's."""
        check_weight(weight, type(self).__name__)
        shape = (weight.shape[0], weight.shape[1])
        group = self.group_of(shape[1])
        moment = self.learned(statistics).required("second_moment").to(weight.device)
        order = torch.argsort(moment.diagonal(), descending=True, stable=True) if self.act_order else None
        inputs = weight.detach().float()
        fixed = self.grid(self.slices(inputs)) if self.group is None or self.static_groups else None
        if order is not None:
            inputs, moment = inputs[:, order], moment[order][:, order]
        chooser = _Chooser(self, inputs.shape, group, fixed, order)
        rounded = feed_back(
            inputs, upper_factor(moment, self.damping), chooser.quantize, chooser.begin, 128 if fixed else group
        )
        if order is not None and fixed is not None:
            rounded, order = rounded[:, torch.argsort(order)], None  # codes stay in the inputs' own order
        grid = fixed or chooser.grid()
        stored = self.store(grid.codes(self.slices(rounded)), grid, shape)
        if order is not None:
            stored["order"] = order.to(torch.int16 if shape[1] < 2**15 else torch.int32)
        return stored

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """(code - zero) * scale, in the inputs' own order."""
        decoded = super().decode(stored, shape)
        return decoded if "order" not in stored else decoded[:, torch.argsort(stored["order"].int())]

    def grids(self, stored: Stored, shape: tuple[int, int]) -> Grids | None:
        """The grid, unless its codes are kept in another order than the inputs."""
        return None if "order" in stored else super().grids(stored, shape)

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Round to nearest, on the scales and in the order held now."""
        if "order" not in stored:
            return super().reencode(weight, stored)
        return super().reencode(weight[:, stored["order"].int()], stored) | {"order": stored["order"]}

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """The bits of `Uniform`, and of the order where it is kept."""
        kept = self.act_order and self.group is not None and not self.static_groups
        return super().bits_per_weight(shape) + (kept and (16 if shape[1] < 2**15 else 32) / shape[0])


class _Chooser:
    """The grids of a matrix while its columns are rounded: known beforehand, or chosen group by group."""

    def __init__(
        self, form: GPTQ, shape: tuple[int, ...], group: int, fixed: Grid | None, order: Int[Tensor, " columns"] | None
    ) -> None:
        self.form, self.group, self.fixed, self.chosen = form, group, fixed, list[Grid]()
        groups = torch.arange(shape[1]) // group
        self.groups = (groups if order is None else groups[order.cpu()]).tolist()
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        if fixed is not None:
            scale, zero = (x.view(shape[0], -1).t().contiguous() for x in (fixed.scale, fixed.zero))
            self.parts = [_part(s, z, fixed.low, fixed.high) for s, z in zip(scale, zero, strict=True)]

    def begin(self, start: int, columns: Float[Tensor, "width rows"]) -> None:
        if self.fixed is None:
            grid = self.form.grid(columns.t())
            self.chosen.append(grid)
            self.parts.append(_part(grid.scale[:, 0], grid.zero[:, 0], grid.low, grid.high))

    def quantize(self, k: int, column: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        scale, low, high = self.parts[self.groups[k] if self.fixed is not None else -1]
        return torch.div(column, scale).round_().clamp_(low, high).mul_(scale)

    def grid(self) -> Grid:
        """The chosen grids in the order of `Uniform.slices`: row by row."""
        scale = torch.stack([grid.scale[:, 0] for grid in self.chosen], 1).view(-1, 1)
        zero = torch.stack([grid.zero[:, 0] for grid in self.chosen], 1).view(-1, 1)
        return Grid(scale, zero, self.chosen[0].low, self.chosen[0].high)


def _part(scale: Tensor, zero: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, lowest, highest whole multiple of it)."""
    return scale, low - zero, high - zero
