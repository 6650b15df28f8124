"""Frames of clips as a moving and a still picture. Clips are float [3, F, H, W] in [-1, 1]."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE = 8, 22
INK, PAPER = (20, 20, 20), (255, 255, 255)


def write_gif(clips: Mapping[str, torch.Tensor], path: Path, title: str, scale: int = 4) -> None:
    """Write the clips side by side, each under its label, as a GIF that loops at 8 frames/s."""
    frames = next(iter(clips.values())).shape[1]
    pictures = [
        _row({name: clip[:, f] for name, clip in clips.items()}, title, scale)
        for f in range(frames)
    ]
    # One palette for all frames: with one each, flat areas flicker.
    palette = _stack(pictures).quantize(256)
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    indexed[0].save(
        temporary, format="GIF", save_all=True, append_images=indexed[1:], duration=125, loop=0
    )
    os.replace(temporary, path)


def write_sheet(
    clips: Mapping[str, torch.Tensor], path: Path, title: str, columns: int = 8, scale: int = 2
) -> None:
    """Write a PNG with a row for each clip and `columns` of its frames, evenly spaced."""
    frames = next(iter(clips.values())).shape[1]
    chosen = [round(i * (frames - 1) / max(1, columns - 1)) for i in range(columns)]
    first = next(iter(clips.values()))
    height, width = first.shape[2] * scale, first.shape[3] * scale
    sheet = Image.new(
        "RGB",
        (
            MARGIN + columns * (width + MARGIN),
            2 * MARGIN + LINE + len(clips) * (LINE + height + MARGIN),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    _text(draw, (MARGIN, MARGIN), title, sheet.width - 2 * MARGIN)
    y = 2 * MARGIN + LINE
    for name, clip in clips.items():
        _text(draw, (MARGIN, y), name, sheet.width - 2 * MARGIN)
        for column, f in enumerate(chosen):
            at = (MARGIN + column * (width + MARGIN), y + LINE)
            sheet.paste(_image(clip[:, f], scale), at)
        y += LINE + height + MARGIN
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, path)


def _row(images: Mapping[str, torch.Tensor], title: str, scale: int) -> Image.Image:
    first = next(iter(images.values()))
    height, width = first.shape[1] * scale, first.shape[2] * scale
    picture = Image.new(
        "RGB",
        (MARGIN + len(images) * (width + MARGIN), 3 * MARGIN + 2 * LINE + height),
        PAPER,
    )
    draw = ImageDraw.Draw(picture)
    _text(draw, (MARGIN, MARGIN), title, picture.width - 2 * MARGIN)
    for column, (name, image) in enumerate(images.items()):
        x = MARGIN + column * (width + MARGIN)
        _text(draw, (x, 2 * MARGIN + LINE), name, width)
        picture.paste(_image(image, scale), (x, 2 * MARGIN + 2 * LINE))
    return picture


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures, of one size, in one column."""
    width, height = pictures[0].size
    column = Image.new("RGB", (width, height * len(pictures)))
    for index, picture in enumerate(pictures):
        column.paste(picture, (0, index * height))
    return column


def _image(frame: torch.Tensor, scale: int) -> Image.Image:
    """[3, H, W] in [-1, 1] as an image, every pixel a square of `scale` pixels."""
    levels = ((frame.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int) -> None:
    """Write one line, in the largest size up to 14 that fits into `width` pixels."""
    for size in range(14, 7, -1):
        font = ImageFont.load_default(size=size)
        if draw.textlength(text, font=font) <= width:
            break
    draw.text(at, text, fill=INK, font=font)
