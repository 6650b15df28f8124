"""From a calibration to policies on disk: validated, refused, solved again, and run compiled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fpsc
from fpsc.cli import app
from fpsc.cost import DeviceCost, Kind, Point
from fpsc.errors import UserError
from fpsc.policy import Policy
from fpsc.tune import modes, subjects, tune, validate
from fpsc.tune.budget import parse
from fpsc.tune.choose import Wishes
from fpsc.tune.cost import Cost
from fpsc.tune.record import Calibration
from fpsc.tune.validate import Validation, Validator
from tests.compiled import NO_RECOMPILE, compile_whole
from tests.thresholds import COMPILED_FP8, relative_rms
from tests.tune.common import CANDIDATES, TILE, made, saved, subject
from tests.wan import reference_forward, small_inputs, small_wan

BUDGET = parse("keep=0.5")


def test_policies_are_validated_and_written(calibration: Calibration, tmp_path: Path) -> None:
    model = subject()
    found = tune.tune(
        calibration, [BUDGET], Wishes(), tmp_path, subject=model, prompts=[2, 3], within=10
    )
    assert not found.refused and len(found.tuned) == 2
    for each in found.tuned:
        assert each.file is not None and each.validation is not None
        policy = Policy.load(each.file)
        told = policy.document.value["measured"]
        assert told["validated"]["held_out"] == 2
        assert told["validated"]["error"] == pytest.approx(each.validation.error, abs=1e-5)
        assert told["predicted"]["keep"] <= 0.5
        validator = Validator(model, calibration, [2])
        for _ in range(2):  # the second time, the dense results are there
            again = validator.run({"again": (policy, None)})["again"]
            assert again.errors[0] == pytest.approx(each.validation.errors[0])
    table, simple = found.tuned
    assert table.lines is None and simple.lines is not None and simple.lines <= 1 + 1 + 8
    assert table.validation is not None
    # What was predicted is of the size of what was found.
    assert 1 / 3 < table.validation.error / table.predicted.error < 3
    assert len(found.front) == 8 and all(path.is_file() for _, path in found.front)
    keeps = [chosen.predicted.keep for chosen, _ in found.front]
    errors = [chosen.predicted.error for chosen, _ in found.front]
    assert keeps == sorted(keeps) and errors[0] > errors[-1]
    assert not list(tmp_path.glob(".draft*"))


def test_a_policy_whose_prediction_was_wrong_is_refused(tmp_path: Path) -> None:
    """Nothing that was made up fits the model."""
    calibration = made(bins=2, layers=2, heads=2)
    calibration.damage[:] *= 1e6
    calibration.carried[:] *= 1e6
    found = tune.tune(calibration, [BUDGET], Wishes(), tmp_path, subject=subject(), prompts=[2])
    assert len(found.refused) == 2 and not found.front
    assert not list(tmp_path.iterdir())
    for each in found.refused:
        assert each.file is None and each.validation is not None
        assert "wrong by a factor of" in each.refused and "--within" in each.refused


def test_how_wrong_a_prediction_was() -> None:
    def factor(error: float, predicted: float) -> float:
        return Validation((1,), (error,), (), predicted).factor

    assert factor(0.2, 0.1) == factor(0.1, 0.2) == pytest.approx(2)
    assert factor(1e-9, 0.0) == 1
    assert Validation((1, 2), (0.3, 0.4), (), None).error == pytest.approx((0.125) ** 0.5)


def test_prompts_that_were_measured_on_are_not_held_out(calibration: Calibration) -> None:
    with pytest.raises(UserError, match="prompt 1 cannot be held out"):
        Validator(subject(), calibration, [1])
    with pytest.raises(UserError, match="3 prompts to validate on, and 2 are left of 4"):
        validate.held_out(calibration, subject(), 3)


def test_a_compiled_model_takes_tuned_policies_without_compiling_again(
    calibration: Calibration, tmp_path: Path, no_inductor: None
) -> None:
    """Tables and phases of several budgets, in place of a policy that people wrote."""
    found = tune.tune(calibration, [parse("keep=0.3"), BUDGET], Wishes(), tmp_path)
    model, inputs = small_wan(), small_inputs((600.0,))
    start = modes.policy(CANDIDATES, [(1, 0.4, "near-0_5-fp8"), (0.4, 0, "frame-0_25")], tile=TILE)
    start.save(tmp_path / "start.yaml")
    compiled = compile_whole(model, policy=str(tmp_path / "start.yaml"))
    with torch.no_grad():
        before = compiled(**inputs)[0]
        for each in found.tuned:
            assert each.file is not None
            policy = Policy.load(each.file)
            with NO_RECOMPILE:
                fpsc.set_policy(model, policy)
                after = compiled(**inputs)[0]
            assert relative_rms(after, reference_forward(model, inputs, policy)) <= COMPILED_FP8
            assert not torch.equal(before, after)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments])


def test_a_calibration_is_solved_again_without_the_model(tmp_path: Path) -> None:
    path, out = saved(made(), tmp_path), tmp_path / "out"
    done = invoke(
        "--from", str(path), "--budget", "keep=0.4", "--budget", "error=0.03", "--out", str(out),
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [p["name"] for p in told["policies"]] == [
        *("keep-0.4", "keep-0.4-phases", "error-0.03", "error-0.03-phases")
    ]
    for each in told["policies"]:
        policy = Policy.load(each["file"])
        assert policy.document.value["measured"]["validated"] is False
    assert len(told["pareto"]) == 8
    assert json.loads((out / "tune.json").read_text())["model"] == "made up"
    shown = invoke("--from", str(path), "--out", str(out))
    assert shown.exit_code == 0 and "keep-0.25-phases" in shown.stdout
    assert "not run" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "name a MODEL"),
        (("demo", "--budget", "keep=3"), "at most 1"),
        (("demo", "--height", "64"), "leave out height"),
        (("demo", "--measure", "1"), "2 or more"),
        (("demo", "--edges", "1,x,0"), "numbers from 1 down to 0"),
        (("demo", "--pattern", "naer"), r'found "naer"; did you mean "near"'),
        (("demo", "--keep", "0.1", "--mode-dtype", "fp4"), "fp4"),
        (("nowhere/at-all",), "needs --prompts"),
        (("--from", "nothing.safetensors"), "cannot be read as a calibration"),
        (
            ("--from", "MADE", "--budget", "keep=0.01"),
            r"nearest that can be is --budget keep=0\.25",
        ),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(made(), tmp_path)
    given = [str(path) if a == "MADE" else a for a in arguments]
    done = invoke(*given, "--json")
    assert done.exit_code == 2, done.output
    assert re.search(named, json.loads(done.stdout)["error"]), done.stdout


def test_too_few_prompts_are_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "demo", lambda seed, steps: subject(3))
    done = invoke("demo", "--measure", "2", "--held-out", "2", "--out", str(tmp_path), "--json")
    assert done.exit_code == 2
    assert "3 prompts, and --measure 2 and --held-out 2 need 4" in done.stdout


class Ids(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name == "id"]


def test_the_command_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(subjects, "demo", lambda seed, steps: subject(4))
    done = invoke(
        *("demo", "--budget", "keep=0.5", "--measure", "2", "--carried", "1", "--held-out", "1"),
        *("--bins", "2", "--pattern", "near", "--keep", "0.25", "--keep", "0.5", "--within", "10"),
        *("--cost", "pairs", "--out", str(tmp_path), "--json"),
    )
    assert done.exit_code == 0, done.output
    assert "forwards of 2 layers x 2 heads x 6 modes" in done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"calibration.safetensors", "keep-0.5.yaml", "tune.html", "tune.png"} <= names
    page = (tmp_path / "tune.html").read_text()
    ids = Ids()
    ids.feed(page)
    assert len(ids.found) == len(set(ids.found))
    assert page.count("<figure>") == 4 and "http://" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_how_costs_were_fitted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    point = Point(name="one", seconds=1.0, predicted=1.07, held_out=True)
    device = DeviceCost(
        device="made up", source="measured", workers=1, head_dim=64, overhead=0.0, bandwidth=1.0,
        kinds={"bf16": Kind(item=0.0, tile=2e-3)}, points=(point,),
    )  # fmt: skip
    heads = tuple(1.0 - 0.05 * i for i in range(len(CANDIDATES)))
    path = saved(made(cost=Cost(kind="measured", heads=heads, device=device)), tmp_path)
    done = invoke("--from", str(path), "--report", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "tune.html").read_text()
    assert "by a model fitted to times of this device" in page
    assert "2.00 ms</data> a tile that it visits" in page and "7.0%" in page


def test_help_and_solving_do_not_wait_for_the_compiler(checkout: Path, tmp_path: Path) -> None:
    """Solving again is a matter of seconds, most of which are imports."""
    path = saved(made(), tmp_path)
    code = (
        "import sys; from fpsc.cli import app\n"
        "app(['tune', '--help'], standalone_mode=False)\n"
        "print('torch' in sys.modules)\n"
        f"app({['tune', '--from', str(path), '--out', str(tmp_path)]}, standalone_mode=False)\n"
        "print(*(m in sys.modules for m in ('diffusers', 'fpsc.backend')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert "\nFalse\n" in done.stdout and done.stdout.endswith("\nFalse False\n")
