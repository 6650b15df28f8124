"""The targets of the committed measurements, on made-up records, and their commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import committed
from fpsc.bench.fits import PAIRS
from fpsc.bench.record import Case, Fit, Problem, Role, Run, Split
from tests.bench.records import case, problem, result, run


def op_case(keep: float, seconds: float) -> Case:
    return case(
        f"attention/13x30x52/keep-{keep:g}",
        results=[
            result("SDPA (default)", [4.0] * 5, Role.eager),
            result(f"FlexAttention keep {keep:g}, padded tiles", [1.0] * 5, keep=keep),
            result(f"fpsattn keep {keep:g}", [seconds] * 5, Role.fpsattn, keep=keep),
        ],
    )


def compiled(cache: str, seconds: float, layers: int = 30) -> Case:
    return case(
        f"compile/wan-2.1-1.3b/{cache}",
        problem=problem(layers=layers, cache=cache),
        results=[
            result("Inductor", [10.0] * 5),
            result("fpsattn keep 0.25", [seconds] * 5, Role.fpsattn, keep=0.25),
        ],
    )


def points(tokens: tuple[int, ...], exponent: float) -> Run:
    cases = [case(f"scaling/tokens/{n}", problem=problem(grid=(n // 512, 16, 32))) for n in tokens]
    fit = Fit(
        axis=PAIRS,
        contender="fpsattn",
        points=(),
        exponent=exponent,
        factor=1.0,
        overhead=0.0,
        r2=1.0,
    )
    return run(cases, fits=(fit,))


def whole(seconds: float) -> Run:
    split = Split(attention=6.0, linear=3.0, rest=1.0)
    return run(
        [
            case(
                "transformer/wan-2.1-1.3b/480p",
                results=[
                    result("eager", [12.0] * 5, Role.eager),
                    result("Inductor", [10.0] * 5, split=split),
                    result("fpsattn keep 0.125", [seconds] * 5, Role.fpsattn, keep=0.125),
                ],
            )
        ]
    )


@pytest.mark.parametrize(
    ("name", "found", "met"),
    [
        ("attention", run([op_case(0.25, 0.9), op_case(0.125, 0.5)]), True),
        ("attention", run([op_case(0.25, 0.9), op_case(0.125, 0.9)]), False),  # 4.4x of SDPA
        ("attention", run([op_case(0.25, 1.1), op_case(0.125, 0.5)]), False),  # Flex is faster
        ("attention", run([op_case(0.25, 0.9)]), False),
        ("scaling", points((2048, 8192, 32768), 1.02), True),
        ("scaling", points((2048, 8192, 32768), 1.3), False),
        ("scaling", points((2048, 8192), 1.0), False),
        ("compile", run([compiled("cold", 11.4), compiled("warm", 12.4)]), True),
        ("compile", run([compiled("cold", 11.6), compiled("warm", 12.4)]), False),
        ("compile", run([compiled("cold", 11.4), compiled("warm", 12.6)]), False),
        ("compile", run([compiled("cold", 11.4, 2), compiled("warm", 12.4, 2)]), False),
        ("transformer", whole(6.0), True),
        ("transformer", whole(6.5), False),
        ("transformer", run([case("x")]), False),
    ],
)
def test_targets(
    name: str, found: Run, met: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    found.save(tmp_path / f"{name}.json")
    assert committed.main([name, "--check"]) == (0 if met else 1)
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) is not met
    assert name != "transformer" or "if attention were free" in printed or not met


def test_a_file_that_is_not_there_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    assert committed.main(["scaling", "--check"]) == 1


@pytest.mark.parametrize("name", committed.MEASUREMENTS)
def test_the_commands_measure_what_the_targets_are_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs as it stands, up to the measuring itself."""
    from typer.testing import CliRunner

    from fpsc.bench import run as runs
    from fpsc.cli import app

    seen: list[Problem] = []

    def stop(plan: Any, *_: Any) -> Run:
        cases = [runs.sized(spec, plan.machine, plan.forced) for spec in plan.specs]
        seen.extend(each.problem for each in cases)
        assert plan.effort.rounds >= 5
        return run(planned=tuple(n for spec in plan.specs for n in spec.names()))

    monkeypatch.setattr(runs, "run", stop)
    arguments = ["bench", "run", *committed.MEASUREMENTS[name].arguments]
    ended = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "x.json")])
    assert ended.exit_code == 0, ended.output
    tokens = {p.tokens for p in seen}
    if name == "scaling":
        assert {2048, 32768} <= tokens
    elif name == "compile":
        assert [(p.layers, p.heads) for p in seen] == [(30, 12)] and max(tokens) <= 128
    else:
        assert tokens == {13 * 30 * 52}
    if name == "transformer":
        assert [(p.layers, p.heads, p.head_dim) for p in seen] == [(4, 12, 128)]
