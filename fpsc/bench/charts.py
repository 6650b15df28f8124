"""The charts of a report. Every one is drawn from a record and from nothing else.

Needs matplotlib. Each function returns None where the record has nothing for its chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fpsc.bench.record import BreakEven, Case, Fit, Result, Role, Step, ratio
from fpsc.pages import charts
from fpsc.pages.charts import HATCHES, INK, MARKERS, PAPER, SERIES, SOFT, Chart

MAX_TICKS = 8
"""Measured points up to which an axis of a fit names every one."""

PARTS = ("attention", "linear", "rest")


def speed_against_error(name: str, case: Case) -> Chart | None:
    """What a speed costs: error to the right, speed upwards, the front of what nothing beats.

    All speeds are against one contender, the best dense one. Dense contenders are lines: their
    errors are those of rounding, and the table has them.
    """
    dense = case.of(case.best)
    speeds = {r.name: found for r in case.measured if (found := ratio(dense, r)) is not None}
    points = [r for r in case.measured if r.name in speeds and not _dense(r) and r.error]
    if dense is None or len(points) < 2:
        return None
    looks = _looks(case.results)
    with charts.style():
        figure, axes = charts.figure(8, 3.6)
        for r in case.measured:
            if _dense(r) and r.name in speeds:
                label = f"{r.name} (dense)"
                speed = speeds[r.name].median
                axes.axhline(speed, color=looks[r.name][0], linestyle=":", label=label)
        for r in points:
            colour, marker = looks[r.name]
            q = speeds[r.name]
            axes.errorbar(
                np.array([r.error]),
                [q.median],
                yerr=[[q.median - q.q1], [q.q3 - q.median]],
                color=colour,
                marker=marker,
                markersize=7,
                linestyle="none",
                label=r.name,
            )
        front = _front({(r.error or 0.0): speeds[r.name].median for r in points})
        axes.step(list(front), list(front.values()), where="post", color=SOFT, linewidth=1)
        axes.axhline(1, color=SOFT, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_minor_formatter(NullFormatter())
        errors = [r.error for r in points if r.error]
        if max(errors) < 10 * min(errors):  # hardly a power of ten among them
            axes.set_xticks(sorted(set(errors)))
        axes.set_ylim(bottom=0)
        axes.set(
            xlabel="error against the dense model (relative RMS)",
            ylabel=f"times as fast as {dense.name}",
        )
        _legend(figure, axes)
    return charts.chart(
        name,
        "Speed against error",
        f"Above the line at one it is faster than {dense.name}, the best that is dense. The steps "
        "join what nothing beats in both; bars are quartiles.",
        figure,
    )


def _plain(x: float, _: object = None) -> str:
    return f"{x:.2g}"


def _dense(r: Result) -> bool:
    return r.keep is None and r.role in (Role.eager, Role.baseline)


def _front(speeds: Mapping[float, float]) -> dict[float, float]:
    """Error -> speed of those that no other is both more exact and faster than, by rising error."""
    front: dict[float, float] = {}
    for error, speed in sorted(speeds.items()):
        if not front or speed > max(front.values()):
            front[error] = speed
    return front


def waterfall(name: str, case: Case, result: Result) -> Chart | None:
    """The steps of a sampling loop, one after another; colours are the policy's modes."""
    if not result.steps:
        return None
    dense = _dense_with_steps(case)
    phases = list(dict.fromkeys(phase_of(step) for step in result.steps))
    height = 1.4 + 0.17 * len(result.steps)
    with charts.style():
        figure, axes = charts.figure(8, min(height, 9))
        index = [step.index for step in result.steps]
        if dense is not None and dense.name != result.name:
            widths, starts = _spans(dense.steps)
            axes.barh(
                [step.index for step in dense.steps],
                widths,
                left=starts,
                height=0.86,
                facecolor="none",
                edgecolor=SOFT,
                linewidth=0.9,
            )
        widths, starts = _spans(result.steps)
        for step, width, start in zip(result.steps, widths, starts, strict=True):
            kind = phases.index(phase_of(step)) % len(SERIES)
            axes.barh(
                step.index,
                width,
                left=start,
                height=0.86,
                facecolor=SERIES[kind],
                edgecolor=PAPER,
                linewidth=0,
                hatch=HATCHES[kind],
            )
        axes.set_ylim(max(index) + 0.7, min(index) - 0.7)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds since the first step began", ylabel="step")
        handles = [
            Patch(facecolor=SERIES[i % 8], edgecolor=PAPER, linewidth=0, hatch=HATCHES[i % 8],
                  label=phase)
            for i, phase in enumerate(phases)
        ]  # fmt: skip
        if dense is not None and dense.name != result.name:
            handles.append(Patch(facecolor="none", edgecolor=SOFT, label=dense.name))
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
    compared = f" The outlines are the steps of {dense.name}." if dense is not None else ""
    return charts.chart(
        name,
        f"Each step of {result.name}",
        f"A bar is the median of a denoising step, its colour the policy's modes there.{compared}",
        figure,
    )


def phase_of(step: Step) -> str:
    """The modes of a step, in words."""
    return " + ".join(step.modes) or "without a policy"


