"""How alike two clips are: PSNR and SSIM. Clips are float [3, F, H, W] in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

WINDOW = 11
"""Side of SSIM's window, in pixels."""


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all frames and channels; inf for equal clips.

    Raises:
        ValueError: the clips differ in shape.
    """
    return _decibel(_squared_error(a, b).mean().item())


def psnr_by_frame(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """PSNR in dB of each frame; inf for equal frames.

    Raises:
        ValueError: the clips differ in shape.
    """
    return [_decibel(error) for error in _squared_error(a, b).tolist()]


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Structural similarity, the mean over frames and channels; 1 for equal clips.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE TIP 2004, equation 13: Gaussian window of 11 pixels with
    sigma 1.5, K1 = 0.01, K2 = 0.03, only windows that lie inside the frame.

    Raises:
        ValueError: the clips differ in shape, or a frame is smaller than the window.
    """
    values = ssim_by_frame(a, b)
    return math.fsum(values) / len(values)


def ssim_by_frame(
    a: torch.Tensor, b: torch.Tensor, on_frame: Callable[[int], None] = lambda done: None
) -> list[float]:
    """SSIM of each frame, the mean over channels. Raises what `ssim` raises."""
    _check(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"frames are {tuple(a.shape[-2:])}; SSIM needs 11x11 pixels or more")
    # Frame by frame: in float64 the moments of a whole clip would take gigabytes.
    values = []
    for f in range(a.shape[1]):
        values.append(_ssim(a[:, f].double(), b[:, f].double()))
        on_frame(f + 1)
    return values


def _ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of two frames, float64 [C, H, W]."""
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    gauss = torch.exp(-offset.square() / (2 * 1.5**2))
    gauss /= gauss.sum()
    columns, rows = gauss[None, None, :, None], gauss[None, None, None, :]
    moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]
    means = F.conv2d(F.conv2d(moments, columns), rows)  # the window is a product of two lines
    mean_x, mean_y, square_x, square_y, product = means.unflatten(0, (5, -1))
    var_x, var_y = square_x - mean_x**2, square_y - mean_y**2
    cov = product - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def _squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float64 [F]: the mean squared error of each frame."""
    _check(a, b)
    frames = range(a.shape[1])
    errors = [(a[:, f].double() - b[:, f].double()).square().mean() for f in frames]
    return torch.stack(errors)


def _decibel(error: float) -> float:
    return math.inf if error == 0 else 10 * math.log10(2.0**2 / error)  # peak to peak: 2


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"expected two clips of one shape, found {tuple(a.shape)} and {tuple(b.shape)}"
        )
