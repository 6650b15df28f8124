"""How times are taken: turns, warm-up, rounds, gates. With a clock that is told what to say."""

from __future__ import annotations

import pytest
import torch

from fpsc.bench.measure import Effort, WallClock, gate, relative_rms, take_turns


class FakeClock:
    """Runs the work, and says that it took as long as its name is told to."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.order: list[str] = []

    def __call__(self, work: object) -> float:
        assert callable(work)
        name = str(work())
        self.order.append(name)
        return self.seconds[name]


def works(*names: str) -> dict[str, object]:
    return {name: (lambda name=name: name) for name in names}


def test_all_take_turns_and_warm_up_does_not_count() -> None:
    clock = FakeClock({"a": 1.0, "b": 2.0})
    found = take_turns(works("a", "b"), clock, Effort(rounds=3))  # type: ignore[arg-type]
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert clock.order == ["a", "b"] * 4


def test_rounds_end_in_time_but_not_before_the_least() -> None:
    clock = FakeClock({"a": 10.0, "b": 10.0})
    found = take_turns(works("a", "b"), clock, Effort(rounds=9, seconds=100))  # type: ignore[arg-type]
    assert len(found["a"]) == len(found["b"]) == 5
    found = take_turns(works("a", "b"), clock, Effort(rounds=9, seconds=1))  # type: ignore[arg-type]
    assert len(found["a"]) == 3


def test_warm_up_calls_are_made() -> None:
    calls: list[int] = []
    take_turns({"a": lambda: calls.append(1)}, lambda work: work() or 1.0, Effort(2, warmup=3))  # type: ignore[arg-type,return-value]
    assert len(calls) == 5


def test_progress_counts_rounds() -> None:
    told: list[tuple[int, int]] = []
    clock = FakeClock({"a": 1.0})
    take_turns(works("a"), clock, Effort(rounds=2), lambda a, b: told.append((a, b)))  # type: ignore[arg-type]
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_the_wall_clock_calls_once() -> None:
    calls: list[int] = []
    assert WallClock()(lambda: calls.append(1)) >= 0
    assert calls == [1]


def test_a_gate_judges_by_relative_error() -> None:
    right = torch.ones(4)
    assert gate(right, right, 1e-5, "x").passed
    assert gate(right * 1.001, right, 1e-2, "x").error == pytest.approx(1e-3)
    red = gate(right * 1.1, right, 1e-2, "x")
    assert not red.passed and red.against == "x" and red.allowed == 1e-2
    lost = gate(right * float("nan"), right, 1e-2, "x")
    assert not lost.passed and lost.error is None


def test_relative_rms_of_zero() -> None:
    zero = torch.zeros(3)
    assert relative_rms(zero, zero) == 0
    assert relative_rms(torch.ones(3), zero) == float("inf")
    assert relative_rms(torch.ones(3), zero, least=3.0**0.5) == pytest.approx(1.0)
