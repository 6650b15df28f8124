"""What the charts of a report draw is what the record says."""

from __future__ import annotations

from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from fpsc.bench import charts
from fpsc.bench.record import Fit, Memory, Point, Role
from tests.bench.records import case, result, run
from tests.bench.test_report import whole

RECORD = whole()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that become charts, in order."""
    figures: list[matplotlib.figure.Figure] = []
    real = charts.charts.chart

    def keep(name: str, title: str, description: str, figure: Any) -> Any:
        figures.append(figure)
        return real(name, title, description, figure)

    monkeypatch.setattr(charts.charts, "chart", keep)
    return figures


def test_speed_against_error(drawn: list[Any]) -> None:
    found = RECORD.cases[0]
    chart = charts.speed_against_error("a", found)
    assert chart is not None
    axes = drawn[0].axes[0]
    points = [container.lines[0].get_xydata()[0] for container in axes.containers]
    sparse = [r for r in found.measured if r.role is Role.fpsattn]
    assert np.allclose(points, [[r.error, r.to_best.median] for r in sparse if r.to_best])
    labels = axes.get_legend_handles_labels()[1]
    assert {"eager (dense)", "Inductor (dense)", "fpsattn half", "fpsattn slow"} == set(labels)


def test_the_front_is_what_nothing_beats() -> None:
    found = charts._front({0.2: 4.0, 0.1: 2.0, 0.15: 1.5, 0.3: 3.0, 0.4: 4.5})
    assert list(found.items()) == [(0.1, 2.0), (0.2, 4.0), (0.4, 4.5)]


def test_speeds_of_a_chart_are_against_one_contender(drawn: list[Any]) -> None:
    """What skips the same tiles is the rival of fpsattn in the table; here both are points."""
    found = case(
        "a",
        results=[
            result("dense", [8.0], Role.eager, error=0.0),
            result("flex", [4.0], error=0.2, keep=0.25),
            result("fpsattn", [2.0], Role.fpsattn, error=0.21, keep=0.25),
        ],
    )
    assert found.measured[2].best == "flex"
    assert charts.speed_against_error("a", found) is not None
    axes = drawn[0].axes[0]
    points = [container.lines[0].get_xydata()[0] for container in axes.containers]
    assert np.allclose(points, [[0.2, 2.0], [0.21, 4.0]])
    assert axes.get_ylabel() == "times as fast as dense"


def test_one_point_is_no_chart() -> None:
    assert charts.speed_against_error("a", case("a")) is None


def test_steps_follow_one_another(drawn: list[Any]) -> None:
    found = RECORD.cases[1]
    fast = found.measured[1]
    chart = charts.waterfall("a", found, fast)
    assert chart is not None and "eager" in chart.description
    bars = [patch for container in drawn[0].axes[0].containers for patch in container]
    dense, sparse = bars[: len(fast.steps)], bars[len(fast.steps) :]
    for steps, patches in ((found.measured[0].steps, dense), (fast.steps, sparse)):
        widths = [step.seconds.median for step in steps]
        assert np.allclose([bar.get_width() for bar in patches], widths)
        assert np.allclose([bar.get_x() for bar in patches], np.cumsum([0, *widths[:-1]]))
    colours = [bar.get_facecolor() for bar in sparse]
    assert colours[:3] == colours[:1] * 3 and colours[3:] == colours[3:4] * 4
    assert colours[0] != colours[3]
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["calm", "fast + calm", "eager"]


def test_parts_of_a_split_add_up(drawn: list[Any]) -> None:
    found = RECORD.cases[0]
    assert charts.amdahl("a", found) is not None
    profiled = [r.split for r in found.measured if r.split]
    parts = drawn[0].axes[0].containers
    assert [len(part) for part in parts] == [len(profiled)] * 3
    for name, part in zip(charts.PARTS, parts, strict=True):
        assert np.allclose([bar.get_width() for bar in part], [getattr(s, name) for s in profiled])
    ends = [bar.get_x() + bar.get_width() for bar in parts[-1]]
    assert np.allclose(ends, [s.total for s in profiled])


def test_memory_is_what_was_there_and_what_the_call_added(drawn: list[Any]) -> None:
    kept = Memory(peak=3 * 2**30, before=2**30, source="allocator")
    found = case("a", results=[result("eager", [1.0], Role.eager, memory=kept)])
    assert charts.memory("a", found) is not None
    assert [bar[0].get_width() for bar in drawn[0].axes[0].containers] == [1, 2]
    assert charts.memory("a", case("a")) is None


def test_fits_go_through_their_points(drawn: list[Any]) -> None:
    xs = (1000.0, 4000.0, 16000.0)
    points = tuple(Point(x=x, seconds=0.5 + 2e-6 * x**1.5, case="c") for x in xs)
    fit = Fit(axis="tokens", contender="a", points=points, exponent=1.5, factor=2e-6, overhead=0.5,
              r2=1.0)  # fmt: skip
    assert charts.scaling("a", "tokens", [fit], []) is not None
    dots, line = drawn[0].axes[0].lines
    assert np.allclose(dots.get_xydata(), [[p.x, p.seconds] for p in points])
    x, y = line.get_data()
    assert x[0] == xs[0] and x[-1] == pytest.approx(xs[-1])
    assert np.allclose([y[0], y[-1]], [points[0].seconds, points[-1].seconds])
    assert charts.scaling("a", "tokens", [], []) is None


def test_times_of_cases_that_compile(drawn: list[Any]) -> None:
    found = RECORD.cases[2]
    assert charts.durations("a", found) is not None
    widths = [bar.get_width() for bar in drawn[0].axes[0].patches]
    assert widths == [r.seconds.median for r in found.measured if r.seconds]


def test_nothing_measured_draws_nothing() -> None:
    empty = case("a").model_copy(update={"results": (), "best": None})
    assert charts.amdahl("a", empty) is None and charts.durations("a", empty) is None
    assert run([empty]).cases
