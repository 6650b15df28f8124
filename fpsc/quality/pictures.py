"""Frames of clips as a moving and a still picture. Clips are float [3, F, H, W] in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fpsc.files import replacing
from fpsc.quality.clips import to_bytes

MARGIN, LINE = 8, 22
INK, PAPER = (20, 20, 20), (255, 255, 255)

H264 = ("libx264", "libopenh264")
"""Encoders whose mp4 every browser plays, the better one first."""


def h264() -> str | None:
    """The encoder for mp4 that is installed (PyAV brings one); None without."""
    try:
        import av
    except ImportError:
        return None
    return next((name for name in H264 if name in av.codecs_available), None)


def write_video(
    clips: Mapping[str, torch.Tensor], path: Path, title: str, *, fps: float, scale: int = 1
) -> None:
    """Write the clips side by side, each under its label, as one video: they cannot run apart.

    path: ends in .mp4 (which needs `h264()`), .webp or .gif.

    Raises:
        ValueError: another ending, or mp4 without an encoder.
    """
    if path.suffix == ".gif":
        write_gif(clips, path, title, scale, fps)
        return
    pictures = _pictures(clips, title, scale)
    if path.suffix == ".webp":
        first, *rest = pictures
        with replacing(path) as beside:
            first.save(
                beside,
                format="WEBP",
                save_all=True,
                append_images=rest,
                duration=round(1000 / fps),
                loop=0,
                quality=90,
            )
    elif path.suffix == ".mp4":
        _write_mp4(pictures, path, fps)
    else:
        raise ValueError(f"{path}: expected a name that ends in .mp4, .webp or .gif")


def write_clip(clip: torch.Tensor, path: Path, *, fps: float) -> None:
    """Write one clip and nothing beside it, as an mp4.

    Raises:
        ValueError: no encoder is installed.
    """
    _write_mp4((image(clip[:, f]) for f in range(clip.shape[1])), path, fps)


def _write_mp4(pictures: Iterator[Image.Image], path: Path, fps: float) -> None:
    encoder = h264()
    if encoder is None:
        raise ValueError(f'{path}: mp4 needs an encoder: pip install "fpsc[quality]"')
    with replacing(path) as beside:
        _encode(pictures, beside, encoder, fps)


def _encode(pictures: Iterator[Image.Image], path: Path, encoder: str, fps: float) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"  # the one that every player knows
        if encoder == "libx264":
            stream.options = {"crf": "16"}
        else:
            stream.bit_rate = 20_000_000
        for index, picture in enumerate(pictures):
            picture = _even(picture)
            if index == 0:
                stream.width, stream.height = picture.size
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))


def _even(picture: Image.Image) -> Image.Image:
    """With sides of even length, as yuv420p needs: padded with paper."""
    width, height = picture.width + picture.width % 2, picture.height + picture.height % 2
    if picture.size == (width, height):
        return picture
    padded = Image.new("RGB", (width, height), PAPER)
    padded.paste(picture)
    return padded


def write_gif(
    clips: Mapping[str, torch.Tensor], path: Path, title: str, scale: int = 4, fps: float = 8
) -> None:
    """Write the clips side by side, each under its label, as a GIF that loops."""
    pictures = list(_pictures(clips, title, scale))
    # One palette for all frames: with one each, flat areas flicker.
    palette = _stack(pictures).quantize(256)
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    with replacing(path) as beside:
        indexed[0].save(
            beside,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=round(1000 / fps),
            loop=0,
        )


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
            sheet.paste(image(clip[:, f], scale), at)
        y += LINE + height + MARGIN
    with replacing(path) as beside:
        sheet.save(beside, format="PNG")


def image(frame: torch.Tensor, scale: int = 1) -> Image.Image:
    """[3, H, W] in [-1, 1] as an image, every pixel a square of `scale` pixels."""
    picture = Image.fromarray(to_bytes(frame[:, None])[0].contiguous().numpy())
    size = picture.width * scale, picture.height * scale
    return picture if scale == 1 else picture.resize(size, Image.Resampling.NEAREST)


def difference(a: torch.Tensor, b: torch.Tensor, factor: float = 4) -> torch.Tensor:
    """How far apart two clips are, as a clip: black where they are equal."""
    return ((a - b).abs() * factor - 1).clamp(-1, 1)


def _pictures(clips: Mapping[str, torch.Tensor], title: str, scale: int) -> Iterator[Image.Image]:
    """Frame by frame, all clips in a row."""
    for f in range(next(iter(clips.values())).shape[1]):
        yield _row({name: clip[:, f] for name, clip in clips.items()}, title, scale)


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
    for column, (name, frame) in enumerate(images.items()):
        x = MARGIN + column * (width + MARGIN)
        _text(draw, (x, 2 * MARGIN + LINE), name, width)
        picture.paste(image(frame, scale), (x, 2 * MARGIN + 2 * LINE))
    return picture


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures, of one size, in one column."""
    width, height = pictures[0].size
    column = Image.new("RGB", (width, height * len(pictures)))
    for index, picture in enumerate(pictures):
        column.paste(picture, (0, index * height))
    return column


def _text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int) -> None:
    """Write one line, in the largest size up to 14 that fits into `width` pixels."""
    for size in range(14, 7, -1):
        font = ImageFont.load_default(size=size)
        if draw.textlength(text, font=font) <= width:
            break
    draw.text(at, text, fill=INK, font=font)
