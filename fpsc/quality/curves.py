"""A metric over the frames of a clip, as a chart. Needs matplotlib."""

from __future__ import annotations

import math

from matplotlib.ticker import MaxNLocator

from fpsc.pages import charts
from fpsc.pages.charts import Chart
from fpsc.quality.compare import Measure


def curves(measure: Measure) -> Chart:
    """Its value for each frame, and for the clip; frames that are equal (infinite) are gaps."""
    with charts.style():
        drawn, axes = charts.figure(8, 2.1)
        axes.plot(
            range(len(measure.by_frame)),
            [value if math.isfinite(value) else math.nan for value in measure.by_frame],
            color=charts.SERIES[0],
            marker="o",
            markersize=3,
            linewidth=1.4,
        )
        if math.isfinite(measure.value):
            axes.axhline(measure.value, color=charts.SOFT, linewidth=1, linestyle="--")
        unit = f", {measure.unit}" if measure.unit else ""
        axes.set(xlabel="frame", ylabel=f"{measure.name}{unit}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return charts.chart(
        f"curve-{measure.name.lower()}",
        f"{measure.name} of each frame",
        f"{measure.better.capitalize()} is more alike; the dashed line is the whole clip.",
        drawn,
    )
