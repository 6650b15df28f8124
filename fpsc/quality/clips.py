"""Read clips: videos, moving pictures, folders of frames, tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
MOVING = frozenset({".gif", ".webp", ".png", ".apng"})
FRAMES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
TENSORS = ".safetensors"
RANGE = "range"
"""Key in the metadata of a tensor file: `-1..1` or `0..1`, the range of its floats."""

KINDS = (
    "a video (mp4, mov, mkv, webm, avi), a moving picture (gif, webp, png), a folder of frames or "
    "a safetensors file"
)


class ClipError(Exception):
    """A clip that cannot be read. The message names the file, what was expected and found."""


@dataclass(frozen=True)
class Clip:
    """frames: float32 [3, F, H, W] in [-1, 1]; fps: None where the source does not say."""

    frames: torch.Tensor
    fps: float | None
    source: str

    @property
    def size(self) -> str:
        """In words, as `81 frames of 480x832`."""
        _, frames, height, width = self.frames.shape
        return f"{frames} frames of {height}x{width}"


def read(path: Path) -> Clip:
    """Read a clip by what its name ends in.

    A tensor is uint8, or floats in 0..1 as diffusers returns them (in -1..1 where the file's
    metadata says `range: -1..1`), with the sizes of diffusers' frames: [F, H, W, 3], [F, 3, H, W]
    or [3, F, H, W], with or without a batch of one.

    Raises:
        ClipError: there is no such file, it is none of these, or it holds no clip.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ClipError(f"{path} is not there; expected {KINDS}")
    suffix = path.suffix.lower()
    if suffix in VIDEOS:
        return _video(path)
    if suffix in MOVING:
        return _moving(path)
    if suffix == TENSORS:
        return _tensors(path)
    raise ClipError(f"{path}: expected {KINDS}, found a file that ends in {suffix or 'nothing'}")


def write_tensor(clip: Clip, path: Path) -> None:
    """Write a clip without loss but of its rounding to 8 bits: uint8 [F, H, W, 3]."""
    from safetensors.torch import save

    from fpsc.files import replacing

    metadata = {} if clip.fps is None else {"fps": str(clip.fps)}
    with replacing(path) as beside:
        beside.write_bytes(save({"frames": to_bytes(clip.frames).contiguous()}, metadata))


def to_bytes(frames: torch.Tensor) -> torch.Tensor:
    """float [3, F, H, W] in [-1, 1] as uint8 [F, H, W, 3]."""
    levels = ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0)


def from_bytes(levels: torch.Tensor) -> torch.Tensor:
    """uint8 [F, H, W, 3] as float32 [3, F, H, W] in [-1, 1]."""
    return levels.permute(3, 0, 1, 2).float() / 127.5 - 1


def _stacked(images: Iterable[np.ndarray], path: Path) -> torch.Tensor:
    levels: list[np.ndarray] = []
    for image in images:
        if levels and image.shape != levels[0].shape:
            a, b = levels[0].shape[:2], image.shape[:2]
            raise ClipError(
                f"{path}: frame {len(levels)} is {b[0]}x{b[1]}, the first {a[0]}x{a[1]}"
            )
        levels.append(image)
    if not levels:
        raise ClipError(f"{path}: expected frames, found none")
    return from_bytes(torch.from_numpy(np.stack(levels)))


