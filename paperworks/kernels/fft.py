"""Causal convolution by the fast Fourier transform, as long as the sequence, channel by channel."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

DIRECT = 32  # up to so many tokens the sum itself is faster, and exactly causal: a later token moves no last bit


def causal_convolution(
    x: Float[Tensor, "batch time channels"], kernel: Float[Tensor, "channels time"]
) -> Float[Tensor, "batch time channels"]:
    """y_t = sum over j <= t of kernel_j x_{t-j}: in time log time operations by FFT, by the sum if short.

    Raises `ValueError` when the kernel is another one than the channels and tokens need.
    """
    batch, time, channels = x.shape
    if kernel.shape != (channels, time):
        raise ValueError(
            f"x of shape (batch={batch}, time={time}, channels={channels}) needs a kernel of shape "
            f"({channels}, {time}), got {tuple(kernel.shape)}"
        )
    if time > DIRECT:
        return fft_convolution(x, kernel)
    padded = functional.pad(x.transpose(1, 2), (time - 1, 0))
    return functional.conv1d(padded, kernel.flip(-1)[:, None], groups=channels).transpose(1, 2)


def fft_convolution(
    x: Float[Tensor, "batch time channels"], kernel: Float[Tensor, "channels time"]
) -> Float[Tensor, "batch time channels"]:
    """The same by FFT. Both are padded with zeros to twice the length, or the end would wrap to the start."""
    time = x.shape[1]
    spectrum = torch.fft.rfft(x.transpose(1, 2).contiguous(), n=2 * time) * torch.fft.rfft(kernel, n=2 * time)
    out: Tensor = torch.fft.irfft(spectrum, n=2 * time)[..., :time].transpose(1, 2)
    return out
