"""`fpsc policy show` and `fpsc policy explain`, run as commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fpsc.cli import app
from fpsc.cost import DeviceCost, Kind, Point
from fpsc.policy import find, presets, resolve
from fpsc.policy.tables import NO_CHOICE, write

MINE = """\
fpsc: 1
name: mine
modes:
  dense: {keep: 1.0}
  near: {pattern: near, keep: 0.5, dtype: fp8}
  box: {pattern: window, window: [1, 3, 3]}
schedule:
  - {noise: 1.00..0.80, use: dense}
  - {noise: 0.80..0.00, use: near}
except:
  - {layers: 0, use: dense}
  - {layers: 0..1, heads: [2], noise: 0.50..0.00, use: box}
"""
SIZES = ("--layers", "3", "--heads", "4", "--grid", "9,24,40")
RUN = ("--scheduler", "FlowMatchEulerDiscreteScheduler", "--steps", "10", "--shift", "1")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["policy", *map(str, arguments)], env={"COLUMNS": "100"})


def answer(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_shown(name: str) -> None:
    found = answer("show", name)
    assert sum(phase["steps"] for phase in found["phases"]) == len(found["steps"])
    assert sum(step["keep"] == 1 for step in found["steps"]) == found["dense_steps"]
    assert 0 < found["mean_keep"] <= 1


def test_18_of_50_steps_dense() -> None:
    result = run("show", "generic")
    assert result.exit_code == 0, result.output
    assert "18 of 50 steps dense" in result.output
    assert "steps 0 to 17: dense" in result.output
    assert "tile 7 x 9 x 2 (planned), 3 x 5 x 40 = 600 of them" in result.output


def test_the_options_change_what_is_counted(mine: Path) -> None:
    found = answer("show", mine, *SIZES, *RUN)
    assert (found["layers"], found["heads"], found["grid"]) == (3, 4, [9, 24, 40])
    noise = [step["noise"] for step in found["steps"]]
    assert len(noise) == 10 and noise[0] == 1
    assert [step["phase"] for step in found["steps"]] == [
        0 if level > 0.8 else 1 if level > 0.5 else 2 for level in noise
    ]
    by_layer = found["phases"][2]["keep_by_layer"]
    assert by_layer[2] == pytest.approx(0.5, abs=0.01)
    assert by_layer[1] < by_layer[2] < by_layer[0] < 1
    assert found["phases"][1]["keep_by_layer"] == [1, *[pytest.approx(0.5, abs=0.01)] * 2]
    assert found["work_of_run"] is None, "the rest of a model of this width is not known"


def test_people_see_layers_heads_and_windows(mine: Path) -> None:
    output = run("show", mine, *SIZES, *RUN).output
    assert re.search(r"^0 +0\.\.1, 3 +1\.000 +1\.000 +1\.000$", output, re.MULTILINE)
    assert re.search(r"^ +2 +1\.000 +1\.000 +0\.\d+$", output, re.MULTILINE)
    assert re.search(r"^2 +all ", output, re.MULTILINE)
    assert output.count("◆") == 2, "one window for each pattern that is not dense"


def test_a_short_video_is_said_to_stay_dense(mine: Path) -> None:
    assert "all stays dense" in run("show", mine, "--grid", "2,8,8").output
    assert answer("show", mine, "--grid", "2,8,8")["applies"] is False
    assert "stays dense" in run("explain", mine, "--noise", "0.1", "--grid", "2,8,8").output


def test_the_picture_shows_what_the_table_says(mine: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    result = run("show", mine, *SIZES, *RUN, "--png", path)
    assert result.exit_code == 0 and f"drawn into {path}" in result.output
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    seen = {tuple(c): n for c, n in zip(colours.tolist(), counts.tolist(), strict=True)}
    assert seen[0x2E, 0x6F, 0x9E] > 1000, "key tiles that are seen"
    assert seen[0xD1, 0x49, 0x5B] > 50, "the query tiles"
    again = tmp_path / "b.png"
    run("show", mine, *SIZES, *RUN, "--png", again)
    assert again.read_bytes() == path.read_bytes()


def test_a_picture_without_matplotlib(mine: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fpsc.policy.pictures", None)
    result = run("show", mine, *SIZES, "--png", tmp_path / "a.png")
    assert result.exit_code == 2
    assert 'pip install "fpsc[pictures]"' in result.stderr


def test_explain_names_the_line_that_won_in_every_cell(mine: Path) -> None:
    """As the table has it, which is tested against the rules applied one by one."""
    table = resolve(find(mine), layers=3, heads=4, fp8=True)
    for noise in (0.9, 0.6, 0.3):
        for layer in range(3):
            for head in (0, 2):
                found = answer(
                    "explain", mine, *SIZES, "--noise", str(noise), "--layer", str(layer),
                    "--head", str(head),
                )  # fmt: skip
                cell = table.describe(table.row_of(noise), layer, head)
                assert (found["mode"], found["line"]) == (cell.mode, cell.rule)
    result = run("explain", mine, *SIZES, *RUN, "--step", "7", "--layer", "1", "--head", "2")
    line = (
        MINE.splitlines().index("  - {layers: 0..1, heads: [2], noise: 0.50..0.00, use: box}") + 1
    )
    assert "step 7 of 10" in result.output and "layer 1, head 2: box" in result.output
    assert f"decided by {mine}:{line} except[1]" in result.output
    assert f"overrules {mine}:9 schedule[1]: near" in result.output


def test_explain_knows_the_table(tmp_path: Path) -> None:
    cells = np.full((1, 3, 4), NO_CHOICE, np.uint8)
    cells[0, 2, 1] = 0
    write(tmp_path / "t.safetensors", edges=[1.0, 0.0], modes=["box"], cells=cells)
    path = tmp_path / "mine.yaml"
    path.write_text(MINE + "table: t.safetensors\n")
    found = answer("explain", path, "--noise", "0.3", "--layer", "2", "--head", "1")
    assert found["mode"] == "box" and "table" in found["line"]
    assert [cell["mode"] for cell in found["overruled"]] == ["near"]
    beside = answer("explain", path, "--noise", "0.3", "--layer", "2", "--head", "0")
    assert (beside["mode"], beside["overruled"]) == ("near", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "wan-2.1-14"), r'no such policy.* did you mean "wan-2\.1-14b"'),
        (("show", "generic", "--grid", "1,2"), r"--grid 1,2: expected three positive integers"),
        (("show", "generic", "--scheduler", "Euler"), r"--scheduler Euler: expected a scheduler"),
        (("show", "generic", "--steps", "0"), r"--steps 0: expected a whole number of steps"),
        (("show", "generic", "--component", "x"), r"--component x: generic has none"),
        (("explain", "generic"), r"give --step or --noise"),
        (("explain", "generic", "--step", "50"), r"--step 50: the run has 50 steps, from 0"),
        (("explain", "generic", "--noise", "2"), r"noise lies between 0 \(clean\)"),
        (("explain", "generic", "--step", "1", "--layer", "40"), r"no layer 40"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
    as_json = json.loads(run(*arguments, "--json").output)
    assert re.search(message, as_json["error"])


def test_rules_for_a_larger_model_say_how_to_give_the_sizes(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(MINE.replace("layers: 0,", "layers: 55,"))
    result = run("show", path)
    assert result.exit_code == 2
    assert "layer 55 does not exist" in result.stderr and "--layers" in result.stderr
    assert run("show", path, "--layers", "60").exit_code == 0


COST = DeviceCost(
    device="a GPU", source="measured", workers=8, head_dim=128, overhead=0.0, bandwidth=1e30,
    kinds={"bf16": Kind(item=0.0, tile=1e-6), "fp8": Kind(item=5e-4, tile=1e-6)},
    points=(Point(name="one", seconds=1.0, predicted=1.04, held_out=True),),
)  # fmt: skip


def test_times_are_predicted_by_a_measured_device(mine: Path, tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    COST.save(file)
    found = answer("show", mine, *SIZES, *RUN, "--cost", file)["predicted"]
    assert (found["device"], found["source"]) == ("a GPU", "measured")
    assert found["held_out_error"] == pytest.approx(0.04)
    dense, near = found["seconds_of_phases"][0], found["seconds_of_phases"][1]
    assert dense == found["dense_seconds"] and near > dense > 0
    text = run("show", mine, *SIZES, *RUN, "--cost", file).output
    assert "predicted of attention on a GPU: measured, held-out error 4.0%" in text
    assert "near: predicted to take" in text and "box: predicted" not in text
    assert answer("show", mine, *SIZES, *RUN)["predicted"] is None


def test_no_times_where_nothing_is_known(mine: Path, tmp_path: Path) -> None:
    result = run("show", mine, *SIZES, "--cost", tmp_path / "none.json")
    assert result.exit_code == 2 and "fpsc bench device" in result.output
    if not torch.cuda.is_available():
        result = run("show", mine, *SIZES, "--cost", "roofline")
        assert result.exit_code == 2 and "sees no GPU" in result.output
