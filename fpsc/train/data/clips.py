"""Clips to encode: which there are, what they show in words, and their frames at a stated size."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpsc.errors import UserError
from fpsc.quality.clips import TENSORS, VIDEOS, ClipError, read, video_frames

CLIPS = VIDEOS | {".gif", ".webp", ".apng", TENSORS}
"""What the name of a clip in a folder ends in."""

FILE_KEYS = ("file", "file_name", "video", "path")
CAPTION_KEYS = ("caption", "text", "prompt")
"""Names of the columns of a list, the first that is there; `file_name` and `text` are those of
Hugging Face's own folders of videos."""


@dataclass(frozen=True)
class Size:
    """Frames and pixels; as text `81x480x832`."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `81x480x832`.

        Raises:
            UserError: it is not three positive numbers.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise UserError(
                f"--size {text}: expected frames, height and width, as 81x480x832, found {text!r}"
            )
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class ClipFile:
    """A clip and what it shows. The name is that of the list, or relative to the folder."""

    name: str
    path: Path
    caption: str


def listed(source: Path) -> list[ClipFile]:
    """The clips of a folder or of a list, in a fixed order.

    A folder's clips have their captions in .txt files of the same name beside them. A list is
    .jsonl or .csv with a file and a caption in each line; files are relative to its folder.

    Raises:
        UserError: there is no such source, no clip in it, a caption or a file is missing, a line
            cannot be read, or a name is there twice.
    """
    suffix = source.suffix.lower()
    if source.is_dir():
        clips = list(_of_folder(source))
        if not clips:
            raise UserError(
                f"{source}: expected clips ({', '.join(sorted(CLIPS))}), found none in the folder"
            )
    elif suffix in (".jsonl", ".csv"):
        rows = _json_lines(source) if suffix == ".jsonl" else _table(source)
        clips = [_of_row(source, line, row) for line, row in rows]
        if not clips:
            raise UserError(f"{source}: expected a clip in each line, found no lines")
    else:
        raise UserError(
            f"{source}: expected a folder of clips, or a list of them in .jsonl or .csv"
            + ("" if source.exists() else "; there is no such file or folder")
        )
    seen: set[str] = set()
    for clip in clips:
        if clip.name in seen:
            raise UserError(f"{source}: {clip.name} is there twice; expected every clip once")
        seen.add(clip.name)
    return clips


def _of_folder(folder: Path) -> Iterator[ClipFile]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in CLIPS)
    missing = [path for path in files if not path.with_suffix(".txt").is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: expected its caption in {missing[0].with_suffix('.txt').name} beside "
            f"it; {len(missing)} of {len(files)} clips have none. Write one for each (an empty "
            "file is the empty prompt), or give a list in .jsonl or .csv"
        )
    for path in files:
        caption = _text(path.with_suffix(".txt")).strip()
        yield ClipFile(path.relative_to(folder).as_posix(), path, caption)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected text in UTF-8: {error}") from error


def _json_lines(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(_text(source).splitlines(), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{source}, line {line}: expected JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{source}, line {line}: expected an object, as "
                f'{{"file": "a.mp4", "caption": "..."}}, found {text.strip()[:40]}'
            )
        yield line, row


def _table(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(source), newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: expected CSV: {error}") from error


def _of_row(source: Path, line: int, row: dict[str, Any]) -> ClipFile:
    def value(keys: Sequence[str], what: str) -> str:
        found = next((row[key] for key in keys if key in row), None)
        if not isinstance(found, str):
            raise UserError(
                f"{source}, line {line}: expected {what} as {' or '.join(keys)}, found "
                f"{', '.join(str(key) for key in row)}"
            )
        return found

    name = value(FILE_KEYS, "the file of a clip")
    path = source.parent / Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{source}, line {line}: expected a clip, found no file {path}")
    return ClipFile(name, path, value(CAPTION_KEYS, "its caption").strip())


def load(clip: ClipFile, sizes: Sequence[Size], fps: float | None) -> Tensor:
    """The frames of a clip, from its start, at the size that is nearest in its proportions.

    Of sizes with those proportions it is the one with most frames that the clip fills. A picture is
    scaled until it covers the size, and what sticks out is cut off on both sides.

    Args:
        fps: takes the frames nearest to each 1 / fps seconds; None takes every one. A clip that
            does not say its rate is taken to have this one.

    Returns:
        float32 [3, F, H, W] in [-1, 1].

    Raises:
        ClipError: it cannot be read, or has too few frames for every size.
    """
    with _frames(clip.path) as (frames, rate):
        # Frames come as float32 [3, H, W]; they are scaled one by one, for memory.
        timed = enumerate(frames)
        first = next(timed, None)
        if first is None:
            raise ClipError(f"{clip.path}: expected frames, found none")
        height, width = first[1][1].shape[1:]
        fitting = _nearest(sizes, height, width)
        wanted = _resampled(chain([first], timed), rate, fps)
        kept: list[Tensor] = []
        for frame in wanted:
            kept.append(_covering(frame, fitting[0].height, fitting[0].width))
            if len(kept) == fitting[0].frames:
                break
    size = next((size for size in fitting if size.frames <= len(kept)), None)
    if size is None:
        at = f" at {fps:g} frames a second" if fps else ""
        raise ClipError(
            f"{clip.path}: expected at least {fitting[-1].frames} frames{at}, found {len(kept)}"
        )
    return torch.stack(kept[: size.frames], dim=1)


def _nearest(sizes: Sequence[Size], height: int, width: int) -> list[Size]:
    """The sizes whose proportions are nearest, and of these one height and width; most frames
    first."""

    def distance(size: Size) -> float:
        return abs(math.log(size.height / size.width) - math.log(height / width))

    best = min(sizes, key=lambda size: (distance(size), -size.height))
    same = [size for size in sizes if (size.height, size.width) == (best.height, best.width)]
    return sorted(same, key=lambda size: -size.frames)


_Timed = tuple[int, tuple[float | None, Tensor]]  # number, seconds, frame


def _resampled(frames: Iterable[_Timed], rate: float | None, fps: float | None) -> Iterator[Tensor]:
    """The frame nearest to each 1 / fps seconds after the first; all of them without `fps`."""
    start: float | None = None
    before: tuple[float, Tensor] | None = None
    count = 0
    for number, (time, frame) in frames:
        if fps is None:
            yield frame
            continue
        now = number / (rate or fps) if time is None else time
        start = now if start is None else start
        # Times that are nearer to the frame before than to this one are decided.
        while before is not None and count / fps < (before[0] + now) / 2 - start:
            yield before[1]
            count += 1
        before = now, frame
    if before is not None and start is not None:
        # The last frame stands for as long as it is nearest to a time of the clip.
        end = before[0] - start + 0.5 / (rate or fps or 1.0)
        while fps is not None and count / fps < end:
            yield before[1]
            count += 1


def _covering(frame: Tensor, height: int, width: int) -> Tensor:
    """[3, H, W] scaled to cover height x width, and cut to it from the middle."""
    scale = max(height / frame.shape[1], width / frame.shape[2])
    tall, wide = (
        max(height, round(frame.shape[1] * scale)),
        max(width, round(frame.shape[2] * scale)),
    )
    if (tall, wide) != tuple(frame.shape[1:]):
        frame = torch.nn.functional.interpolate(
            frame[None], (tall, wide), mode="bicubic", antialias=True
        )[0].clamp(-1, 1)
    top, left = (tall - height) // 2, (wide - width) // 2
    return frame[:, top : top + height, left : left + width]


@contextmanager
def _frames(path: Path) -> Iterator[tuple[Iterator[tuple[float | None, Tensor]], float | None]]:
    """(seconds, float32 [3, H, W] in [-1, 1]) of each frame, and the frames per second."""
    if path.suffix.lower() in VIDEOS and path.is_file():
        with video_frames(path) as (images, rate):
            yield ((time, _levels(image)) for time, image in images), rate
    else:
        clip = read(path)
        yield ((None, frame) for frame in clip.frames.unbind(1)), clip.fps


def _levels(image: Any) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
