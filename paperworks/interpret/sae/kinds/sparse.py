"""Few latents out of many: encoding and decoding that never build a dense gradient or a dense latent matrix.

With k of n latents on, the decoder reads k of its n rows, and the backward pass of the whole autoencoder touches k rows
an input of either matrix. What stays dense is one product: all n pre-activations must be known to find the largest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Latents(NamedTuple):
    """The k latents of each input that may be on: their values, 0 or more, and which they are."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]

    def dense(self, latents: int) -> Float[Tensor, "batch latents"]:
        """All latents, zeros included."""
        return self.values.new_zeros(len(self.values), latents).scatter_(1, self.indices, self.values)


def largest(
    x: Float[Tensor, "batch dim"],
    encoder: Float[Tensor, "latents dim"],
    bias: Float[Tensor, " latents"],
    k: int,
    among: Int[Tensor, " some"] | None = None,
) -> Latents:
    """ReLU of the k largest of `x @ encoder.T + bias` for each input; gradients reach the positive ones only.

    Args:
        x: inputs.
        encoder, bias: the pre-activations' weights.
        k: how many to keep.
        among: latents to choose from; None is all of them.

    Raises ValueError when there are fewer than k latents to choose from.
    """
    available = len(encoder) if among is None else len(among)
    if not 1 <= k <= available:
        raise ValueError(f"k is {k}, but there are {available} latents to choose from")
    values, indices = _Largest.apply(x, encoder, bias, k, among)  # type: ignore[no-untyped-call]
    return Latents(values, indices)


def decode(
    latents: Latents,
    decoder: Float[Tensor, "latents dim"],
    bias: Float[Tensor, " dim"] | None = None,
    *,
    along_sphere: bool = False,
) -> Float[Tensor, "batch dim"]:
    """Sum over the k latents of value * decoder row, plus the bias.

    along_sphere: decoder rows have length 1 and are kept so: take what would change it out of their gradient, as
        `directions.along_sphere` does, which from here costs no second look at all rows.
    """
    decoded: Tensor = _Decode.apply(latents.values, latents.indices, decoder, along_sphere)  # type: ignore[no-untyped-call]
    return decoded if bias is None else decoded + bias


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, k: int, among: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, offsets = (encoder, bias) if among is None else (encoder[among], bias[among])
        values, indices = torch.addmm(offsets, x, rows.T).topk(k, dim=1, sorted=False)
        values = values.relu_()
        if among is not None:
            indices = among[indices]
        ctx.save_for_backward(x, encoder, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x, encoder, values, indices = ctx.saved_tensors
        gradient = torch.where(values > 0, above[0], 0)
        x_gradient = _weighted_rows(encoder, indices, gradient) if ctx.needs_input_grad[0] else None
        encoder_gradient = bias_gradient = None
        if ctx.needs_input_grad[1]:
            encoder_gradient = _spread_rows(x, indices, gradient, len(encoder))
        if ctx.needs_input_grad[2]:
            bias_gradient = gradient.new_zeros(len(encoder)).index_add_(0, indices.flatten(), gradient.flatten())
        return x_gradient, encoder_gradient, bias_gradient, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, decoder: Tensor, along_sphere: bool) -> Tensor:
        ctx.save_for_backward(values, indices, decoder)
        ctx.along_sphere = along_sphere
        return _weighted_rows(decoder, indices, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, decoder = ctx.saved_tensors
        gradient = above[0].contiguous()
        products = _row_products(decoder, indices, gradient)
        if not ctx.needs_input_grad[2]:
            return products, None, None, None
        decoder_gradient = _spread_rows(gradient, indices, values, len(decoder))
        if ctx.along_sphere:
            # gradient_i . row_i = sum of value * (row_i . gradient above) over the inputs for which i is on
            along = products.new_zeros(len(decoder)).index_add_(0, indices.flatten(), (values * products).flatten())
            decoder_gradient.addcmul_(along[:, None], decoder, value=-1)
        return products, None, decoder_gradient, None


def _weighted_rows(
    rows: Float[Tensor, "latents dim"], indices: Int[Tensor, "batch k"], weights: Float[Tensor, "batch k"]
) -> Float[Tensor, "batch dim"]:
    """sum_j weights[b, j] * rows[indices[b, j]]."""
    return functional.embedding_bag(indices, rows, per_sample_weights=weights, mode="sum")


def _row_products(
    rows: Float[Tensor, "latents dim"], indices: Int[Tensor, "batch k"], gradient: Float[Tensor, "batch dim"]
) -> Float[Tensor, "batch k"]:
    """rows[indices[b, j]] . gradient[b]: what torch computes as the weights' gradient, in its own kernel."""
    with torch.enable_grad():
        weights = gradient.new_zeros(indices.shape, requires_grad=True)
        (products,) = torch.autograd.grad(_weighted_rows(rows.detach(), indices, weights), weights, gradient)
    return products


def _spread_rows(
    rows: Float[Tensor, "batch dim"], indices: Int[Tensor, "batch k"], weights: Float[Tensor, "batch k"], latents: int
) -> Float[Tensor, "latents dim"]:
    """Sum over (b, j) with indices[b, j] = i of weights[b, j] * rows[b], for each latent i.

    It is `_weighted_rows` of the transposed sparse matrix, twice as fast on a CPU as adding row by row.
    """
    order = indices.flatten().argsort(stable=True)  # stable: the sums, and so training, repeat bit for bit
    counts = indices.flatten().bincount(minlength=latents)
    owners = order.div(indices.shape[1], rounding_mode="floor")
    return functional.embedding_bag(
        owners, rows, counts.cumsum(0) - counts, per_sample_weights=weights.flatten()[order], mode="sum"
    )
