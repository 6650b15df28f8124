"""A comparison's numbers, its page and its JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fpsc.quality import compare as quality
from fpsc.quality.clips import Clip, read
from fpsc.quality.compare import Comparison, Measure, MismatchError, compare, html, write
from fpsc.quality.lpips import LpipsMissing
from fpsc.quality.metrics import psnr, ssim
from tests.pages.reading import Page, check_alone, undeclared

A = torch.rand(3, 5, 24, 40, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
B = A.clone()
B[:, 1:] += 0.02
B[:, 3] += 0.05


def clip(frames: torch.Tensor, fps: float | None = None, source: str = "a.mp4") -> Clip:
    return Clip(frames, fps, source)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(clip(A, 12.0), clip(B, None, "b.mp4"), ("dense", "fast"), about={"seed": 7})


def test_values_of_clip_and_frames(found: Comparison) -> None:
    quality_of = {measure.name: measure for measure in found.measures}
    assert quality_of["PSNR"].value == psnr(A, B) and quality_of["SSIM"].value == ssim(A, B)
    for name in ("PSNR", "SSIM"):
        assert len(quality_of[name].by_frame) == 5 and quality_of[name].worst == 3
    assert math.isinf(quality_of["PSNR"].by_frame[0])
    assert found.of("PSNR") is quality_of["PSNR"] and found.of("x") is None
    assert found.fps == 12


def test_what_takes_long_tells_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []

    def on_frame(*progress: Any) -> None:
        told.append(progress)

    html(compare(clip(A), clip(B), ("a", "b"), on_frame=on_frame), on_frame)
    assert told == [(label, done + 1, 5) for label in ("SSIM", "page") for done in range(5)]


def test_lower_is_better_for_a_distance() -> None:
    assert Measure("LPIPS", "", "lower", 0.2, (0.1, 0.4, 0.3)).worst == 1


def test_what_cannot_be_computed_is_said(
    found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of 24 lines are too small for LPIPS; of 8, for SSIM too."""
    assert [reason.split(":")[0] for reason in found.missing] == ["LPIPS"]
    tiny = compare(clip(A[..., :8, :]), clip(B[..., :8, :]), ("a", "b"))
    assert [reason.split(":")[0] for reason in tiny.missing] == ["SSIM", "LPIPS"]
    assert [measure.name for measure in tiny.measures] == ["PSNR"]

    def missing(*_: object) -> list[float]:
        raise LpipsMissing("LPIPS lacks weights; to get them: do this")

    monkeypatch.setattr(quality, "lpips_by_frame", missing)
    told = compare(clip(A), clip(B), ("a", "b"))
    assert told.missing == ("LPIPS lacks weights; to get them: do this",)
    assert "do this" in " ".join(Page(html(told)).text)


def test_lpips_is_a_measure_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "lpips_by_frame", lambda *_: [0.0, 0.1, 0.1, 0.3, 0.1])
    told = compare(clip(A), clip(B), ("a", "b"))
    measure = told.of("LPIPS")
    assert measure is not None and not told.missing
    assert measure.value == pytest.approx(0.12) and measure.worst == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (clip(B[:, :4], source="b.mp4"), r"5 frames of 24x40 \(a.mp4\) and 4 frames of 24x40"),
        (clip(B, 24.0, "b.mp4"), r"12 frames a second \(a.mp4\) and 24"),
    ],
)
def test_clips_that_cannot_be_compared(other: Clip, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        compare(clip(A, 12.0), other, ("a", "b"))


def numbers_of(found: Comparison) -> set[float]:
    given = {float(x) for m in found.measures for x in (m.value, m.worst, *m.by_frame)}
    return given | {*map(float, found.clips[0].frames.shape), found.fps, *map(float, range(5))}


def test_every_number_of_the_page_is_one_of_the_comparison(found: Comparison) -> None:
    page = Page(html(found))
    check_alone(page)
    assert {value for value, _ in page.values} <= numbers_of(found)
    for measure in found.measures:
        assert {measure.value, *measure.by_frame} <= {value for value, _ in page.values}
    assert not undeclared(page, " ".join([*found.missing, "7"]))


def test_the_player_holds_every_frame_of_both(found: Comparison) -> None:
    source = html(found)
    frames = json.loads(re.search(r"const pictures = (.*);", source)[1])  # type: ignore[index]
    assert [len(each) for each in frames] == [5, 5]
    assert len({url for each in frames for url in each}) == 9  # the first frames are equal
    assert all(url.startswith("data:image/webp;base64,") for each in frames for url in each)


def test_names_cannot_break_out_of_the_page() -> None:
    bad = "</script><script>alert(1)</script>"
    source = html(compare(clip(A), clip(B), (bad, "b"), about={"prompt": bad}))
    assert "<script>alert" not in source
    check_alone(Page(source))


def test_files(found: Comparison, tmp_path: Path) -> None:
    page, video, record = write(found, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        page.name,
        video.name,
        record.name,
    }
    told = json.loads(record.read_text())
    assert told == found.as_dict() == json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["measures"]["PSNR"]["by_frame"][0] is None and told["seed"] == 7
    assert told["measures"]["PSNR"]["worst_frame"] == 3
    seen = read(video)
    assert seen.frames.shape[1] == 5 and seen.fps == pytest.approx(12, rel=0.01)
    assert seen.frames.shape[3] > 3 * 40  # both clips and their difference


def test_a_page_without_matplotlib_says_what_is_missing(
    found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fpsc.quality.curves", None)
    page = Page(html(found))
    check_alone(page)
    assert "<svg" not in page.source and 'pip install "fpsc[pictures]"' in " ".join(page.text)
