"""The report of a tuning: tune.html, a page of its own, and tune.png. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fpsc.files import replacing
from fpsc.pages import charts, render
from fpsc.pages.charts import Chart
from fpsc.policy.pictures import PALETTE
from fpsc.tune import drawing, landscape
from fpsc.tune.drawing import Look, Point
from fpsc.tune.landscape import Landmark
from fpsc.tune.tune import Result

PAGE = Look(charts.INK, charts.SOFT, charts.SERIES)
PAPER = Look("#1b1f24", "#59636e", PALETTE)


def write(result: Result, folder: Path) -> list[Path]:
    """Write both files; returns their paths."""
    page, picture = folder / "tune.html", folder / "tune.png"
    uniform = landscape.uniform_modes(result.calibration)
    presets, left_out = landscape.built_in(result.calibration)
    render.write(page, html(result, uniform, presets, left_out))
    with replacing(picture) as beside, matplotlib.rc_context({"savefig.dpi": 110}):
        png(result, uniform, presets).savefig(beside, format="png", metadata={"Software": None})
    return [page, picture]


def html(
    result: Result, uniform: list[Landmark], presets: list[Landmark], left_out: list[str]
) -> str:
    """The page."""
    return render.render(
        "tune.html",
        title=f"Tuning of {result.calibration.facts.model}",
        facts=result.calibration.facts,
        run=result.calibration.run,
        gains=[float(g) for g in result.calibration.gains],
        share=[float(s) for s in result.calibration.share],
        tuned=result.tuned,
        presets=presets,
        left_out=left_out,
        charts=_charts(result, uniform, presets),
    )


def _charts(result: Result, uniform: list[Landmark], presets: list[Landmark]) -> list[Chart]:
    calibration, chosen = result.calibration, result.chosen[0]
    run, bins = calibration.run, calibration.run.bins
    width, height = 9.0, 1.1 + min(0.28 * run.layers, 4.0)
    found = []
    with charts.style():
        figure, axes = charts.figure(9, 4.2)
        drawing.front(axes, *_points(result), uniform, presets, PAGE)
        figure.legend(loc="outside lower center", ncols=3)
    found.append(
        charts.chart(
            "front",
            "Error against keep",
            "As predicted: the line is what tuning reaches, every cross one mode in all heads at "
            "all noise. Diamonds are what the tuned policies did on held-out prompts.",
            figure,
        )
    )
    with charts.style():
        figure = Figure(figsize=(width, height), layout="constrained")
        row = figure.subplots(1, bins, squeeze=False)[0]
        figure.colorbar(drawing.sensitivity(row, calibration), ax=list(row))
    found.append(
        charts.chart(
            "sensitivity",
            "What each head matters",
            f"The relative error of the result if only this head ran in {run.references[1]}, in "
            "this bin of noise.",
            figure,
        )
    )
    with charts.style():
        figure = Figure(figsize=(width, 2 * height), layout="constrained")
        rows = figure.subplots(2, bins, squeeze=False)
        figure.colorbar(drawing.keeps(rows[0], calibration, chosen.choice), ax=list(rows[0]))
        figure.legend(handles=_patches(rows[1], result), loc="outside lower center", ncols=7)
    found.append(
        charts.chart(
            "chosen",
            f"What was chosen for {chosen.budget}",
            "Above the keep of each head, below its pattern.",
            figure,
        )
    )
    with charts.style():
        figure = _attention(result)
    found.append(
        charts.chart(
            "attention",
            "Where attention goes",
            "From the tile in the middle of the video, framed, to every tile, time slab by time "
            "slab. From the head that sparse attention changes most to the one that it changes "
            "least.",
            figure,
        )
    )
    return found


def png(result: Result, uniform: list[Landmark], presets: list[Landmark]) -> Figure:
    """The front, and the keep of every head for the first budget."""
    calibration, bins = result.calibration, result.calibration.run.bins
    figure = Figure(figsize=(10, 9), layout="constrained", facecolor="white")
    figure.suptitle(f"Tuning of {calibration.facts.model}", fontsize=12, fontweight="bold")
    # Apart, so that the legend of the one takes no room from the other two.
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=[2.2, 1, 1])
    top, middle, bottom = parts[:, 0]
    axes = top.subplots()
    drawing.front(axes, *_points(result), uniform, presets, PAPER)
    axes.grid(color="#e3e6ea")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    first = middle.subplots(1, bins, squeeze=False)[0]
    label = f"error of the head\nalone in {calibration.run.references[1]}"
    middle.colorbar(drawing.sensitivity(first, calibration), ax=list(first), label=label)
    second = bottom.subplots(1, bins, squeeze=False)[0]
    chosen = result.chosen[0]
    drawn = drawing.keeps(second, calibration, chosen.choice)
    bottom.colorbar(drawn, ax=list(second), label=f"keep\n({chosen.budget})")
    return figure


def _points(result: Result) -> tuple[list[Point], list[Point]]:
    """(the line of the front, the policies that were made)."""
    line = [Point(c.budget.slug, c.predicted.keep, c.predicted.error) for c, _ in result.front]
    line += [Point(c.budget.slug, c.predicted.keep, c.predicted.error) for c in result.chosen]
    tuned = [
        Point(
            each.name,
            each.predicted.keep,
            each.predicted.error,
            each.validation.error if each.validation else None,
        )
        for each in result.tuned
    ]
    return sorted(line, key=lambda point: point.keep), tuned


def _patches(axes: Any, result: Result) -> list[Patch]:
    names = drawing.kinds(axes, result.calibration, result.chosen[0].choice)
    return [Patch(color=drawing.COLOURS[drawing.KINDS.index(name)], label=name) for name in names]


def _attention(result: Result) -> Figure:
    places = drawing.telling(result.calibration)
    run = result.calibration.run
    t, y, x = run.tiles
    wide = t * (x + 1) / y
    columns = min(3, max(1, round(6 / wide)))
    rows = -(-len(places) // columns)
    height = min(9.0 / columns / wide, 2.0) + 0.35
    figure = Figure(figsize=(9, height * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, place in zip(every, places, strict=False):
        drawing.attention(axes, result.calibration, place)
    for axes in every[len(places) :]:
        axes.set_axis_off()
    return figure
