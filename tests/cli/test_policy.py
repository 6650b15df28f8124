"""`fpsc policy check | diff | init | convert | schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fpsc.cli import app
from fpsc.families import FAMILIES
from fpsc.policy import Policy, find, presets, resolve
from fpsc.policy.json_schema import dumps

RUN = ["--scheduler", "FlowMatchEulerDiscreteScheduler", "--shift", "7"]


def policy(*arguments: str | Path) -> Any:  # click's Result, which typer does not export
    return CliRunner().invoke(app, ["policy", *map(str, arguments)], env={"COLUMNS": "200"})


def error(*arguments: str | Path) -> str:
    """The message of a call that must fail as a user's mistake does; in JSON, too."""
    result = policy(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    as_json = policy(*arguments, "--json")
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["error"] in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- check


def test_check_says_what_a_valid_policy_holds() -> None:
    result = policy("check", "generic", "dense")
    assert result.exit_code == 0
    assert "policy generic, modes dense, gentle, fast, 3 phases, 0 rules" in result.output
    assert json.loads(policy("check", "generic", "--json").stdout)["valid"] is True


def test_check_names_every_problem_of_every_file() -> None:
    text = find("generic").document.text.replace("keep: 0.50", "keep: 5")
    Path("a.yaml").write_text(text)
    number = 1 + text[: text.index("keep: 5")].count("\n")
    Path("b.yaml").write_text("fpsc: 1\n$import: a.yaml\n")
    result = policy("check", "generic", "a.yaml", "b.yaml", "none.yaml")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0].startswith("generic.yaml: valid")
    place = f"a.yaml:{number}:33: modes.gentle.keep: expected a number above 0"
    assert lines[1].startswith(place) and lines[2].startswith(place)
    assert lines[3].startswith("none.yaml: no such policy")
    found = json.loads(policy("check", "a.yaml", "--json").stdout)
    (problem,) = found["files"][0]["problems"]
    assert (found["valid"], problem["line"], problem["column"]) == (False, number, 33)


# ---- schema


def test_schema_prints_the_schema() -> None:
    assert policy("schema").stdout == dumps()


# ---- diff


def test_diff_of_what_does_the_same() -> None:
    text = find("generic").document.text.replace("name: generic", "name: mine  # a comment")
    Path("mine.yaml").write_text(text)
    result = policy("diff", "generic", "mine.yaml", "--layers", "2", "--heads", "2")
    assert (result.exit_code, result.output) == (0, "the policies do the same\n")


def test_diff_names_values_cells_and_keep() -> None:
    rules = "except:\n  - {layers: [0, 2..3], heads: 1, use: gentle}\n"
    text = find("generic").document.text.replace("keep: 0.35", "keep: 0.25") + rules
    Path("mine.yaml").write_text(text)
    size = ["--layers", "4", "--heads", "2", "--grid", "8,16,16"]
    result = policy("diff", "generic", "mine.yaml", *size, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    changes = {c["key"]: (c["before"], c["after"]) for c in found["changes"]}
    assert changes == {
        "modes.fast.keep": ("0.35", "0.25"),
        "except[0].layers": (None, "0, 2..3"),
        "except[0].heads": (None, "1"),
        "except[0].use": (None, "gentle"),
    }
    cells = {(c["noise"], c["before"], c["after"]): c for c in found["cells"]}
    assert {key: cell["cells"] for key, cell in cells.items()} == {
        ("1.00..0.90", "dense", "gentle"): 3,
        ("0.40..0.00", "fast", "gentle"): 3,
        ("0.40..0.00", "fast", "fast"): 5,
    }
    first = cells["1.00..0.90", "dense", "gentle"]
    assert (first["layers"], first["heads"]) == ("0, 2..3", "1")
    assert [k["noise"] for k in found["keep"]] == ["1.00..0.90", "0.40..0.00"]
    assert found["keep"][0]["after"] == pytest.approx(1 - 3 / 8 * 0.5)
    shown = policy("diff", "generic", "mine.yaml", *size).output
    assert "noise 1.00..0.90, layers 0, 2..3, heads 1: 3" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generic", "gneric"], 'did you mean "generic"?'),
        (["generic", "dense", "--layers", "3"], "--layers and --heads go together"),
        (["generic", "dense", "--grid", "3,4"], "expected three positive integers"),
    ],
)
def test_diff_of_bad_input(arguments: list[str], expected: str) -> None:
    assert expected in error("diff", *arguments)


