"""How alike two clips are: PSNR and SSIM. Clips are float [3, F, H, W] in [-1, 1]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all frames and channels; inf for equal clips.

    Raises:
        ValueError: the clips differ in shape.
    """
    _check(a, b)
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(2.0**2 / error)  # peak to peak: 2


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Structural similarity, the mean over frames and channels; 1 for equal clips.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE TIP 2004, equation 13: Gaussian window of 11 pixels with
    sigma 1.5, K1 = 0.01, K2 = 0.03, only windows that lie inside the frame.

    Raises:
        ValueError: the clips differ in shape, or a frame is smaller than the window.
    """
    _check(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"frames are {tuple(a.shape[-2:])}; SSIM needs 11x11 pixels or more")
    offset = torch.arange(11, dtype=torch.float64) - 5
    gauss = torch.exp(-offset.square() / (2 * 1.5**2))
    window = torch.outer(gauss, gauss)[None, None] / gauss.sum() ** 2

    def local_mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window)

    x, y = (clip.double().reshape(-1, 1, *clip.shape[-2:]) for clip in (a, b))
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x = local_mean(x * x) - mean_x**2
    var_y = local_mean(y * y) - mean_y**2
    cov = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"expected two clips of one shape, found {a.shape} and {b.shape}")
