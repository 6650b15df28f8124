"""What a calibration and its solutions look like, on axes of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.patches import Rectangle

from fpsc.policy.patterns import pattern_of
from fpsc.policy.values import NoiseRange
from fpsc.tune.landscape import Landmark
from fpsc.tune.record import Calibration

Array = np.ndarray

KINDS = ("dense", "near", "window", "frame", "column", "radial", "explicit")
"""Patterns, in the order of their colours."""

COLOURS = ("#e7e9ec", "#2e6f9e", "#57a773", "#e9b44c", "#d1495b", "#8e6c8a", "#3d405b")


@dataclass(frozen=True)
class Look:
    """Colours of lines, by their use."""

    ink: str
    soft: str
    series: Sequence[str]


@dataclass(frozen=True)
class Point:
    """A policy on the front: predicted and, where it was run, true error."""

    name: str
    keep: float
    predicted: float
    found: float | None = None


def front(
    axes: Axes,
    line: Sequence[Point],
    tuned: Sequence[Point],
    uniform: Sequence[Landmark],
    presets: Sequence[Landmark],
    look: Look,
) -> None:
    """Keep to the right, error upwards: the lower left is best."""
    axes.plot(
        [p.keep for p in line],
        [p.predicted for p in line],
        color=look.series[0],
        marker="o",
        markersize=3,
        label="tuned",
    )
    known = [p for p in tuned if p.found is not None]
    if known:
        axes.plot(
            [p.keep for p in known],
            [p.found or 0.0 for p in known],
            linestyle="none",
            marker="D",
            markersize=7,
            markerfacecolor="none",
            color=look.series[0],
            label="tuned, found on held-out prompts",
        )
    axes.plot(
        [m.predicted.keep for m in uniform],
        [m.predicted.error for m in uniform],
        linestyle="none",
        marker="x",
        color=look.soft,
        label="one mode everywhere",
    )
    for i, mark in enumerate(presets):
        axes.plot(
            [mark.predicted.keep],
            [mark.predicted.error],
            linestyle="none",
            marker="s^vP*Xd<>"[i % 9],
            markersize=8,
            color=look.series[1 + i % (len(look.series) - 1)],
            label=mark.label,
        )
    axes.set_yscale("log")
    axes.set(xlabel="keep, mean over the run", ylabel="predicted relative error of the result")
    axes.set_xlim(0, 1.02)


def sensitivity(axes: Sequence[Axes], calibration: Calibration) -> Any:
    """A map for each bin: the error of the result if this head alone ran in the strong
    reference."""
    mode = calibration.names.index(calibration.run.references[1])
    values = np.sqrt(calibration.loss(calibration.gains)[..., mode])
    positive = values[values > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1e-6, 1.0)
    norm = LogNorm(max(low, high * 1e-4), high if high > low else 2 * high)
    return _maps(axes, calibration, np.maximum(values, norm.vmin or 1e-12), norm=norm)


def keeps(axes: Sequence[Axes], calibration: Calibration, choice: Array) -> Any:
    """A map for each bin: the keep of the chosen modes."""
    values = np.array(calibration.run.keep)[choice]
    return _maps(axes, calibration, values, vmin=0, vmax=1)


def kinds(axes: Sequence[Axes], calibration: Calibration, choice: Array) -> list[str]:
    """A map for each bin: the patterns of the chosen modes. Returns those that occur."""
    of_mode = [KINDS.index(pattern_of(mode).kind) for mode in calibration.policy.modes.values()]
    values = np.array(of_mode)[choice]
    norm = BoundaryNorm(np.arange(len(KINDS) + 1) - 0.5, len(KINDS))
    _maps(axes, calibration, values, cmap=ListedColormap(COLOURS), norm=norm)
    return [KINDS[i] for i in np.unique(values)]


def _maps(axes: Sequence[Axes], calibration: Calibration, values: Array, **how: Any) -> Any:
    """values: [bins, layers, heads]."""
    edges = calibration.run.edges
    for b, each in enumerate(axes):
        drawn = each.imshow(values[b], aspect="auto", interpolation="nearest", **how)
        each.set_title(
            f"noise {NoiseRange(round(edges[b], 2), round(edges[b + 1], 2))}", fontsize=9
        )
        each.set_xlabel("head")
        each.grid(False)
        if b == 0:
            each.set_ylabel("layer")
        else:
            each.set_yticks([])
        whole(each, values.shape[2], values.shape[1], first=b == 0)
    return drawn


def whole(axes: Axes, heads: int, layers: int, *, first: bool) -> None:
    """Ticks at whole numbers."""
    axes.set_xticks(range(0, heads, max(1, heads // 6)))
    if first:
        axes.set_yticks(range(0, layers, max(1, layers // 8)))


def attention(axes: Axes, calibration: Calibration, place: tuple[int, int, int]) -> None:
    """Where the attention of the tile in the middle of the video goes in one head: a map of each
    time slab of tiles, time from left to right; the tile itself is framed."""
    b, layer, head = place
    tiles = calibration.run.tiles
    t, y, x = tiles
    values = calibration.maps[b, layer, head].reshape(tiles)
    gap = np.full((t, y, 1), np.nan, values.dtype)
    picture = np.concatenate([values, gap], axis=2).transpose(1, 0, 2).reshape(y, t * (x + 1))
    top = float(np.nanmax(picture))
    axes.imshow(picture[:, :-1], aspect="equal", interpolation="nearest", vmin=0, vmax=top or 1.0)
    middle = np.unravel_index(values.size // 2, tiles)
    corner = (middle[0] * (x + 1) + middle[2] - 0.5, middle[1] - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d1495b", linewidth=1.6))
    axes.set_axis_off()
    axes.set_title(
        f"layer {layer}, head {head}, noise {calibration.run.levels[b]:.2f}: "
        f"{values.flat[values.size // 2]:.0%} to itself",
        fontsize=8,
        loc="left",
    )


def telling(calibration: Calibration, n: int = 6) -> list[tuple[int, int, int]]:
    """Heads that show the spread: at the middle level, from the one that sparse attention changes
    most to the one that it changes least."""
    mode = calibration.names.index(calibration.run.references[1])
    b = calibration.run.bins // 2
    loss = calibration.mean_damage[b, ..., mode]
    order = np.argsort(-loss, axis=None)
    picked = order[
        np.unique(np.linspace(0, len(order) - 1, min(n, len(order))).round().astype(int))
    ]
    return [(b, int(i // loss.shape[1]), int(i % loss.shape[1])) for i in picked]
