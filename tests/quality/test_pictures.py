"""The written files hold the frames."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fpsc.quality import pictures
from fpsc.quality.clips import read
from fpsc.quality.pictures import (
    LINE,
    MARGIN,
    difference,
    h264,
    write_gif,
    write_sheet,
    write_video,
)

RED, GREEN = (255, 0, 0), (0, 255, 0)


def flat(rgb: tuple[int, int, int], frames: int) -> torch.Tensor:
    levels = torch.tensor(rgb, dtype=torch.float32) / 127.5 - 1
    return levels[:, None, None, None].expand(3, frames, 64, 64).clone()


def test_gif_has_every_frame_of_both_clips(tmp_path: Path) -> None:
    # Equal frames in a row would be stored as one.
    levels = [(255, 0, 0), (0, 0, 255), (255, 0, 0), (0, 0, 0), (255, 255, 0)]
    first = torch.cat([flat(level, 1) for level in levels], dim=1)
    write_gif({"first": first, "second": flat(GREEN, 5)}, tmp_path / "a.gif", "a title", scale=4)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5
        assert gif.info["loop"] == 0
        at = (gif.height - MARGIN - 128, MARGIN + 128, 2 * MARGIN + 256 + 128)
        colours = []
        for index in range(5):
            gif.seek(index)
            picture = gif.convert("RGB")
            colours.append((picture.getpixel((at[1], at[0])), picture.getpixel((at[2], at[0]))))
    for (left, right), expected in zip(colours, levels, strict=True):
        assert max(abs(x - y) for x, y in zip(left, expected, strict=True)) <= 8
        assert max(abs(x - y) for x, y in zip(right, GREEN, strict=True)) <= 8
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_sheet_has_a_row_for_each_clip_and_its_first_and_last_frame(
    tmp_path: Path, columns: int
) -> None:
    clip = flat(RED, 4)
    clip[:, 3] = 1
    write_sheet({"x": clip, "y": flat(GREEN, 4)}, tmp_path / "a.png", "title", columns, scale=1)
    with Image.open(tmp_path / "a.png") as sheet:
        picture = sheet.convert("RGB")
    assert picture.width == MARGIN + columns * (64 + MARGIN)
    bottom = picture.height - MARGIN - 32
    assert picture.getpixel((MARGIN + 32, bottom)) == GREEN
    above = bottom - 64 - MARGIN - 22
    assert picture.getpixel((MARGIN + 32, above)) == RED
    last = picture.getpixel((picture.width - MARGIN - 32, above))
    assert last == ((255, 255, 255) if columns > 1 else RED)


@pytest.mark.parametrize("ending", ["mp4", "webp", "gif"])
def test_both_clips_are_in_one_video_in_step(tmp_path: Path, ending: str) -> None:
    """Every frame of the video holds that frame of both, and the video keeps its speed."""
    if ending == "mp4" and h264() is None:
        pytest.skip("no encoder for mp4 is installed")
    shades = torch.linspace(-0.8, 0.8, 6)
    first = shades[None, :, None, None].expand(3, 6, 63, 97).clone()
    path = tmp_path / f"both.{ending}"
    write_video({"a": first, "b": -first}, path, "a title", fps=10, scale=2)
    found = read(path)
    assert found.fps == pytest.approx(10)
    assert found.frames.shape[:2] == (3, 6)
    height, width = found.frames.shape[2:]
    assert width >= 3 * MARGIN + 2 * 97 * 2 and height >= 3 * MARGIN + 2 * LINE + 63 * 2
    row = 2 * MARGIN + 2 * LINE + 63
    left = found.frames[:, :, row, MARGIN + 97].mean(0)
    right = found.frames[:, :, row, 2 * MARGIN + 194 + 97].mean(0)
    torch.testing.assert_close(left, shades, rtol=0, atol=0.03)
    torch.testing.assert_close(right, -shades, rtol=0, atol=0.03)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_video_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = {"a": flat(RED, 2)}
    with pytest.raises(ValueError, match=r"\.mp4, \.webp or \.gif"):
        write_video(clips, tmp_path / "a.avi", "", fps=8)
    monkeypatch.setattr(pictures, "h264", lambda: None)
    with pytest.raises(ValueError, match=r"fpsc\[quality\]"):
        write_video(clips, tmp_path / "a.mp4", "", fps=8)
    assert not list(tmp_path.iterdir())


def test_a_difference_is_black_where_clips_are_equal() -> None:
    a = torch.zeros(3, 1, 2, 2)
    b = a.clone()
    b[:, :, 0, 0] = 0.25
    found = difference(a, b, 4)
    assert found[0, 0].tolist() == [[0, -1], [-1, -1]]
