"""PSNR and SSIM against values that follow from their definitions."""

import math

import pytest
import torch

from fpsc.quality.metrics import psnr, psnr_by_frame, ssim, ssim_by_frame

CLIP = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_equal_clips() -> None:
    assert psnr(CLIP, CLIP) == math.inf
    assert ssim(CLIP, CLIP) == pytest.approx(1)


def test_psnr_of_a_known_error() -> None:
    # An error of a hundredth of the range of 2 everywhere: 20 log10(100).
    assert psnr(CLIP, CLIP + 0.02) == pytest.approx(40, abs=1e-3)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.25), (-0.5, 0.75), (0.0, 1.0)])
def test_ssim_of_constant_clips(a: float, b: float) -> None:
    c1 = 0.02**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    shape = (3, 2, 12, 13)
    assert ssim(torch.full(shape, a), torch.full(shape, b)) == pytest.approx(expected, rel=1e-6)


def test_ssim_of_one_window_by_hand() -> None:
    """11 x 11 pixels hold one window: weighted moments, written out."""
    a, b = CLIP[:1, :1, :11, :11].double(), CLIP[1:2, :1, :11, :11].double()
    r = torch.arange(11, dtype=torch.float64) - 5
    w = torch.exp(-(r[:, None] ** 2 + r[None, :] ** 2) / 4.5)
    w /= w.sum()
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (
        (w * (x - mx) * (y - my)).sum()
        for x, mx, y, my in ((a, ma, a, ma), (b, mb, b, mb), (a, ma, b, mb))
    )
    c1, c2 = 0.02**2, 0.06**2
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert ssim(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_noise_lowers_both() -> None:
    noise = torch.randn(CLIP.shape, generator=torch.Generator().manual_seed(1))
    little, much = CLIP + 0.05 * noise, CLIP + 0.3 * noise
    assert psnr(CLIP, little) > psnr(CLIP, much)
    assert 1 > ssim(CLIP, little) > ssim(CLIP, much)


def test_shapes_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr(CLIP, CLIP[:, :1])
    with pytest.raises(ValueError, match="11x11"):
        ssim(CLIP[..., :8], CLIP[..., :8])


def test_frames_have_values_of_their_own() -> None:
    other = CLIP.clone()
    other[:, 1] += 0.02
    assert psnr_by_frame(CLIP, other) == [math.inf, pytest.approx(40, abs=1e-3)]
    first, second = ssim_by_frame(CLIP, other)
    assert first == pytest.approx(1) and second < 1
    assert ssim(CLIP, other) == pytest.approx((first + second) / 2)
    # The PSNR of the clip is that of its mean error, and not the mean of its PSNRs.
    assert psnr(CLIP, other) == pytest.approx(40 + 10 * math.log10(2), abs=1e-3)
    with pytest.raises(ValueError, match="one shape"):
        ssim_by_frame(CLIP, other[:, :1])
