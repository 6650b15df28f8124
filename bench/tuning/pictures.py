"""The pictures of docs/joint.md: loss gaps with their spread, and clips side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.tuning.tables import CLIPS, GAPS, LARGEST_GAP, Experiment, Spread, drawable
from bench.tuning.variants import VARIANTS, Run, Scale
from fpsc.evaluate.sampling import ClipSet
from fpsc.policy.pictures import save
from fpsc.quality.pictures import write_sheet

GROUPS = {
    "paper's order": ("untrained", "sparse", "fp8", "joint"),
    "dense early": ("untrained-safe", "sparse-safe", "fp8-safe", "joint-safe"),
    "constant": ("untrained-constant", None, None, "joint-constant"),
    "one scale for V": ("untrained-v-tensor", None, None, "joint-v-tensor"),
}
KINDS = {
    "not trained": "#d1495b",
    "trained sparse": "#e9b44c",
    "trained in FP8": "#8e6c8a",
    "trained jointly": "#22577a",
}
SHOWN = ("dense", "untrained", "sparse", "fp8", "joint")
INK, GRID = "#333333", "#e2e4e8"


def gaps_figure(experiment: Experiment) -> Figure:
    """Bars of the loss gap by variant, and its course over the noise levels."""
    figure = Figure(figsize=(10, 6.6), layout="constrained", facecolor="white")
    bars, course = figure.subplots(2, 1, height_ratios=[1.15, 1])
    _bars(bars, experiment)
    _course(course, experiment)
    return figure


def _bars(axes: Axes, experiment: Experiment) -> None:
    width = 0.2
    for index, (kind, colour) in enumerate(KINDS.items()):
        places, means, deviations = [], [], []
        for group, names in enumerate(GROUPS.values()):
            name = names[index]
            found = experiment.gaps(name) if name else None
            if found is not None:
                places.append(group + (index - 1.5) * width)
                means.append(100 * found.mean)
                deviations.append(100 * (found.deviation or 0))
        if not places:
            continue
        drawn = axes.bar(
            places, means, width * 0.92, yerr=deviations, color=colour, label=kind, capsize=2,
            error_kw={"ecolor": INK, "elinewidth": 1},
        )  # fmt: skip
        for label in axes.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.axhline(100 * LARGEST_GAP, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{LARGEST_GAP:.0%}", (1, 100 * LARGEST_GAP), xycoords=("axes fraction", "data"),
        xytext=(3, 0), textcoords="offset points", va="center", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_xticks(range(len(GROUPS)), list(GROUPS))
    axes.set_ylabel("loss gap to dense, %")
    axes.margins(y=0.12)
    axes.set_title("Validation loss as run", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
    _plain(axes)


def _course(axes: Axes, experiment: Experiment) -> None:
    noise = next(record.losses.noise for record in experiment.records.values())
    places = range(len(noise))
    shown = {"untrained": "--", "sparse": "-", "fp8": "-", "joint": "-"}
    for (name, line), (kind, colour) in zip(shown.items(), KINDS.items(), strict=True):
        found = [experiment.gaps(name, level) for level in places]
        spreads = [spread for spread in found if spread is not None]
        if len(spreads) == len(noise):
            _band(axes, spreads, colour, line, kind)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(places, [f"{level:g}" for level in noise])
    axes.set_xlabel("noise")
    axes.set_ylabel("loss gap to dense, %")
    axes.set_title("The paper's order, by noise level", loc="left", fontsize=11)
    _plain(axes)


def _band(axes: Axes, spreads: list[Spread], colour: str, line: str, label: str) -> None:
    means = [100 * spread.mean for spread in spreads]
    axes.plot(range(len(means)), means, line, color=colour, marker="o", markersize=4, label=label)
    low = [m - 100 * (s.deviation or 0) for m, s in zip(means, spreads, strict=True)]
    high = [m + 100 * (s.deviation or 0) for m, s in zip(means, spreads, strict=True)]
    axes.fill_between(range(len(means)), low, high, color=colour, alpha=0.15, linewidth=0)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def sheet(scale: Scale, work: Path, path: Path, *, seed: int = 0, index: int = 0) -> bool:
    """Draw one clip of every shown variant, from the same noise, where all have been sampled.

    Returns:
        Whether they have; else the picture stays as it is.
    """
    sets = ClipSet(seed, scale.clips, scale.steps)
    clips: dict[str, torch.Tensor] = {}
    for name in SHOWN:
        folder = work / Run(VARIANTS[name], seed).name / "clips"
        if not sets.file(folder, index).is_file():
            return False
        clips[VARIANTS[name].title] = sets.clip(folder, index)
    write_sheet(clips, path, sets.scenes[index].prompt)
    return True


def draw(experiment: Experiment, scale: Scale, work: Path, folder: Path) -> Mapping[str, bool]:
    """Write the pictures of docs/joint.md, each with whether there was enough to draw it."""
    enough = drawable(experiment)
    if enough:
        save(gaps_figure(experiment), str(folder / GAPS))
    return {GAPS: enough, CLIPS: sheet(scale, work, folder / CLIPS)}
