"""Fits of made-up curves find what was put in."""

from __future__ import annotations

import numpy as np
import pytest

from fpsc.bench.fits import PAIRS, break_even, break_evens, fit, fits_of
from fpsc.bench.record import Case, Point, Role
from tests.bench.records import case, problem, result


def points(x: list[float], y: list[float]) -> list[Point]:
    return [Point(x=a, seconds=b, case="c") for a, b in zip(x, y, strict=True)]


X = [1024.0, 2048.0, 4096.0, 8192.0, 16384.0]


@pytest.mark.parametrize(("exponent", "overhead"), [(2.0, 0.0), (1.0, 0.02), (1.5, 0.005)])
def test_a_power_law_with_an_overhead_is_found(exponent: float, overhead: float) -> None:
    y = [overhead + 1e-9 * x**exponent * 100 ** (2 - exponent) for x in X]
    found = fit("tokens", "x", points(X, y))
    assert found.exponent == pytest.approx(exponent, abs=0.02)
    assert found.overhead == pytest.approx(overhead, rel=0.05, abs=1e-6)
    assert found.r2 > 0.999
    if overhead:
        assert found.dominated_below is not None
        grown = found.factor * found.dominated_below**found.exponent
        assert grown == pytest.approx(found.overhead, rel=1e-3)
    else:
        assert found.dominated_below is None


def test_noise_shows_in_the_range_of_the_exponent() -> None:
    drawn = np.random.default_rng(0)
    y = [1e-9 * x**2 * float(drawn.lognormal(0, 0.1)) for x in X]
    found = fit("tokens", "x", points(X, y))
    assert found.exponent_range is not None
    low, high = found.exponent_range
    assert low < high
    assert low - 0.2 < 2 < high + 0.2


def series() -> list[Case]:
    """SDPA grows with the square; fpsattn visits a quarter, and has an overhead."""
    found = []
    for t in (1, 2, 4, 8):
        grid = (t, 16, 32)
        n = t * 512
        dense, sparse = 1e-8 * n**2, 0.012 + 0.25e-8 * n**2
        found.append(
            case(
                f"scaling/tokens/{n}",
                problem=problem(grid=grid, heads=1),
                results=[
                    result("SDPA", [dense] * 3, Role.eager),
                    result("fpsattn", [sparse] * 3, Role.fpsattn, keep=0.25, visited=0.25),
                ],
            )
        )
    return found


def test_a_series_gives_its_fits_and_its_break_even() -> None:
    by_name = {(f.axis, f.contender): f for f in fits_of(series())}
    assert set(by_name) == {("tokens", "SDPA"), ("tokens", "fpsattn"), (PAIRS, "fpsattn")}
    assert by_name["tokens", "SDPA"].exponent == pytest.approx(2, abs=0.02)
    assert by_name[PAIRS, "fpsattn"].exponent == pytest.approx(1, abs=0.02)
    (even,) = break_evens(series())
    # 1e-8 n^2 = 0.012 + 0.25e-8 n^2 at n = 1265
    assert even.faster == "above" and even.at == pytest.approx(1265, rel=0.1)


def test_cases_of_no_series_give_nothing() -> None:
    assert fits_of([case("a"), case("b"), case("c")]) == []
    assert break_evens([case("a"), case("b")]) == []


def test_who_always_wins_crosses_nowhere() -> None:
    always = break_even("keep", "x", [(0.1, 3.0, "y"), (1.0, 1.5, "y")])
    never = break_even("keep", "x", [(0.1, 0.3, "y"), (1.0, 0.5, "y")])
    assert (always.at, always.faster) == (None, "always")
    assert (never.at, never.faster) == (None, "never")
    below = break_even("keep", "x", [(0.25, 2.0, "y"), (1.0, 0.5, "y")])
    assert below.at == pytest.approx(0.5) and below.faster == "below"