# ---- init


@pytest.mark.parametrize("family", [*sorted(presets()), *sorted({*FAMILIES} - {"Wan"})])
def test_init_writes_a_valid_policy_for_every_family(family: str) -> None:
    result = policy("init", family, "-o", "p.yaml", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    started = Policy.load("p.yaml")
    assert (found["file"], started.name) == ("p.yaml", "p")
    assert started.schedule == find(found["preset"]).schedule
    text = Path("p.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=fpsc-policy-1.json\n")


@pytest.mark.parametrize("name", sorted(presets()))
def test_what_init_offers_in_comments_is_true(name: str) -> None:
    """Every offer, taken as the comment says, gives a valid policy."""
    assert policy("init", name).exit_code == 0
    text = Path(f"my-{name}.yaml").read_text()
    head, _, offers = text.partition("take the")
    blocks = offers.split("\n#\n")[1:]
    assert {"sampling", "components"} <= {block.split(":")[0].strip("# ") for block in blocks}
    for block in blocks:
        Policy.load(head + "\n" + "\n".join(line[2:] for line in block.splitlines()) + "\n")


def test_init_replaces_nothing_unasked() -> None:
    Path("p.yaml").write_text("mine")
    assert "p.yaml is there already; --force replaces it" in error("init", "-o", "p.yaml")
    assert Path("p.yaml").read_text() == "mine"
    assert policy("init", "-o", "p.yaml", "--force").exit_code == 0
    assert 'no family generik; did you mean "generic"?' in error("init", "generik", "-o", "q.yaml")
    assert "choose wan-2.1-1.3b, " in error("init", "WanTransformer3DModel", "-o", "q.yaml")
    assert "is no folder" in error("init", "-o", "none/p.yaml")
    assert policy("init", "-o", "-").stdout.startswith("# yaml-language-server")


# ---- convert


def strategy(cells: np.ndarray, windows: list[list[int]]) -> dict[str, list[int]]:
    """A mask strategy as FastVideo writes it: [steps, layers, heads] indices of windows."""
    return {f"{t}_{n}_{h}": windows[i] for (t, n, h), i in np.ndenumerate(cells)}


WINDOWS = [[5, 6, 10], [3, 3, 3], [1, 6, 10]]


def test_convert_sta_by_step_layer_and_head() -> None:
    """Every cell of the table has the window of the strategy, at the noise of its step."""
    cells = np.random.default_rng(0).integers(1, 3, (10, 3, 4))
    cells[:3] = 0
    Path("s.json").write_text(json.dumps(strategy(cells, WINDOWS)))
    result = policy("convert", "sta", "s.json", "-o", "p.yaml", *RUN, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["table"] == "p.safetensors"
    converted = Policy.load("p.yaml")
    assert converted.tile == (2, 8, 8)
    table = resolve(converted, layers=3, heads=4, fp8=False)
    assert converted.spec.sampling is not None
    from fpsc.policy.axis import levels

    windows = [None, (9, 3, 3), (3, 6, 10)]  # three of our tiles for one of theirs, along time
    for step, noise in enumerate(levels(converted.spec.sampling)):
        for layer, head in np.ndindex(3, 4):
            mode = converted.modes[table.describe(table.row_of(noise), layer, head).mode]
            assert mode.window == windows[cells[step, layer, head]]


def test_convert_sta_with_few_exceptions_needs_no_table() -> None:
    cells = np.ones((10, 3, 4), int)
    cells[:3] = 0
    cells[5:, 2, [0, 3]] = 2
    Path("s.json").write_text(json.dumps(strategy(cells, WINDOWS)))
    result = policy("convert", "sta", "s.json", "-o", "-", *RUN)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "  - {steps: 0..3, use: dense}" in lines
    assert lines[-1] == "  - {steps: 5..10, layers: [2], heads: [0, 3], use: w1-6-10}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", 'expected a mapping like {"0_0_0": [3, 6, 10]}'),
        ('{"0_0": [1, 1, 1]}', "expected keys step_layer_head"),
        ('{"0_0_0": [1, 1]}', "0_0_0: expected a window of three tiles"),
        ('{"0_0_0": [1, 1, true]}', "0_0_0: expected a window of three tiles"),
        ('{"0_0_1": [1, 1, 1]}', "0_0_0 is missing; 1 of 2 cells are"),
        ('{"9999_999_99": [1, 1, 1]}', "are too few for"),
        ('{"0_0_0": [1, 2, 1], "0_0_1": [2, 1, 1]}', "no window is the largest along every axis"),
    ],
)
def test_convert_sta_of_bad_input(text: str, expected: str) -> None:
    Path("s.json").write_text(text)
    assert expected in error("convert", "sta", "s.json", "-o", "p.yaml", *RUN)
    assert not Path("p.yaml").exists()


