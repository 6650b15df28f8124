"""Comparing runs: a planted slowdown is found, equal runs are quiet, different ones are refused."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fpsc.bench.compare import Verdict, compare, least_p, load, mann_whitney
from fpsc.bench.record import Case, Role, Run
from fpsc.cli import app
from fpsc.errors import UserError
from tests.bench.records import case, environment, problem, result, run


def noisy(
    seed: int, *, slower: float = 1.0, machine: float = 1.0, rounds: int = 7, noise: float = 0.02
) -> Run:
    """A run with noise: of each round, which meets all alike, and of each sample."""
    drawn = random.Random(seed)
    cases: list[Case] = []
    for name in ("attention", "transformer"):
        samples: dict[str, list[float]] = {"eager": [], "Inductor": [], "fpsattn keep 0.25": []}
        for _ in range(rounds):
            phase = machine * drawn.choice([1.0, 1.0, 1.3])
            for contender, seconds in zip(samples, (1.0, 0.8, 0.2 * slower), strict=True):
                samples[contender].append(phase * seconds * drawn.lognormvariate(0, noise))
        cases.append(
            case(
                name,
                results=[
                    result("eager", samples["eager"], Role.eager),
                    result("Inductor", samples["Inductor"]),
                    result(
                        "fpsattn keep 0.25", samples["fpsattn keep 0.25"], Role.fpsattn, keep=0.25
                    ),
                ],
            )
        )
    return run(cases)


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_is_found(seed: int) -> None:
    found = compare(noisy(seed), noisy(seed + 100, slower=1.2))
    assert {change.verdict for change in found.changes} == {Verdict.slower}
    assert {change.contender for change in found.changes} == {"fpsattn keep 0.25"}
    assert all(0.75 < change.change < 0.95 for change in found.changes)


def test_equal_runs_are_quiet() -> None:
    """Of 200 pairs of equal runs with two cases each, hardly any says slower or faster."""
    pairs = [compare(noisy(2 * i), noisy(2 * i + 1)) for i in range(200)]
    loud = [c for pair in pairs for c in pair.changes if c.verdict is not Verdict.same]
    assert len(loud) <= 2


def test_a_slower_machine_is_no_slowdown() -> None:
    found = compare(noisy(1), noisy(2, machine=1.5))
    assert {change.verdict for change in found.changes} == {Verdict.same}


def test_a_gain_is_found_and_is_no_slowdown() -> None:
    found = compare(noisy(1), noisy(2, slower=0.7))
    assert {change.verdict for change in found.changes} == {Verdict.faster}


def test_a_certain_change_that_is_tiny_is_none() -> None:
    found = compare(noisy(1, noise=1e-4), noisy(2, noise=1e-4, slower=1.02))
    assert all(c.verdict is Verdict.same and c.p < 0.01 for c in found.changes)


def test_too_few_rounds_cannot_tell() -> None:
    found = compare(noisy(1, rounds=3), noisy(2, rounds=3, slower=1.5))
    assert {change.verdict for change in found.changes} == {Verdict.unknown}
    assert least_p(3, 3) > 0.01 > least_p(5, 5)


def test_a_contender_that_is_gone_is_named() -> None:
    before = run([case("a")])
    after = run([case("a", results=before.cases[0].results[:2])])
    (text,) = compare(before, after).lost
    assert "fpsattn keep 0.25 was measured before" in text


def test_other_machines_and_problems_are_refused() -> None:
    here = run([case("a")])
    there = run([case("a")], environment=environment(threads=8))
    with pytest.raises(UserError, match="threads 2 and 8"):
        compare(here, there)
    with pytest.raises(UserError, match="layers 2 and 4"):
        compare(here, run([case("a", problem=problem(layers=4))]))
    with pytest.raises(UserError, match="no case in common"):
        compare(here, run([case("b")]))


def test_another_source_is_what_a_comparison_is_for() -> None:
    other = run([case("a")], environment=environment(source="f" * 16, commit="1234567"))
    assert compare(run([case("a")]), other).changes


@pytest.mark.parametrize(("n", "m"), [(2, 3), (4, 4), (5, 3)])
def test_the_test_is_exact(n: int, m: int) -> None:
    """Against all orders, one by one."""
    a, b = [2.0 * i + 0.1 for i in range(n)], [2.0 * i + 1.5 for i in range(m)]

    def u_of(first: tuple[float, ...], rest: list[float]) -> float:
        u = sum(x > y for x in first for y in rest)
        return min(u, n * m - u)

    together = a + b
    observed = u_of(tuple(a), b)
    orders = [
        u_of(first, [x for x in together if x not in first])
        for first in itertools.combinations(together, n)
    ]
    expected = sum(u <= observed for u in orders) / len(orders)
    assert mann_whitney(a, b) == pytest.approx(min(1.0, expected))


def test_many_samples_take_the_normal_approximation() -> None:
    a, b = [float(i) for i in range(30)], [i + 0.5 for i in range(30)]
    assert mann_whitney(a, b) > 0.5
    assert mann_whitney(a, [x + 40 for x in b]) < 1e-9


# ---- the command


def written(folder: Path, name: str, what: Run) -> str:
    what.save(folder / name)
    return str(folder / name)


def test_the_exit_status_says_which(tmp_path: Path) -> None:
    before = written(tmp_path, "before.json", noisy(1))
    same = written(tmp_path, "same.json", noisy(2))
    slow = written(tmp_path, "slow.json", noisy(3, slower=1.3))
    few = written(tmp_path, "few.json", noisy(4, slower=1.3, rounds=3))
    other = written(tmp_path, "other.json", run([case("z")]))
    found = {
        path: CliRunner().invoke(app, ["bench", "compare", before, path]).exit_code
        for path in (same, slow, few, other)
    }
    assert found == {same: 0, slow: 1, few: 3, other: 2}


def test_json_of_a_comparison(tmp_path: Path) -> None:
    before = written(tmp_path, "a.json", noisy(1))
    slow = written(tmp_path, "b.json", noisy(3, slower=1.3))
    ended = CliRunner().invoke(app, ["bench", "compare", before, slow, "--json"])
    found = json.loads(ended.stdout)
    assert [change["verdict"] for change in found["changes"]] == ["slower", "slower"]


def test_a_git_ref_stands_for_the_file_committed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ("git", "-c", "user.name=x", "-c", "user.email=x@y", *arguments),
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    for name, slower in (("before", 1.0), ("after", 1.3)):
        noisy(1 if slower == 1 else 2, slower=slower).save(tmp_path / "results" / "x.json")
        git("add", ".")
        git("commit", "-qm", name)
        git("tag", name)
    old, new = load("before", "results/x.json"), load("after:results/x.json")
    assert {c.verdict for c in compare(old, new).changes} == {Verdict.slower}
    ended = CliRunner().invoke(
        app, ["bench", "compare", "before", "after", "--file", "results/x.json"]
    )
    assert ended.exit_code == 1
    for source, message in (("nowhere:results/x.json", "nowhere"), ("before", "--file")):
        with pytest.raises(UserError, match=message):
            load(source)
    with pytest.raises(UserError, match="git ref"):
        load("--output=x:y")