def _dense_with_steps(case: Case) -> Result | None:
    """What a sampling loop is compared with: the best dense one, else eager, that has steps."""
    for candidate in (case.of(case.best), case.eager):
        if candidate is not None and candidate.steps:
            return candidate
    return None


def _spans(steps: Sequence[Step]) -> tuple[list[float], list[float]]:
    """Duration and beginning of each step, in seconds."""
    widths = [step.seconds.median for step in steps]
    return widths, [0.0, *accumulate(widths)][:-1]


def amdahl(name: str, case: Case) -> Chart | None:
    """Attention, linear layers and the rest, of each contender that was profiled."""
    found = [r for r in case.measured if r.split]
    if not found:
        return None
    with charts.style():
        figure, axes = charts.figure(8, 1.1 + 0.42 * len(found))
        left = np.zeros(len(found))
        rows = np.arange(len(found))
        for kind, part in enumerate(PARTS):
            widths = np.array([getattr(r.split, part) for r in found])
            axes.barh(
                rows,
                widths,
                left=left,
                height=0.7,
                facecolor=SERIES[kind],
                edgecolor=PAPER,
                linewidth=0,
                hatch=HATCHES[kind],
                label=part,
            )
            left += widths
        axes.set_yticks(rows, [r.name for r in found])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds of one call, from the profiler")
        figure.legend(loc="outside upper left", ncols=3)
    return charts.chart(
        name,
        "Where the time goes",
        "What remains beside attention bounds what faster attention can bring (Amdahl).",
        figure,
    )


def scaling(
    name: str, axis: str, fits: Sequence[Fit], break_evens: Sequence[BreakEven]
) -> Chart | None:
    """Cost along one axis: what was measured, and the fitted overhead + factor * x ** exponent."""
    if not fits:
        return None
    with charts.style():
        figure, axes = charts.figure(8, 3.8)
        for i, fit in enumerate(fits):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            x = np.array([point.x for point in fit.points])
            axes.plot(
                x,
                [point.seconds for point in fit.points],
                color=colour,
                marker=marker,
                linestyle="none",
                label=fit.contender,
            )
            line = np.geomspace(x.min(), x.max(), 60)
            axes.plot(line, fitted(fit, line), color=colour, linewidth=1.2)
        for crossing in break_evens:
            if crossing.at is not None:
                axes.axvline(crossing.at, color=INK, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({point.x for fit in fits for point in fit.points})
        if len(ticks) <= MAX_TICKS:
            axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=axis, ylabel="seconds")
        _legend(figure, axes)
    return charts.chart(
        name,
        f"Cost against {axis}",
        "Both axes are logarithmic; lines are the fits, dashed lines across where two are level.",
        figure,
    )


def fitted(fit: Fit, x: np.ndarray) -> np.ndarray:
    """What a fit says, in seconds."""
    return fit.overhead + fit.factor * x**fit.exponent


def _short(x: float, _: object = None) -> str:
    return f"{x / 1000:.3g}k" if x >= 1000 else f"{x:g}"


def durations(name: str, case: Case) -> Chart | None:
    """The times of all contenders as bars, with quartiles: of cases that compile."""
    found = [r for r in case.measured if r.seconds]
    if not found:
        return None
    looks = _looks(case.results)
    with charts.style():
        figure, axes = charts.figure(8, 0.9 + 0.4 * len(found))
        for row, r in enumerate(found):
            assert r.seconds is not None
            below, above = r.seconds.median - r.seconds.q1, r.seconds.q3 - r.seconds.median
            axes.barh(
                row,
                r.seconds.median,
                height=0.7,
                color=looks[r.name][0],
                xerr=[[below], [above]],
                ecolor=INK,
            )
        _names(axes, found)
        axes.set_xlabel("seconds")
    return charts.chart(name, "Times", "Medians; the thin lines are quartiles.", figure)


def memory(name: str, case: Case) -> Chart | None:
    """Peak of one call, and the part of it that was there before."""
    found = [r for r in case.measured if r.memory]
    if not found:
        return None
    with charts.style():
        figure, axes = charts.figure(8, 1.1 + 0.42 * len(found))
        for row, r in enumerate(found):
            assert r.memory is not None
            before, peak = r.memory.before / 2**30, r.memory.peak / 2**30
            axes.barh(row, before, height=0.7, facecolor=SERIES[7], linewidth=0)
            axes.barh(
                row,
                peak - before,
                left=before,
                height=0.7,
                facecolor=SERIES[1],
                edgecolor=PAPER,
                linewidth=0,
                hatch=HATCHES[1],
            )
        _names(axes, found)
        axes.set_xlabel("GiB")
        handles = [
            Patch(facecolor=SERIES[7], label="weights and inputs"),
            Patch(facecolor=SERIES[1], edgecolor=PAPER, hatch=HATCHES[1], label="of the call"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return charts.chart(name, "Memory", "The peak of one call.", figure)


def _names(axes: Axes, found: Sequence[Result]) -> None:
    axes.set_yticks(range(len(found)), [r.name for r in found])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")


def _looks(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each contender, the same in every chart of a case: fpsattn's first."""
    order = sorted(results, key=lambda r: r.role is not Role.fpsattn)
    return {
        r.name: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]) for i, r in enumerate(order)
    }
