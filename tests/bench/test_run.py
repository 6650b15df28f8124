"""A run keeps what is done, goes on where it stopped, and refuses to mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fpsc.bench import run as runs
from fpsc.bench.cases import Spec
from fpsc.bench.measure import Effort
from fpsc.bench.record import Case, Level, Role, Run, Status, compared
from fpsc.bench.subject import Machine, Sized
from fpsc.cli import app
from fpsc.errors import UserError
from tests.bench.records import result

CPU = Machine(torch.device("cpu"), torch.float32)


def spec(name: str, **changes: Any) -> Spec:
    given: dict[str, Any] = {"grid": (2, 4, 8), "heads": 1, "head_dim": 16, "whole": True}
    return Spec(name, Level.attention, **{**given, "keeps": (0.5,), **changes})


def plan(output: Path | None, *names: str, **changes: Any) -> runs.Plan:
    return runs.Plan([spec(name) for name in names], CPU, Effort(), output, "x", **changes)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cases that were measured; `fails` and `stops` do what they say."""
    names: list[str] = []

    def measure(case: Sized, machine: Machine, effort: Effort, tell: Any) -> Case:
        names.append(case.spec.name)
        if case.spec.name == "fails":
            raise RuntimeError("out of luck\nmore")
        if case.spec.name == "stops":
            raise KeyboardInterrupt
        results, best = compared(
            [
                result("SDPA", [2.0] * 5, Role.eager),
                *(
                    result(f"fpsattn keep {keep:g}", [1.0] * 5, Role.fpsattn, keep=keep)
                    for keep in case.spec.keeps
                ),
            ]
        )
        return Case(
            name=case.spec.name,
            problem=case.problem,
            status=Status.measured,
            results=results,
            best=best,
            began="now",
            took=1.0,
        )

    monkeypatch.setattr(runs.attention, "measure", measure)
    return names


def test_an_interrupted_run_is_resumed(tmp_path: Path, measured: list[str]) -> None:
    file = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        runs.run(plan(file, "a", "stops", "b"))
    kept = Run.load(file)
    assert [case.name for case in kept.cases] == ["a"]
    assert kept.missing == ("stops", "b")
    told: list[str] = []
    runs.run(plan(file, "a", "b"), on_case=lambda case: told.append(case.name))
    assert measured == ["a", "stops", "b"] and told == ["a", "b"]
    assert Run.load(file).missing == ("stops",)


def test_a_case_that_fails_is_a_finding_and_is_tried_again(
    tmp_path: Path, measured: list[str]
) -> None:
    found = runs.run(plan(tmp_path / "run.json", "fails", "a"))
    assert [case.status for case in found.cases] == [Status.failed, Status.measured]
    assert found.cases[0].reason == "RuntimeError: out of luck"
    runs.run(plan(tmp_path / "run.json", "fails", "a"))
    assert measured == ["fails", "a", "fails"]


def test_another_problem_or_keep_is_measured_again(tmp_path: Path, measured: list[str]) -> None:
    file = tmp_path / "run.json"
    runs.run(plan(file, "a"))
    runs.run(runs.Plan([spec("a", heads=2)], CPU, Effort(), file, "x"))
    runs.run(runs.Plan([spec("a", heads=2, keeps=(0.25,))], CPU, Effort(), file, "x"))
    runs.run(runs.Plan([spec("a", heads=2, keeps=(0.25,))], CPU, Effort(), file, "x"))
    assert measured == ["a"] * 3
    assert len(Run.load(file).cases) == 1


def test_a_record_of_another_machine_is_not_mixed(tmp_path: Path, measured: list[str]) -> None:
    file = tmp_path / "run.json"
    found = runs.run(plan(file, "a"))
    other = found.environment.model_copy(update={"cpu": "another"})
    found.model_copy(update={"environment": other}).save(file)
    with pytest.raises(UserError, match=r"cpu another and .*--fresh"):
        runs.run(plan(file, "a"))
    runs.run(plan(file, "a", fresh=True))
    assert Run.load(file).environment.cpu == found.environment.cpu


def test_a_file_that_is_no_record_is_not_replaced(tmp_path: Path, measured: list[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="--fresh"):
        runs.run(plan(file, "a"))
    assert file.read_text() == "{}"


# ---- the command


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a case"),
        (("transfomer",), "not in the registry"),
        (("block", "--device", "cuda"), "sees no GPU"),
        (("block", "--device", "tpu:x"), "expected cpu, cuda"),
        (("block", "--keep", "0"), "above 0"),
        (("block", "--grid", "1,2"), "expected three positive integers"),
        (("block", "--policy", "no-such-policy"), "no such policy"),
        (("--model", "NoSuchTransformer"), "no model class NoSuchTransformer"),
        (("--model", "wan-2.1-1.3b", "--level", "all"), "expected one of"),
        (("block", "--model", "x"), "CASES are of models known by name"),
        (("--config", "{}"), "name it: --model"),
        (("transformer/wan-2.1-1.3b/480p", "--layers", "31"), "1 to 30"),
        (
            ("transformer/wan-2.1-14b/720p", "--layers", "40", "--grid", "210,90,160"),
            r"needs about [\d.]+ GiB of memory.*fits",
        ),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = bench("run", *arguments, "--json", "-o", str(tmp_path / "x.json"))
    assert ended.exit_code == 2, ended.output
    import re

    assert re.search(message, json.loads(ended.stdout)["error"])
    assert not (tmp_path / "x.json").exists()


def test_the_command_writes_the_record_and_says_it(tmp_path: Path, measured: list[str]) -> None:
    file = tmp_path / "x.json"
    arguments = ("run", "attention/13x30x52/keep-0.25", "-o", str(file), "--json")
    ended = bench(*arguments)
    assert ended.exit_code == 0, ended.output
    assert Run.parse(ended.stdout, "stdout") == Run.load(file)
    assert bench(*arguments).exit_code == 0
    assert measured == ["attention/13x30x52/keep-0.25"]


def test_the_status_says_that_something_is_not_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Case:
        raise RuntimeError("broken")

    monkeypatch.setattr(runs.attention, "measure", broken)
    ended = bench("run", "attention/13x30x52/keep-0.25", "-o", str(tmp_path / "x.json"))
    assert ended.exit_code == 1
    assert "RuntimeError: broken" in ended.output


def test_list_names_cases_and_models() -> None:
    ended = bench("list", "--json")
    found = json.loads(ended.stdout)
    assert {"name": "compile/mochi", "level": "compile", "model": "mochi"} in found["cases"]
    assert found["models"]["wan-2.1-14b"]["clips"]["720p"] == [81, 720, 1280]
    text = bench("list", "scaling").output
    assert "scaling/keep/8192" in text and "transformer" not in text.split("\n\n")[0]


def test_bench_alone_shows_its_help() -> None:
    ended = bench()
    assert ended.exit_code in (0, 2) and "compare" in ended.output
