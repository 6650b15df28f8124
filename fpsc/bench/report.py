"""One HTML page of one or several records: `fpsc bench report FILE... -o report.html`.

The page needs no other file and no network. Every number on it is a `<data>` element whose value
is one of the record, or follows from such by what the record itself defines (`Split.total`,
`Split.bound`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fpsc.bench import charts
from fpsc.bench.record import BreakEven, Case, Fit, Level, Result, Role, Run, Status
from fpsc.pages import render
from fpsc.pages.charts import Chart

TITLES = {
    Level.attention: "Attention",
    Level.block: "One transformer block",
    Level.transformer: "One denoising step of the whole transformer",
    Level.sampling: "A whole sampling loop",
    Level.training: "One training step",
    Level.compile: "Compile time",
    Level.memory: "Memory",
}
ROLES = {
    Role.eager: "as the model comes",
    Role.baseline: "baseline",
    Role.approximate: "rounds",
    Role.fpsattn: "fpsattn",
}
UNAVAILABLE = (Status.absent, Status.skipped)


@dataclass(frozen=True)
class CaseView:
    """One case with its charts; anchor: its id on the page."""

    case: Case
    anchor: str
    charts: tuple[Chart, ...]

    @property
    def columns(self) -> frozenset[str]:
        """What at least one result has: other columns stay away."""
        names = ("error", "visited", "keep", "memory", "compile_seconds", "to_eager", "to_best")
        return frozenset(
            name for name in names for r in self.case.results if getattr(r, name) is not None
        )

    @property
    def rows(self) -> tuple[Result, ...]:
        """What the table lists: all but what could not run here, which is one line."""
        return tuple(r for r in self.case.results if r.status not in UNAVAILABLE)

    @property
    def unavailable(self) -> dict[str, list[str]]:
        """Reason -> contenders that could not run here, or were left out."""
        found: dict[str, list[str]] = {}
        for r in self.case.results:
            if r.status in UNAVAILABLE:
                found.setdefault(r.reason, []).append(r.name)
        return found

    @property
    def detailed(self) -> tuple[Result, ...]:
        """Those with a gate, a peak of memory or a timed first call."""
        return tuple(
            r
            for r in self.case.results
            if r.gates or r.memory is not None or r.compile_seconds is not None
        )

    @property
    def profiled(self) -> tuple[Result, ...]:
        return tuple(r for r in self.case.measured if r.split)

    @property
    def traced(self) -> bool:
        return any(r.split and r.split.trace for r in self.case.results)

    @property
    def stepped(self) -> tuple[Result, ...]:
        return tuple(r for r in self.case.measured if r.steps)


@dataclass(frozen=True)
class Scale:
    """All fits along one axis."""

    axis: str
    fits: tuple[Fit, ...]
    break_evens: tuple[BreakEven, ...]
    chart: Chart | None


@dataclass(frozen=True)
class RunView:
    """One record, sorted for reading."""

    file: str
    sha256: str
    anchor: str
    run: Run
    cases: tuple[CaseView, ...]
    scales: tuple[Scale, ...]

    @property
    def levels(self) -> tuple[tuple[Level, str, tuple[CaseView, ...]], ...]:
        """Levels that have cases, from the smallest to the largest; without those of the fits."""
        parts = (
            (level, TITLES[level], tuple(c for c in self._own if c.case.problem.level is level))
            for level in Level
        )
        return tuple(part for part in parts if part[2])

    @property
    def headlines(self) -> tuple[tuple[CaseView, Result], ...]:
        """What the run is about: every measured result of this backend."""
        return tuple(
            (view, r) for view in self._own for r in view.case.measured if r.role is Role.fpsattn
        )

    @property
    def fitted(self) -> tuple[CaseView, ...]:
        """Cases that are points of a fit."""
        names = {point.case for fit in self.run.fits for point in fit.points}
        return tuple(view for view in self.cases if view.case.name in names)

    @property
    def _own(self) -> tuple[CaseView, ...]:
        return tuple(view for view in self.cases if view not in self.fitted)

    @property
    def reduced(self) -> tuple[CaseView, ...]:
        return tuple(view for view in self.cases if view.case.problem.reduced)

    @property
    def left_out(self) -> dict[str, list[tuple[str, str, list[str]]]]:
        """Status -> (contender, reason, cases), of what was not measured."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for view in self.cases:
            for r in view.case.results:
                if r.status is not Status.measured:
                    found.setdefault((r.status, r.name, r.reason), []).append(view.case.name)
            if view.case.status is not Status.measured:
                key = (view.case.status, "the whole case", view.case.reason)
                found.setdefault(key, []).append(view.case.name)
        grouped: dict[str, list[tuple[str, str, list[str]]]] = {}
        for (status, name, reason), cases in found.items():
            grouped.setdefault(status, []).append((name, reason, cases))
        return grouped


def load(files: Sequence[Path]) -> list[RunView]:
    """Read records and draw their charts.

    Raises:
        RecordError: a file is not there, or is no record.
    """
    views = []
    for number, file in enumerate(files):
        run = Run.load(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        views.append(view(run, file.name, digest, f"run-{number}"))
    return views


def view(run: Run, file: str, sha256: str, anchor: str) -> RunView:
    """A run with its charts. `anchor` differs from those of other runs of the page."""
    cases = []
    for number, case in enumerate(run.cases):
        name = f"{anchor}-{number}-{_slug(case.name)}"
        drawn = [charts.speed_against_error(f"{name}-error", case)]
        if case.problem.level is Level.compile:
            drawn = [charts.durations(f"{name}-times", case)]
        drawn += [
            charts.waterfall(f"{name}-steps-{i}", case, r)
            for i, r in enumerate(case.measured)
            if r.role is Role.fpsattn
        ]
        drawn += [charts.amdahl(f"{name}-split", case), charts.memory(f"{name}-memory", case)]
        cases.append(CaseView(case, name, tuple(each for each in drawn if each)))
    scales = []
    for number, axis in enumerate(dict.fromkeys(fit.axis for fit in run.fits)):
        fits = tuple(fit for fit in run.fits if fit.axis == axis)
        crossings = tuple(each for each in run.break_evens if each.axis == axis)
        drawn_scale = charts.scaling(f"{anchor}-scale-{number}", axis, fits, crossings)
        scales.append(Scale(axis, fits, crossings, drawn_scale))
    return RunView(file, sha256, anchor, run, tuple(cases), tuple(scales))


def html(views: Sequence[RunView]) -> str:
    """The page."""
    return render.render(
        "report.html",
        title="Benchmarks of fpsattn",
        views=views,
        roles=ROLES,
        phase_of=charts.phase_of,
    )


def write(files: Sequence[Path], output: Path) -> None:
    """Read records, write their page.

    Raises:
        RecordError: a file is not there, or is no record.
        OSError: the page cannot be written.
    """
    render.write(output, html(load(files)))


def write_run(run: Run, record: Path, output: Path) -> None:
    """Write the page of a run that was saved as `record`.

    Raises:
        OSError: the page cannot be written.
    """
    digest = hashlib.sha256(run.text().encode("utf-8")).hexdigest()
    render.write(output, html([view(run, record.name, digest, "run-0")]))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
