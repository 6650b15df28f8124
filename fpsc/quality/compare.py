"""Two clips of the same noise, compared: metrics with a value for each frame, and a page."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpsc.files import replacing
from fpsc.pages import render
from fpsc.quality.clips import Clip
from fpsc.quality.lpips import LpipsMissing, Network, lpips_by_frame
from fpsc.quality.metrics import psnr, psnr_by_frame, ssim_by_frame
from fpsc.quality.pictures import difference, h264, image, write_video

FPS = 16.0
"""Of clips that do not say theirs."""

LOSSLESS = 2_000_000
"""Pixels of a clip up to which a page holds it without loss."""

FACTOR = 4.0
"""Differences are shown this many times as large; a power of two, as the page doubles them."""

OnFrame = Callable[[str, int, int], None]
"""Called with (what is computed, frames done, frames in all)."""


class MismatchError(Exception):
    """Two clips that cannot be compared. The message says what differs."""


@dataclass(frozen=True)
class Measure:
    """One metric of two clips.

    better: `higher` or `lower`. value: of the clips as a whole; PSNR of equal clips is inf.
    """

    name: str
    unit: str
    better: str
    value: float
    by_frame: tuple[float, ...]

    @property
    def worst(self) -> int:
        """The frame where the clips differ most."""
        pick = min if self.better == "higher" else max
        return pick(range(len(self.by_frame)), key=self.by_frame.__getitem__)


@dataclass(frozen=True)
class Comparison:
    """Two clips of one size, the first is the reference; what is between them, and what of it
    could not be computed, with the reason."""

    names: tuple[str, str]
    clips: tuple[Clip, Clip]
    measures: tuple[Measure, ...]
    missing: tuple[str, ...]
    about: Mapping[str, Any]

    @property
    def fps(self) -> float:
        return next((clip.fps for clip in self.clips if clip.fps), FPS)

    def of(self, name: str) -> Measure | None:
        return next((measure for measure in self.measures if measure.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: infinite values (PSNR of equal frames) are null."""
        _, frames, height, width = self.clips[0].frames.shape
        return {
            "names": list(self.names),
            "sources": [clip.source for clip in self.clips],
            "frames": frames,
            "height": height,
            "width": width,
            "fps": self.fps,
            "measures": {
                m.name: {
                    "unit": m.unit,
                    "better": m.better,
                    "value": _finite(m.value),
                    "worst_frame": m.worst,
                    "by_frame": [_finite(value) for value in m.by_frame],
                }
                for m in self.measures
            },
            "missing": list(self.missing),
            **self.about,
        }


def compare(
    a: Clip,
    b: Clip,
    names: tuple[str, str],
    *,
    network: Network = Network.alex,
    about: Mapping[str, Any] | None = None,
    on_frame: OnFrame = lambda label, done, total: None,
) -> Comparison:
    """Measure `b` against `a`.

    about: what else belongs into the record.

    Raises:
        MismatchError: the clips differ in size or in their frames per second.
    """
    if a.frames.shape != b.frames.shape:
        raise MismatchError(
            f"expected two clips of one size, found {a.size} ({a.source}) and {b.size} ({b.source})"
        )
    if a.fps and b.fps and not math.isclose(a.fps, b.fps, rel_tol=0.01):
        raise MismatchError(
            f"expected clips of one speed, found {a.fps:g} frames a second ({a.source}) and "
            f"{b.fps:g} ({b.source})"
        )
    total = a.frames.shape[1]
    x, y = a.frames, b.frames
    measures = [Measure("PSNR", "dB", "higher", psnr(x, y), tuple(psnr_by_frame(x, y)))]
    missing = []
    try:
        structural = ssim_by_frame(x, y, lambda count: on_frame("SSIM", count, total))
        measures.append(_mean("SSIM", "higher", structural))
    except ValueError as error:
        missing.append(f"SSIM: {error}")
    try:
        values = lpips_by_frame(x, y, network, lambda count: on_frame("LPIPS", count, total))
        measures.append(_mean("LPIPS", "lower", values))
    except LpipsMissing as error:
        missing.append(str(error))
    except ValueError as error:
        missing.append(f"LPIPS: {error}")
    return Comparison(names, (a, b), tuple(measures), tuple(missing), dict(about or {}))


def write(
    comparison: Comparison, folder: Path, on_frame: OnFrame = lambda label, done, total: None
) -> list[Path]:
    """Write compare.html (both clips in a player), one video of both, and compare.json.

    The video is an mp4 where an encoder is installed, else an animated webp.
    """
    first, second = (clip.frames for clip in comparison.clips)
    clips = {
        **dict(zip(comparison.names, (first, second), strict=True)),
        f"difference x {FACTOR:g}": difference(first, second, FACTOR),
    }
    scale = max(1, 256 // first.shape[-1])
    page, record = folder / "compare.html", folder / "compare.json"
    video = folder / ("compare.mp4" if h264() else "compare.webp")
    write_video(clips, video, _words(comparison), fps=comparison.fps, scale=scale)
    render.write(page, html(comparison, on_frame))
    with replacing(record) as beside:
        beside.write_text(json.dumps(comparison.as_dict(), indent=1) + "\n", encoding="utf-8")
    return [page, video, record]


def html(comparison: Comparison, on_frame: OnFrame = lambda label, done, total: None) -> str:
    """One page: a player that shows both clips in step, and the metrics over the frames."""
    charts, note = [], None
    try:
        from fpsc.quality.curves import curves
    except ImportError as error:
        note = f'The curves need matplotlib ({error}): pip install "fpsc[pictures]"'
    else:
        charts = [curves(measure) for measure in comparison.measures]
    frames = comparison.clips[0].frames.shape[1]
    pictures: tuple[list[str], list[str]] = ([], [])
    for f in range(frames):
        for clip, urls in zip(comparison.clips, pictures, strict=True):
            urls.append(_data_url(clip, f))
        on_frame("page", f + 1, frames)
    return render.render(
        "compare.html",
        title=" and ".join(comparison.names),
        comparison=comparison,
        charts=charts,
        note=note,
        size=comparison.clips[0].frames.shape,
        pictures=pictures,
        factor=FACTOR,
    )


def _data_url(clip: Clip, frame: int) -> str:
    buffer = io.BytesIO()
    lossless = clip.frames[0].numel() <= LOSSLESS
    image(clip.frames[:, frame]).save(buffer, format="WEBP", quality=92, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _words(comparison: Comparison) -> str:
    return ", ".join(
        f"{m.name} {m.value:.{2 if m.unit else 4}f}{' ' + m.unit if m.unit else ''}"
        for m in comparison.measures
    )


def _mean(name: str, better: str, values: list[float]) -> Measure:
    return Measure(name, "", better, math.fsum(values) / len(values), tuple(values))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
