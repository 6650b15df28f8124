"""The page of a record: whole, alone, and with no number that is not the record's."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fpsc.bench import report
from fpsc.bench.record import (
    BreakEven,
    Fit,
    Gate,
    Kernel,
    Level,
    Memory,
    Point,
    Result,
    Role,
    Run,
    Split,
    Status,
    Step,
    Times,
)
from fpsc.cli import app
from tests.bench.records import case, problem, result, run
from tests.pages.reading import Page, check_alone, undeclared

FIXED = "FP8 SHA-256"
"""Words with digits that stand in the template."""

FAST = (0.2512, 0.2507, 0.2493, 0.2519, 0.2488)


def times(factor: float) -> list[float]:
    return [factor * x for x in FAST]


def split(attention: float) -> Split:
    top = (Kernel(name="fmha_v2", kind="attention", seconds=attention, calls=31),)
    return Split(attention=attention, linear=0.317, rest=0.113, top=top, trace="a.trace.json")


def steps(sparse: bool) -> tuple[Step, ...]:
    return tuple(
        Step(
            index=i,
            timestep=1000 - 97.0 * i,
            noise=1 - 0.097 * i,
            modes=(("calm",) if i < 3 else ("fast", "calm")) if sparse else (),
            keep=(1.0 if i < 3 else 0.235) if sparse else None,
            seconds=Times.of([0.031 * (3 - sparse), 0.033 * (3 - sparse)]),
        )
        for i in range(7)
    )


def whole() -> Run:
    """A record with everything that one can have."""
    right = Gate(against="the reference", error=3.1e-6, allowed=1.7e-5, passed=True)
    wrong = Gate(against="the reference", error=None, allowed=1.7e-5, passed=False)
    transformer = case(
        "transformer",
        results=[
            result("eager", times(6.1), Role.eager, error=0.0, split=split(0.91)),
            result("Inductor", times(4.3), error=2.2e-7, gates=(right,), compile_seconds=12.7),
            Result(
                name="SageAttention",
                role=Role.approximate,
                status=Status.absent,
                reason="sageattention is not installed",
            ),
            Result(
                name="Flex",
                role=Role.baseline,
                status=Status.wrong,
                reason="its output is not finite",
                gates=(wrong,),
            ),
            result(
                "fpsattn half",
                times(2.2),
                Role.fpsattn,
                error=0.0123,
                error_fp8=0.0167,
                keep=0.5,
                visited=0.523,
                gates=(right,),
                split=split(0.23),
                memory=Memory(peak=3_456_789_012, before=1_234_567_890, source="process"),
                notes=("one graph break",),
            ),
            result("fpsattn slow", times(5.2), Role.fpsattn, error=0.151, keep=0.13),
        ],
        load=0.37,
        notes=("taken twice",),
    )
    sampling = case(
        "sampling",
        problem=problem(level=Level.sampling, steps=7, threads=2, mode="max-autotune", noise=0.71),
        results=[
            result("eager", times(3.3), Role.eager, error=0.0, steps=steps(False)),
            result("fpsattn", times(1.4), Role.fpsattn, error=0.042, steps=steps(True)),
        ],
    )
    compiling = case(
        "compile",
        problem=problem(level=Level.compile, cache="cold", reduced=()),
        results=[result("Inductor", [41.0, 42.5]), result("fpsattn", [44.0, 43.5], Role.fpsattn)],
    )
    attention = case("attention", problem=problem(level=Level.attention, model="", batch=3))
    points = tuple(Point(x=x, seconds=1.3e-9 * x**2, case="attention") for x in (2053, 8209, 32771))
    fits = (
        Fit(axis="tokens", contender="SDPA", points=points, exponent=2.013, factor=1.31e-9,
            exponent_range=(1.97, 2.05), overhead=0.0, r2=0.9987),
        Fit(axis="tokens", contender="fpsattn", points=points, exponent=1.993, factor=1.7e-10,
            overhead=0.0042, r2=0.9991, dominated_below=4973.0),
    )  # fmt: skip
    level = BreakEven(axis="tokens", contender="fpsattn", against="SDPA", at=1913.0, faster="above")
    never = BreakEven(axis="tokens", contender="x", against="SDPA", at=None, faster="never")
    return run(
        [transformer, sampling, compiling, attention],
        planned=("transformer", "sampling", "compile", "attention", "training"),
        fits=fits,
        break_evens=(level, never),
        notes=("reduced to this machine",),
    )


def page_of(*runs: Run) -> Page:
    views = [report.view(r, f"{i}.json", "c0ffee", f"run-{i}") for i, r in enumerate(runs)]
    return Page(report.html(views))


@pytest.fixture(scope="module")
def record() -> Run:
    return whole()


@pytest.fixture(scope="module")
def page(record: Run) -> Page:
    return page_of(record)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in leaves(each)]
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in leaves(each)]
    return [value]


def allowed(record: Run) -> set[float]:
    """The numbers of a record, and those that its classes define by them."""
    found = {x for x in leaves(record.model_dump()) if isinstance(x, int | float)}
    for each in record.cases:
        found |= {each.problem.tokens, each.problem.prefix + each.problem.suffix}
        for r in each.results:
            if r.split:
                parts = (r.split.attention, r.split.linear, r.split.rest)
                found |= {r.split.total, r.split.bound(), *(x / r.split.total for x in parts)}
    return found | {len(fit.points) for fit in record.fits}


def test_every_number_is_one_of_the_record(page: Page, record: Run) -> None:
    assert len(page.values) > 150
    strange = {value for value, _ in page.values} - allowed(record)
    assert not strange


def test_no_other_text_has_a_number_of_its_own(page: Page, record: Run) -> None:
    words = [str(x) for x in leaves(record.model_dump()) if isinstance(x, str)]
    names = [name for e in (record.environment,) for name in e.packages]
    assert not undeclared(page, " ".join([*words, *names, FIXED, "0.json", "c0ffee"]))


def test_a_number_that_changes_in_the_record_changes_on_the_page() -> None:
    """What is shown is read, and not written into the template."""
    one = page_of(run([case("a")])).values
    other = page_of(run([case("a", slower=1.37)])).values
    assert len(one) == len(other) and one != other


def test_what_matters_is_shown(page: Page, record: Run) -> None:
    shown = {value for value, _ in page.values}
    for each in record.cases:
        for r in each.measured:
            for quartiles in (r.seconds, r.to_best, r.to_eager):
                if quartiles is not None:
                    assert {quartiles.median, quartiles.q1, quartiles.q3} <= shown
            if r.error is not None:
                assert r.error in shown
            assert {step.seconds.median for step in r.steps} <= shown
    text = " ".join(page.text)
    for words in (
        "sageattention is not installed",
        "its output is not finite",
        "Not measured yet: training.",
        "2 of 30 layers",
        "taken twice",
        "one graph break",
        "reduced to this machine",
        "slower",
        "faster above that",
        "no crossing among the points",
        "calm",
        "fast + calm",
        "a.trace.json",
        "fmha_v2",
        record.environment.source,
    ):
        assert words in text, words


def test_the_page_is_alone_and_in_order(page: Page) -> None:
    check_alone(page)
    assert "prefers-color-scheme: dark" in page.source
    assert page.source.count("<svg") == 6  # error, split, memory, steps, times, scaling


def test_points_of_a_fit_are_beside_it_and_not_in_the_summary(record: Run) -> None:
    view = report.view(record, "a.json", "", "run")
    assert [each.case.name for each in view.fitted] == ["attention"]
    assert {each.case.name for each, _ in view.headlines} == {"transformer", "sampling", "compile"}
    assert [level for level, _, _ in view.levels] == ["transformer", "sampling", "compile"]
    assert "One op" in " ".join(page_of(record).text)


def test_what_could_not_run_is_one_line() -> None:
    absent = [
        Result(name=name, role=Role.baseline, status=Status.absent, reason="needs a GPU")
        for name in ("FA3", "FA4")
    ]
    page = page_of(run([case("a", results=[result("eager", [1.0], Role.eager), *absent])]))
    assert "FA3 · FA4: needs a GPU" in page.text


@pytest.mark.parametrize(
    ("ours", "word"),
    [([2.0, 2.1, 2.2], "slower"), ([0.9, 1.0, 1.2], "level"), ([0.5, 0.6, 0.7], None)],
)
def test_who_wins_is_judged_by_the_quartiles(ours: list[float], word: str | None) -> None:
    results = [result("eager", [1.0] * 3, Role.eager), result("fpsattn", ours, Role.fpsattn)]
    text = page_of(run([case("a", results=results)])).text
    assert {"slower", "level"} & set(text) == ({word} if word else set())


def test_a_run_and_its_file_have_one_page(tmp_path: Path) -> None:
    """Also the same hash: what is written is what was measured."""
    one = run([case("a")])
    one.save(tmp_path / "a.json")
    report.write([tmp_path / "a.json"], tmp_path / "read.html")
    report.write_run(one, tmp_path / "a.json", tmp_path / "run.html")
    assert (tmp_path / "read.html").read_text() == (tmp_path / "run.html").read_text()


def test_two_records_on_one_page(record: Run) -> None:
    one = run(record.cases[:1])
    both = page_of(one, one)
    check_alone(both)
    assert both.source.count("<svg") == 6


def test_a_record_without_any_result() -> None:
    empty = page_of(run([], planned=("a",)))
    check_alone(empty)
    assert "No result of fpsattn was measured." in " ".join(empty.text)


def test_a_case_that_failed_says_why() -> None:
    failed = case("a").model_copy(
        update={"status": Status.failed, "reason": "needs more memory", "results": ()}
    )
    assert "needs more memory" in " ".join(page_of(run([failed])).text)


def test_names_are_escaped() -> None:
    bad = page_of(run([case("<script>x</script>")], command="<img src=x>"))
    check_alone(bad)
    assert "<script>x" not in bad.source and "<img" not in bad.source


def test_the_command_writes_a_page(record: Run, tmp_path: Path) -> None:
    record.save(tmp_path / "a.json")
    page = tmp_path / "new" / "report.html"
    done = CliRunner().invoke(
        app, ["bench", "report", str(tmp_path / "a.json"), "-o", str(page), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"report": str(page), "files": [str(tmp_path / "a.json")]}
    check_alone(Page(page.read_text(encoding="utf-8")))
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("text", "output", "message"),
    [
        ("{}", "a.html", "schema_version"),
        (None, "a.html", "cannot read"),
        ("{}", "a.pdf", "ends in .html"),
    ],
)
def test_what_cannot_be_shown_is_named(
    text: str | None, output: str, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    done = CliRunner().invoke(
        app, ["bench", "report", str(tmp_path / "a.json"), "-o", str(tmp_path / output)]
    )
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / output).exists()


def test_the_command_without_matplotlib(
    record: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.save(tmp_path / "a.json")
    monkeypatch.setitem(sys.modules, "fpsc.bench.report", None)
    monkeypatch.delattr("fpsc.bench.report")
    done = CliRunner().invoke(app, ["bench", "report", str(tmp_path / "a.json")])
    assert done.exit_code == 2 and 'pip install "fpsc[pictures]"' in done.stderr


def test_times_of_the_page_carry_their_units(page: Page) -> None:
    shown = [text for value, text in page.values if re.search(r"(s|×|B)$", text)]
    assert len(shown) > 100 and all(math.isfinite(value) for value, _ in page.values)
