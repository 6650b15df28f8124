"""The written files hold the frames."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fpsc.quality.pictures import MARGIN, write_gif, write_sheet

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
