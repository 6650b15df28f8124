"""The record of a run: what is stored agrees with its samples, and a bad file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fpsc.bench.record import (
    Case,
    Gate,
    Quartiles,
    RecordError,
    Result,
    Role,
    Run,
    Split,
    Status,
    Times,
    compared,
    ratio,
)
from tests.bench.records import case, environment, result, run


def test_quartiles_of_one_sample_and_of_many() -> None:
    assert Quartiles.of([2.0]) == Quartiles(median=2, q1=2, q3=2)
    assert Quartiles.of([1, 2, 3, 4, 5]) == Quartiles(median=3, q1=2, q3=4)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = run([case("a"), case("b")])
    written.save(tmp_path / "new" / "run.json")
    assert Run.load(tmp_path / "new" / "run.json") == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


def test_a_ratio_is_of_the_samples_of_one_round() -> None:
    """A slow phase of the machine meets both, and leaves their ratio alone."""
    slow = result("slow", [2, 20, 4])
    fast = result("fast", [1, 10, 2])
    assert ratio(slow, fast) == Quartiles(median=2, q1=2, q3=2)
    assert ratio(None, fast) is None


def edited(change: Any) -> str:
    document = json.loads(run([case("a")]).text())
    change(document)
    return json.dumps(document)


def _median(d: Any) -> None:
    d["cases"][0]["results"][1]["seconds"]["median"] = 1e-3


def _speedup(d: Any) -> None:
    d["cases"][0]["results"][2]["to_best"]["median"] = 99.0


def _twice(d: Any) -> None:
    d["cases"][0]["results"].append(d["cases"][0]["results"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_median, "was it edited"),
        (_speedup, "was it edited"),
        (_twice, "two results of one name"),
        (lambda d: d.update(schema_version=0), "schema_version 1, found 0"),
        (lambda d: d.update(other=1), "other: Extra inputs"),
        (lambda d: d["cases"][0]["results"][0].pop("role"), r"cases.0.results.0.role"),
    ],
)
def test_a_file_that_is_no_record_is_refused(change: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        Run.parse(edited(change), "run.json")


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1', "3"])
def test_text_that_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match=r"run\.json"):
        Run.parse(text, "run.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no\.json"):
        Run.load(tmp_path / "no.json")


def test_what_was_not_measured_says_why() -> None:
    with pytest.raises(ValueError, match="without a reason"):
        Result(name="FA3", role=Role.baseline, status=Status.absent)


def test_a_red_gate_has_no_times() -> None:
    gate = Gate(against="the reference", error=1.0, allowed=1e-3, passed=False)
    with pytest.raises(ValueError, match="red"):
        Result(
            name="x",
            role=Role.fpsattn,
            status=Status.measured,
            gates=(gate,),
            seconds=Times.of([1.0]),
        )


def test_a_case_names_its_eager_and_its_best() -> None:
    found: Case = case("a")
    assert found.eager is not None and found.eager.name == "eager"
    assert found.best == "Inductor"
    fast = found.of("fpsattn keep 0.25")
    assert fast is not None and fast.to_best is not None and fast.to_eager is not None
    assert fast.to_best.median == 4.0 and fast.to_eager.median == 6.0


def test_planned_cases_without_a_record_are_missing() -> None:
    half = run([case("a")], planned=("a", "b"))
    assert half.missing == ("b",)
    assert half.with_case(case("b")).missing == ()
    assert len(half.with_case(case("a")).cases) == 1


def test_amdahl() -> None:
    split = Split(attention=6, linear=3, rest=1)
    assert split.total == 10
    assert split.bound() == 2.5
    assert split.bound(3) == pytest.approx(10 / 6)


def test_environments_differ_by_name() -> None:
    one = environment()
    assert one.differences(one) == []
    other = one.model_copy(update={"threads": 8, "source": "0", "time": "2027"})
    assert one.differences(other) == ["threads 2 and 8", f"source {one.source} and 0"]
    assert one.differences(other, source=False) == ["threads 2 and 8"]


def test_what_skips_the_same_tiles_is_a_rival_at_that_keep_alone() -> None:
    results, best = compared(
        [
            result("sdpa", [8.0], Role.eager),
            result("flex keep 0.25", [3.0], keep=0.25),
            result("fpsattn keep 0.25", [2.0], Role.fpsattn, keep=0.25),
            result("fpsattn keep 0.5", [4.0], Role.fpsattn, keep=0.5),
        ]
    )
    assert best == "sdpa"
    assert case("a", results=results).results == results
    assert [(r.best, r.to_best and r.to_best.median) for r in results] == [
        ("sdpa", 1.0),
        ("sdpa", 2.66667),
        ("flex keep 0.25", 1.5),
        ("sdpa", 2.0),
    ]
