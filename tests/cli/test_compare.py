"""`fpsc compare` with two clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fpsc.cli import app
from fpsc.quality.clips import Clip, write_tensor
from fpsc.quality.metrics import psnr


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.safetensors, b.safetensors (near it) and c.safetensors (of another size)."""
    monkeypatch.chdir(tmp_path)
    a = torch.rand(3, 4, 16, 24) * 1.8 - 0.9
    for name, frames in (("a", a), ("b", a + 0.04), ("c", a[:, :3])):
        write_tensor(Clip(frames, 8.0, ""), tmp_path / f"{name}.safetensors")
    return tmp_path


def compare(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["compare", *arguments])


def test_numbers_and_files(clips: Path) -> None:
    done = compare("a.safetensors", "b.safetensors", "--json", "--out", "out")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["names"] == ["a", "b"] and told["frames"] == 4 and told["fps"] == 8
    assert told["measures"]["PSNR"]["value"] == pytest.approx(34, abs=0.2)  # 20 log10(2 / 0.04)
    assert told["failed"] == [] and told["missing"]
    assert sorted(told["files"]) == sorted(
        str(path.relative_to(clips)) for path in (clips / "out").iterdir()
    )


def test_the_table_has_the_numbers_of_the_json(clips: Path) -> None:
    done = compare("a.safetensors", "b.safetensors", "--label", "one", "--label", "other")
    assert done.exit_code == 0
    told = json.loads((clips / "fpsc-compare" / "compare.json").read_text())
    assert f"{told['measures']['PSNR']['value']:.2f} dB" in done.stdout
    assert f"{told['measures']['SSIM']['value']:.4f}" in done.stdout
    assert "other against one" in done.stdout and "not computed: LPIPS" in done.stdout


def test_equal_clips(clips: Path) -> None:
    done = compare("a.safetensors", "a.safetensors", "--json", "--min-psnr", "90")
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert told["measures"]["PSNR"]["value"] is None
    assert told["measures"]["SSIM"]["value"] == pytest.approx(1)
    assert told["names"] == ["A: a.safetensors", "B: a.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--min-psnr", "30", "--min-ssim", "0.5"], []),
        (["--min-psnr", "40"], ["PSNR"]),
        (["--min-psnr", "40", "--min-ssim", "0.9999999"], ["PSNR", "SSIM"]),
    ],
)
def test_limits(clips: Path, arguments: list[str], found: list[str]) -> None:
    done = compare("a.safetensors", "b.safetensors", "--json", *arguments)
    assert done.exit_code == (1 if found else 0)
    assert [reason.split(":")[0] for reason in json.loads(done.stdout)["failed"]] == found
    assert (clips / "fpsc-compare" / "compare.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.safetensors", "c.safetensors"], "4 frames of 16x24 (a.safetensors) and 3 frames"),
        (["a.safetensors", "none.mp4"], "none.mp4 is not there"),
        (["a.safetensors", "b.safetensors", "--prompt", "x"], "prompt is for a pipeline"),
        (["a.safetensors", "b.safetensors", "--label", "x"], "expected two"),
        (["a.safetensors", "b.safetensors", "--label", "x", "--label", "x"], "that differ"),
        (["a.safetensors", "b.safetensors", "--out", "a.safetensors/x"], "--out"),
    ],
)
def test_what_cannot_be_compared_is_named(clips: Path, arguments: list[str], message: str) -> None:
    done = compare(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (clips / "fpsc-compare").exists()
    again = compare(*arguments, "--json")
    assert message in json.loads(again.stdout)["error"]


def test_speed_of_the_video_can_be_given(clips: Path) -> None:
    done = compare("a.safetensors", "b.safetensors", "--fps", "30", "--json")
    assert json.loads(done.stdout)["fps"] == 30


def test_clips_are_kept_to_eight_bits(clips: Path) -> None:
    """What the JSON says is what the files hold."""
    from fpsc.quality.clips import read

    done = compare("a.safetensors", "b.safetensors", "--json")
    a, b = (read(clips / f"{name}.safetensors").frames for name in "ab")
    assert json.loads(done.stdout)["measures"]["PSNR"]["value"] == psnr(a, b)
