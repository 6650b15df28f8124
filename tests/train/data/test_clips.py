"""Which clips there are, and their frames at a stated size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpsc.errors import UserError
from fpsc.quality.clips import Clip, ClipError, write_tensor
from fpsc.train.data.clips import ClipFile, Size, listed, load


def levels(frames: int, height: int = 8, width: int = 12) -> Tensor:
    """float32 [3, F, H, W]: frame i is i / 50 everywhere."""
    return (torch.arange(frames) / 50).view(1, -1, 1, 1).expand(3, -1, height, width).contiguous()


def store(path: Path, frames: Tensor, fps: float | None = 8.0) -> ClipFile:
    write_tensor(Clip(frames, fps, ""), path)
    return ClipFile(path.name, path, "")


def numbers(frames: Tensor) -> list[int]:
    """Which frames of `levels` these are."""
    return [round(value * 50) for value in frames[0, :, 0, 0].tolist()]


# ---- which clips


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.gif", "a/b.WEBM"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text(f" shows {name}\n", encoding="utf-8")
    (tmp_path / "notes.md").touch()
    assert [(c.name, c.caption) for c in listed(tmp_path)] == [
        (name, f"shows {name}") for name in ("a/b.WEBM", "a/c.gif", "b.mp4")
    ]
    (tmp_path / "a/c.txt").unlink()
    with pytest.raises(UserError, match=r"c.gif: expected its caption in c.txt .* 1 of 3 clips"):
        listed(tmp_path)
    (tmp_path / "a/b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a/c.txt").touch()
    with pytest.raises(UserError, match="b.txt: expected text in UTF-8"):
        listed(tmp_path)


@pytest.mark.parametrize("keys", [("file", "caption"), ("file_name", "text"), ("video", "prompt")])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_list(tmp_path: Path, keys: tuple[str, str], kind: str) -> None:
    rows = [("a.mp4", 'a "red" disc, left'), ("sub/b.mp4", "")]
    (tmp_path / "sub").mkdir()
    for name, _ in rows:
        (tmp_path / name).touch()
    path = tmp_path / f"list.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({keys[0]: name, "fps": 3, keys[1]: text}) for name, text in rows]
        path.write_text("\n".join([*lines, "", ""]))
    else:
        quoted = [f'{name},"{text.replace(chr(34), chr(34) * 2)}"' for name, text in rows]
        path.write_text("\n".join([",".join(keys), *quoted]) + "\n")
    found = listed(path)
    assert [(clip.name, clip.caption) for clip in found] == rows
    assert [clip.path for clip in found] == [tmp_path / name for name, _ in rows]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.jsonl", '{"file": "a.mp4", "caption": "x"}\n{', "l.jsonl, line 2: expected JSON"),
        ("l.jsonl", "[1]", r"line 1: expected an object, .* found \[1\]"),
        ("l.jsonl", '{"caption": "x"}', "line 1: expected the file of a clip as file or .* caption"),
        ("l.jsonl", '{"file": "a.mp4"}', "line 1: expected its caption as caption or text"),
        ("l.jsonl", '{"file": "b.mp4", "caption": "x"}', "line 1: expected a clip, found no file"),
        ("l.csv", "file,caption\na.mp4,x\na.mp4,y\n", "a.mp4 is there twice"),
        ("l.csv", "name,caption\na.mp4,x\n", "line 2: expected the file of a clip"),
        ("l.jsonl", "\n", "expected a clip in each line, found no lines"),
        ("l.txt", "a.mp4", "expected a folder of clips, or a list of them in .jsonl or .csv$"),
    ],
)
def test_a_bad_list(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        listed(tmp_path / name)


def test_no_clips(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none in the folder"):
        listed(tmp_path)
    with pytest.raises(UserError, match="there is no such file or folder"):
        listed(tmp_path / "nowhere")


# ---- their frames


@pytest.mark.parametrize(
    ("text", "found"), [("81x480x832", Size(81, 480, 832)), ("1x2x3", Size(1, 2, 3))]
)
def test_sizes(text: str, found: Size) -> None:
    assert Size.parse(text) == found and str(found) == text


@pytest.mark.parametrize("text", ["81x480", "81x480x832x3", "0x4x4", "ax4x4", "81 x 480 x 832", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="expected frames, height and width, as 81x480x832"):
        Size.parse(text)


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (8.0, None, [0, 1, 2, 3, 4]),
        (8.0, 8.0, [0, 1, 2, 3, 4]),
        (8.0, 4.0, [0, 2, 4, 6, 8]),
        (8.0, 16.0, [0, 1, 1, 2, 2]),  # a time in the middle of two goes to the later one
        (8.0, 3.0, [0, 3, 5, 8, 11]),
        (None, 4.0, [0, 1, 2, 3, 4]),
    ],
)
def test_frames_are_resampled(
    tmp_path: Path, rate: float | None, fps: float | None, expected: list[int]
) -> None:
    clip = store(tmp_path / "a.safetensors", levels(20), rate)
    assert numbers(load(clip, [Size(5, 8, 12)], fps)) == expected


def test_resampled_to_the_end(tmp_path: Path) -> None:
    """8 frames at 8 a second are one second: 4 frames at 4 a second, and not 5."""
    clip = store(tmp_path / "a.safetensors", levels(8))
    assert numbers(load(clip, [Size(4, 8, 12)], 4.0)) == [0, 2, 4, 6]
    with pytest.raises(ClipError, match="at least 5 frames at 4 frames a second, found 4"):
        load(clip, [Size(5, 8, 12)], 4.0)


def test_the_most_frames_that_the_clip_fills(tmp_path: Path) -> None:
    clip = store(tmp_path / "a.safetensors", levels(7))
    sizes = [Size(5, 8, 12), Size(9, 8, 12), Size(1, 8, 12), Size(9, 12, 8)]
    assert load(clip, sizes, None).shape == (3, 5, 8, 12)
    with pytest.raises(ClipError, match="at least 9 frames, found 7"):
        load(clip, [Size(9, 8, 12), Size(1, 12, 8)], None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [((30, 50), (8, 12)), ((50, 30), (12, 8)), ((20, 20), (10, 10)), ((8, 100), (8, 12))],
)
def test_the_size_of_the_nearest_proportions(
    tmp_path: Path, given: tuple[int, int], expected: tuple[int, int]
) -> None:
    clip = store(tmp_path / "a.safetensors", levels(1, *given))
    sizes = [Size(1, 8, 12), Size(1, 12, 8), Size(1, 10, 10)]
    assert load(clip, sizes, None).shape == (3, 1, *expected)


def test_what_sticks_out_is_cut_from_the_middle(tmp_path: Path) -> None:
    """16 x 40 to 8 x 8: half the size, and the middle 16 of 40 columns."""
    ramp = torch.linspace(-1, 1, 40).expand(3, 1, 16, 40).contiguous()
    found = load(store(tmp_path / "a.safetensors", ramp), [Size(1, 8, 8)], None)
    expected = ramp[0, 0, 0, 12:28].reshape(8, 2).mean(1)
    torch.testing.assert_close(found[0, 0, 4], expected, atol=0.01, rtol=0)
    torch.testing.assert_close(found, found[:1, :, :1].expand_as(found))


def test_a_size_that_fits_changes_nothing(tmp_path: Path) -> None:
    levels_ = (torch.randint(0, 256, (3, 4, 8, 12)).float() / 127.5) - 1
    clip = store(tmp_path / "a.safetensors", levels_)
    torch.testing.assert_close(load(clip, [Size(4, 8, 12)], None), levels_, atol=1e-6, rtol=0)


def test_a_video_is_read_no_further_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its own times count: half its rate is every other frame."""
    pytest.importorskip("av")
    import fpsc.quality.clips as clips
    from fpsc.quality.pictures import h264, write_clip

    if not h264():
        pytest.skip("no encoder for videos here")
    path = tmp_path / "a.mp4"
    write_clip(levels(30, 32, 48) * 1.5 - 0.8, path, fps=10)
    whole = clips.read(path).frames
    clip, size = ClipFile("a.mp4", path, ""), Size(5, 32, 48)
    torch.testing.assert_close(load(clip, [size], None), whole[:, :5])
    torch.testing.assert_close(load(clip, [size], 5.0), whole[:, 0:10:2])
    seen = 0
    original = clips.video_frames

    def counting(path: Path):  # type: ignore[no-untyped-def]
        from contextlib import contextmanager

        @contextmanager
        def frames():  # type: ignore[no-untyped-def]
            nonlocal seen
            with original(path) as (found, rate):

                def counted():  # type: ignore[no-untyped-def]
                    nonlocal seen
                    for frame in found:
                        seen += 1
                        yield frame

                yield counted(), rate

        return frames()

    monkeypatch.setattr("fpsc.train.data.clips.video_frames", counting)
    load(clip, [size], None)
    assert seen == 5
    path.write_bytes(b"no video")
    with pytest.raises(ClipError, match="cannot be read as a video"):
        load(clip, [size], None)
