"""AWQ: inputs that are large get a finer grid (Lin et al. 2023, arXiv:2306.00978)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.compress.calibration.statistics import Statistics
from paperworks.compress.format import Stored, check_weight
from paperworks.compress.formats.grids import Grid, grid_of_range
from paperworks.compress.formats.uniform import Uniform
from paperworks.kernels.packed import Grids

EXPONENTS = tuple(step / 20 for step in range(20))  # Section 3.2: a grid of 20 over [0, 1]
CLIPS = tuple(1 - step / 20 for step in range(10))  # as in the authors' code: 1 down to 0.55 of the largest weight


@dataclass(frozen=True, kw_only=True)
class AWQ(Uniform):
    """W near Q(W diag(s)) diag(s)^-1 with s_j = (mean |x_j|)^alpha: alpha is searched for the least output error.

    The scales are stored with the layer, 16 bits an input, and divided out when the weight is decoded; so every layer
    has its own, and nothing before it has to change (`fold_into_norm` moves them there where that is wanted). The error
    is that of the layer's own output, tr(E H E^T) with H the inputs' second moment; the authors inspect the output of
    the whole attention or MLP, and share s among the layers that read one norm.

    Attributes:
        output_clip: then shrink each group's range to what loses least of the output (Section 3.2's weight clipping).
            The authors leave it out for query and key: give these a format of their own with `targets`.
    """

    output_clip: bool = True

    needs: ClassVar[tuple[str, ...]] = ("second_moment", "absolute_mean")

    def validate(self) -> None:
        """Check that groups lie in rows."""
        super().validate()
        if self.granularity != "row" or self.clip is not None:
            raise ValueError(
                f"AWQ has row granularity and its own clipping (output_clip), got granularity={self.granularity!r}, "
                f"clip={self.clip}; Uniform takes these"
            )

    def encode(self, weight: Float[Tensor, "rows columns"], statistics: Statistics | None = None) -> Stored:
        """The tensors of `Uniform` for W diag(s), and s."""
        check_weight(weight, type(self).__name__)
        known = self.learned(statistics)
        moment = known.required("second_moment").to(weight.device)
        scales, _ = self.search(weight.detach().float(), moment, known.required("absolute_mean").to(weight.device))
        return self._scaled(weight.detach().float() * scales, scales, moment / torch.outer(scales, scales))

    def search(
        self,
        weight: Float[Tensor, "rows columns"],
        second_moment: Float[Tensor, "columns columns"],
        absolute_mean: Float[Tensor, " columns"],
    ) -> tuple[Float[Tensor, " columns"], float]:
        """(s, alpha) of the least output error; s as it is stored."""
        best, exponent, least = torch.ones_like(absolute_mean), 0.0, torch.inf
        for alpha in EXPONENTS:
            scales = channel_scales(absolute_mean, alpha)
            slices = self.slices(weight * scales)
            error = self.grid(slices).nearest(slices).view_as(weight) / scales - weight
            lost = float(((error @ second_moment) * error).sum())
            if lost < least:
                best, exponent, least = scales, alpha, lost
        return best, exponent

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Float[Tensor, "rows columns"]:
        """The grid's values over s."""
        return super().decode(stored, shape) / stored["channel_scales"].float()

    def grids(self, stored: Stored, shape: tuple[int, int]) -> Grids | None:
        """The grid, with 1 / s on its inputs."""
        grids = super().grids(stored, shape)
        return None if grids is None else replace(grids, inputs=1 / stored["channel_scales"].float())

    def reencode(self, weight: Float[Tensor, "rows columns"], stored: Stored) -> Stored:
        """Round to nearest with the channel scales held now."""
        channel = stored["channel_scales"]
        return super().reencode(weight.detach().float() * channel.float(), stored) | {"channel_scales": channel}

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """The bits of `Uniform`, and 16 for each input."""
        return super().bits_per_weight(shape) + 16 / shape[0]

    def _scaled(self, weight: Tensor, scales: Tensor, moment: Tensor) -> Stored:
        slices = self.slices(weight)
        grid = self._clipped(weight, moment) if self.output_clip else self.grid(slices)
        shape = (weight.shape[0], weight.shape[1])
        return self.store(grid.codes(slices), grid, shape) | {"channel_scales": scales.to(torch.float16)}

    def _clipped(self, weight: Tensor, moment: Tensor) -> Grid:
        """The grids whose clipping loses least of the output, each group judged for itself."""
        rows, columns = weight.shape
        group = self.group_of(columns)
        slices = weight.view(rows, -1, group)
        starts = torch.arange(0, columns, group)
        blocks = torch.stack([moment[start : start + group, start : start + group] for start in starts.tolist()])
        top = slices.abs().amax(-1, keepdim=True)
        low, high = slices.amin(-1, keepdim=True), slices.amax(-1, keepdim=True)
        best, least = self.grid(slices), torch.full_like(top, torch.inf)
        for clip in CLIPS:
            bound = top * clip
            grid = grid_of_range(
                torch.maximum(low, -bound),
                torch.minimum(high, bound),
                self.bits,
                self.symmetric,
                getattr(torch, self.scale_dtype),
            )
            error = grid.nearest(slices) - slices
            lost = (torch.einsum("rgi,gij->rgj", error, blocks) * error).sum(-1, keepdim=True)
            better = lost < least
            least = torch.where(better, lost, least)
            scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
            best = Grid(scale, zero, grid.low, grid.high)
        return Grid(best.scale.view(-1, 1), best.zero.view(-1, 1), best.low, best.high)


def channel_scales(absolute_mean: Float[Tensor, " columns"], alpha: float) -> Float[Tensor, " columns"]:
    """s = mean^alpha, at least 1e-4, over sqrt(max s * min s); rounded to float16, as it is stored."""
    scales = absolute_mean.pow(alpha).clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return scales.to(torch.float16).float()


@torch.no_grad()
def fold_into_norm(norm: nn.Module, linears: list[nn.Linear], scales: Float[Tensor, " columns"]) -> None:
    """Multiply the linears' input channels by s and divide the norm before them by it; the function stays the same.

    Raises:
        ValueError: when the norm has no weight to take s, or a linear reads another number of inputs.
    """
    gain = getattr(norm, "weight", None)
    if not isinstance(gain, Tensor) or gain.shape != scales.shape:
        raise ValueError(
            f"{type(norm).__name__} has no weight of shape {tuple(scales.shape)} to take the scales: fold into a norm "
            "with a gain, or let the format store the scales"
        )
    for linear in linears:
        if linear.weight.shape[1:] != scales.shape:
            raise ValueError(f"a linear reads {linear.weight.shape[1]} inputs, there are {len(scales)} scales")
    gain.div_(scales)
    shift = getattr(norm, "bias", None)
    if isinstance(shift, Tensor):
        shift.div_(scales)
    for linear in linears:
        linear.weight.mul_(scales)