def test_convert_sta_of_bad_settings() -> None:
    Path("s.json").write_text(json.dumps(strategy(np.zeros((2, 1, 1), int), WINDOWS)))
    arguments = ["convert", "sta", "s.json", "-o", "p.yaml"]
    assert "--scheduler is missing" in error(*arguments)
    assert "did you mean UniPC" in error(
        *arguments, "--scheduler", "UniPCMultistepSchedule"
    ).replace('"', "")
    assert "shift above 0" in error(*arguments, *RUN[:3], "-1")
    assert "cannot be read" in error("convert", "sta", "none.json", "-o", "p.yaml", *RUN)


def test_convert_svg_by_steps_and_by_noise() -> None:
    """30 % of the steps by the run; of older versions 0.09, which is 35 % of 50 steps."""
    settings = ["--layers", "40", "--sparsity", "0.25", "--first-layers-fp", "0.05"]
    run = ["--scheduler", "UniPCMultistepScheduler", "--steps", "50", "--shift", "5"]
    arguments = ["convert", "svg", "-o", "p.yaml", "--force", *settings]
    assert policy(*arguments, "--first-times-fp", "0.3", *run).exit_code == 0
    converted = Policy.load("p.yaml")
    assert [str(p.steps) for p in converted.schedule] == ["0..15", "15..50"]
    assert [p.use for p in converted.schedule] == ["dense", "sparse"]
    assert converted.modes["sparse"].keep == 0.25
    assert converted.rules[0].layers == ((0, 1),)
    assert policy(*arguments, "--first-times-fp", "0.09").exit_code == 0
    converted = Policy.load("p.yaml")
    assert converted.edges == [0.91]
    from fpsc.policy.axis import levels
    from fpsc.policy.convert import sampling_of

    dense = sum(n > 0.91 for n in levels(sampling_of("UniPCMultistepScheduler", 50, 5.0)))
    assert dense == pytest.approx(0.35 * 50, abs=1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--sparsity", "0"], "sparsity: expected a share above 0"),
        (["--sparsity", "0.5", "--first-times-fp", "1.5"], "first_times: expected a share from 0"),
        (["--sparsity", "0.5", "--steps", "50"], "--scheduler and --steps go together"),
    ],
)
def test_convert_svg_of_bad_input(settings: list[str], expected: str) -> None:
    assert expected in error("convert", "svg", "-o", "p.yaml", "--layers", "4", *settings)
