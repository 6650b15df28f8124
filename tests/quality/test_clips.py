"""Clips are read as what they are, whatever file holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fpsc.quality.clips import Clip, ClipError, from_bytes, read, to_bytes, write_tensor

LEVELS = torch.randint(0, 256, (5, 12, 20, 3), generator=torch.Generator().manual_seed(0)).byte()
"""uint8 [F, H, W, 3]."""


def same(clip: Clip, fps: float | None) -> None:
    assert clip.frames.dtype == torch.float32 and clip.fps == fps
    assert torch.equal(to_bytes(clip.frames), LEVELS)


def images() -> list[Image.Image]:
    return [Image.fromarray(frame.numpy()) for frame in LEVELS]


def test_bytes_there_and_back() -> None:
    assert torch.equal(to_bytes(from_bytes(LEVELS)), LEVELS)
    assert from_bytes(LEVELS).min() >= -1 and from_bytes(LEVELS).max() <= 1


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_moving_pictures(tmp_path: Path, ending: str) -> None:
    first, *rest = images()
    path = tmp_path / f"a.{ending}"
    first.save(path, save_all=True, append_images=rest, duration=40, lossless=True)
    same(read(path), 25)


def test_a_folder_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number, picture in zip((8, 9, 10, 11, 100), images(), strict=True):
        picture.save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    same(read(tmp_path), None)


LAYOUTS = {
    "FHWC": LEVELS,
    "FCHW": LEVELS.permute(0, 3, 1, 2),
    "CFHW": LEVELS.permute(3, 0, 1, 2),
    "1FCHW": LEVELS.permute(0, 3, 1, 2)[None],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["uint8", "0..1", "-1..1"])
def test_tensors(layout: str, kind: str, tmp_path: Path) -> None:
    tensor, metadata = LAYOUTS[layout].contiguous(), {"fps": "24"}
    if kind != "uint8":
        tensor = tensor.float() / 255
    if kind == "-1..1":
        tensor, metadata = tensor * 2 - 1, {**metadata, "range": kind}
    save_file({"video": tensor}, tmp_path / "a.safetensors", metadata)
    same(read(tmp_path / "a.safetensors"), 24)


def test_a_clip_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    write_tensor(Clip(from_bytes(LEVELS), 12.5, ""), path)
    same(read(path), 12.5)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=30)  # lossless
        stream.width, stream.height, stream.pix_fmt = 20, 12, "bgr0"
        for frame in LEVELS.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    same(read(tmp_path / "a.mkv"), 30)


def tensor_file(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata)


FLOATS = torch.linspace(0, 1, 96).reshape(2, 4, 4, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "ends in .txt"),
        ("a.mp4", b"x", "cannot be read as a video"),
        ("a.gif", b"x", "cannot be read as a moving picture"),
        ("a.safetensors", b"x", "cannot be read as safetensors"),
        ("a.safetensors", tensor_file({"a": FLOATS, "b": FLOATS.clone()}), "one tensor, found 2"),
        ("a.safetensors", tensor_file({"a": FLOATS[..., :2].contiguous()}), r"\(2, 4, 4, 2\)"),
        ("a.safetensors", tensor_file({"a": FLOATS - 0.5}), "metadata"),
        ("a.safetensors", tensor_file({"a": FLOATS * np.nan}), "found nan"),
        ("a.safetensors", tensor_file({"a": FLOATS.long()}), "uint8 or floats"),
        ("a.safetensors", tensor_file({"a": FLOATS}, {"range": "0..9"}), r"0\.\.9"),
        ("a.safetensors", tensor_file({"a": FLOATS}, {"fps": "many"}), "found many"),
    ],
)
def test_what_is_no_clip_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_folders_that_hold_no_clip(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="found none"):
        read(tmp_path)
    with pytest.raises(ClipError, match="is not there"):
        read(tmp_path / "nowhere")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "2.png")
    with pytest.raises(ClipError, match="frame 1 is 4x5, the first 4x4"):
        read(tmp_path)
    (tmp_path / "2.png").write_bytes(b"x")
    with pytest.raises(ClipError, match=r"2\.png cannot be read"):
        read(tmp_path)