@contextmanager
def video_frames(
    path: Path,
) -> Iterator[tuple[Iterator[tuple[float | None, np.ndarray]], float | None]]:
    """The frames of a video, decoded one by one as they are asked for, and its frames per second.

    Yields:
        ((seconds from the start of the stream, uint8 [H, W, 3]) of each frame, fps); what the file
        does not say is None.

    Raises:
        ClipError: it cannot be read as a video, or PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ClipError(
            f'{path}: to read videos, install PyAV: pip install "fpsc[quality]" ({error})'
        ) from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ClipError(f"{path}: expected a video, found no stream of pictures")
            stream = container.streams.video[0]
            fps = float(stream.average_rate) if stream.average_rate else None
            yield ((f.time, f.to_ndarray(format="rgb24")) for f in container.decode(stream)), fps
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path} cannot be read as a video: {error}") from error


def _video(path: Path) -> Clip:
    with video_frames(path) as (frames, fps):
        return Clip(_stacked((image for _, image in frames), path), fps, str(path))


def _moving(path: Path) -> Clip:
    try:
        with Image.open(path) as picture:
            # A frame's time is known once it is decoded.
            times, images = [], []
            for frame in ImageSequence.Iterator(picture):
                images.append(np.asarray(frame.convert("RGB")))
                times.append(float(frame.info.get("duration") or 0))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ClipError(f"{path} cannot be read as a moving picture: {error}") from error
    mean = sum(times) / len(times)
    return Clip(_stacked(images, path), 1000 / mean if mean else None, str(path))


def _folder(path: Path) -> Clip:
    files = [file for file in path.iterdir() if file.suffix.lower() in FRAMES]
    if not files:
        raise ClipError(f"{path}: expected frames (png, jpg ...) in the folder, found none")

    def load(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as picture:
                return np.asarray(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise ClipError(f"{file} cannot be read as a picture: {error}") from error

    return Clip(_stacked(map(load, sorted(files, key=_natural)), path), None, str(path))


def _natural(file: Path) -> list[tuple[int, str]]:
    """Frame 10 comes after frame 9, however their numbers are written."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _PARTS.split(file.name)]


_PARTS = re.compile(r"(\d+)")


def _tensors(path: Path) -> Clip:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if len(names) != 1:
                raise ClipError(f"{path}: expected one tensor, found {len(names)}: {names}")
            tensor = file.get_tensor(names[0])
    except (SafetensorError, OSError) as error:
        raise ClipError(f"{path} cannot be read as safetensors: {error}") from error
    fps = metadata.get("fps")
    try:
        rate = None if fps is None else float(fps)
    except ValueError as error:
        raise ClipError(f"{path}: expected a number as fps in the metadata, found {fps}") from error
    frames = _in_range(_ordered(tensor, path), metadata.get(RANGE), path)
    return Clip(frames, rate, str(path))


def _ordered(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """[3, F, H, W] of what a pipeline returns."""
    given = tuple(tensor.shape)
    if tensor.ndim == 5 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim == 4:
        if tensor.shape[-1] == 3:
            return tensor.permute(3, 0, 1, 2)
        if tensor.shape[1] == 3:
            return tensor.transpose(0, 1)
        if tensor.shape[0] == 3:
            return tensor
    raise ClipError(
        f"{path}: expected a tensor [F, H, W, 3], [F, 3, H, W] or [3, F, H, W], found {given}"
    )


def _in_range(tensor: torch.Tensor, named: str | None, path: Path) -> torch.Tensor:
    """float32 in [-1, 1]."""
    if tensor.dtype == torch.uint8:
        return tensor.float() / 127.5 - 1
    if not tensor.is_floating_point():
        raise ClipError(f"{path}: expected uint8 or floats, found {tensor.dtype}")
    bounds = {None: (0.0, 1.0), "0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0)}.get(named)
    if bounds is None:
        raise ClipError(f"{path}: expected {RANGE} 0..1 or -1..1 in the metadata, found {named}")
    values = tensor.float()
    low, high = values.min().item(), values.max().item()
    if not (bounds[0] - 1e-3 <= low and high <= bounds[1] + 1e-3):  # False for NaN too
        raise ClipError(
            f"{path}: expected floats from {bounds[0]:g} to {bounds[1]:g}, found {low:.3g} to "
            f"{high:.3g}; where they are from -1 to 1, save them with the metadata "
            f'{{"{RANGE}": "-1..1"}}'
        )
    return (values if bounds[0] < 0 else values * 2 - 1).clamp(-1, 1)
