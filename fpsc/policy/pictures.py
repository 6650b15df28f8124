"""Pictures of a policy: keep by noise and layer, what a tile sees, and the steps of a run.

Drawn with matplotlib, which is an extra: `pip install "fpsc[pictures]"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ..grid import TileShape, TokenGrid, tile_grid
from .accounting import Account
from .patterns import Pattern, fraction, pattern_of, visible
from .schema import Mode

QUERY, SEEN, UNSEEN = "#d1495b", "#2e6f9e", "#e7e9ec"
PALETTE = ("#22577a", "#57a773", "#e9b44c", "#d1495b", "#8e6c8a", "#3d405b", "#81b29a", "#f2845c")
MAX_WINDOWS = 4
"""Modes whose windows are drawn; a policy with more is better drawn mode by mode."""


MAX_SIDE_BY_SIDE = 5
"""Time slabs up to which the maps of two query tiles share a line."""


def policy_figure(account: Account, levels: Sequence[float] = ()) -> Figure:
    """Everything about a policy on one page: the run, keep by noise and layer, the windows.

    levels: the noise of each step; without them the strip of steps is left out.
    """
    policy, size = account.policy, account.size
    tile = policy.tile_for(size.grid)
    shown = _distinct(policy.modes)[:MAX_WINDOWS]
    heights = [1.6] * bool(levels) + [2.4] + [_height(size.grid, tile)] * len(shown)
    figure = Figure(figsize=(10, sum(heights) + 1.1), layout="constrained", facecolor="white")
    figure.suptitle(f"{policy.name}  on  {size.name}", fontsize=12, fontweight="bold")
    parts = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    row = 0
    if levels:
        steps(figure.add_subplot(parts[row]), account, levels)
        row += 1
    both = parts[row].subgridspec(1, 2, width_ratios=[1.15, 1])
    heat = keep_heatmap(figure.add_subplot(both[0]), account, axis="layer")
    keep_heatmap(figure.add_subplot(both[1]), account, axis="head")
    figure.colorbar(heat, ax=figure.axes[-2:], label="keep", fraction=0.03, pad=0.01)
    for i, (name, mode) in enumerate(shown, start=row + 1):
        pattern = pattern_of(mode)
        words = window_title(name, pattern, size.grid, tile)
        window(figure.add_subplot(parts[i]), pattern, size.grid, tile, title=words)
    return figure


def save(figure: Figure, path: str) -> None:
    """Writes a PNG whose bytes depend on what is drawn and on nothing else."""
    with matplotlib.rc_context({"savefig.dpi": 110}):
        figure.savefig(path, format="png", metadata={"Software": None})


def steps(axes: Axes, account: Account, levels: Sequence[float]) -> None:
    """A bar for every step: height its keep, colour its modes; and the noise as a line."""
    names = list(dict.fromkeys(n for r in account.rows_of_steps for n in account.modes_of(r)))
    colours = dict(zip(names, _colours(len(names)), strict=True))
    for step, row in enumerate(account.rows_of_steps):
        keep, bottom = account.row_keep()[row], 0.0
        for name, part in account.modes_of(row).items():
            axes.bar(
                step, part * keep, 0.86, bottom, color=colours[name], linewidth=0, align="center"
            )
            bottom += part * keep
    axes.plot(range(len(levels)), levels, color="black", linewidth=1.2, label="noise")
    axes.set(xlim=(-0.6, len(levels) - 0.4), ylim=(0, 1.03), xlabel="step", ylabel="keep, noise")
    axes.set_title(
        f"{account.dense_steps()} of {len(levels)} steps dense, mean keep {account.run_keep():.2f}",
        loc="left",
        fontsize=10,
    )
    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in colours.items()]
    handles += axes.get_lines()
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        fontsize=8,
        ncols=len(handles),
        frameon=False,
    )
    _plain(axes)


def keep_heatmap(axes: Axes, account: Account, axis: str) -> Any:
    """Keep by noise and layer, the mean over heads; or by noise and head, the mean over layers."""
    keep = account.keep.mean(axis=2 if axis == "layer" else 0)
    keep = keep if axis == "layer" else keep.T
    bounds = [account.table.noise_ranges[0].hi, *(r.lo for r in account.table.noise_ranges)]
    heat = axes.pcolormesh(
        bounds, np.arange(len(keep) + 1) - 0.5, keep, cmap="YlGnBu", vmin=0, vmax=1
    )
    axes.invert_xaxis()
    axes.invert_yaxis()
    # Of phases narrower than this the numbers would overlap.
    for column, (hi, lo) in enumerate(account.table.noise_ranges):
        if hi - lo >= 0.07:
            value = keep[:, column].mean()
            axes.text(
                (hi + lo) / 2,
                (len(keep) - 1) / 2,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if value > 0.55 else "black",
            )
    axes.set(xlabel="noise, from noisy to clean", ylabel=axis)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    other = "heads" if axis == "layer" else "layers"
    axes.set_title(f"keep by {axis} (mean over {other})", loc="left", fontsize=10)
    return heat


def window(
    axes: Axes, pattern: Pattern, grid: TokenGrid, tile: TileShape, *, title: str = ""
) -> None:
    """What a tile in the middle, and one in a corner, see: a map of each time slab of tiles.

    Drawn to scale in tokens, time from left to right; the query tile is red.
    """
    tiles = tile_grid(grid, tile)
    queries = {"middle": (tiles.t // 2, tiles.y // 2, tiles.x // 2), "corner": (0, 0, 0)}
    boxes: dict[str, list[Rectangle]] = {QUERY: [], SEEN: [], UNSEEN: []}
    slab, line = grid.x * 1.06, grid.y * 1.35
    for place, (name, query) in enumerate(queries.items()):
        seen = _seen(pattern, tiles, tile, query)
        # Both maps on one line as long as that leaves them large enough to read.
        left, top = (place * (tiles.t * slab + grid.x * 0.2), 0.0)
        if tiles.t > MAX_SIDE_BY_SIDE:
            left, top = 0.0, place * line
        for t, y, x in np.ndindex(tiles):
            corner = left + t * slab + x * tile.x, top + y * tile.y
            size = min(tile.x, grid.x - x * tile.x), min(tile.y, grid.y - y * tile.y)
            colour = QUERY if (t, y, x) == query else SEEN if seen[t, y, x] else UNSEEN
            boxes[colour].append(Rectangle(corner, *size))
        axes.text(left, top - 0.05 * grid.y, f"a tile in the {name}", fontsize=7, color="#555555")
    for colour, rectangles in boxes.items():
        axes.add_collection(
            PatchCollection(rectangles, facecolor=colour, edgecolor="white", linewidth=0.3)
        )
    beside = tiles.t <= MAX_SIDE_BY_SIDE
    axes.set(
        xlim=(0, 2 * tiles.t * slab + grid.x * 0.2 if beside else tiles.t * slab),
        ylim=(grid.y if beside else line + grid.y, -0.3 * grid.y),
        aspect="equal",
        anchor="W",
    )
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=9)


def window_title(name: str, pattern: Pattern, grid: TokenGrid, tile: TileShape) -> str:
    """What `window` shows, in words."""
    t, y, x = tile
    return (
        f"{name}: {describe(pattern)}, keep {fraction(pattern, tile_grid(grid, tile)):.2f}; "
        f"tiles of {t}x{y}x{x} tokens, time from left to right"
    )


def patterns_figure(patterns: Mapping[str, Pattern]) -> Figure:
    """One row for each pattern, on a grid of 5 x 5 x 13 tiles."""
    grid, tile = TokenGrid(15, 30, 52), TileShape(3, 6, 4)
    figure = Figure(figsize=(10, 0.95 * len(patterns)), layout="constrained", facecolor="white")
    rows = figure.subplots(len(patterns), 1)
    for axes, (name, pattern) in zip(rows, patterns.items(), strict=True):
        keep = fraction(pattern, tile_grid(grid, tile))
        window(axes, pattern, grid, tile, title=f"{name}  (keep {keep:.2f})")
    return figure


def describe(pattern: Pattern) -> str:
    """A pattern in a few words."""
    match pattern.kind:
        case "window":
            assert pattern.window is not None
            return "window " + "x".join(map(str, pattern.window))
        case "explicit" if pattern.lists:
            return "explicit lists"
        case "explicit":
            return f"explicit, {len(pattern.offsets)} offsets"
    return pattern.kind


def _seen(
    pattern: Pattern, tiles: TokenGrid, tile: TileShape, query: tuple[int, int, int]
) -> np.ndarray:
    """bool [T, Y, X]: the tiles that one query tile sees."""
    t, y, x = query
    return visible(pattern, tiles, tile, t)[y * tiles.x + x].reshape(tiles)


def _height(grid: TokenGrid, tile: TileShape) -> float:
    """Inches that the maps of a window need on a page of 10."""
    slabs = tile_grid(grid, tile).t
    maps = 2 * slabs if slabs <= MAX_SIDE_BY_SIDE else slabs
    lines = 1 if slabs <= MAX_SIDE_BY_SIDE else 2
    return lines * 1.45 * grid.y / grid.x * 9.5 / maps + 0.35


def _distinct(modes: dict[str, Mode]) -> list[tuple[str, Mode]]:
    """Modes that see something else than those before them, the dense ones left out."""
    found: dict[Pattern, tuple[str, Mode]] = {}
    for name, mode in modes.items():
        pattern = pattern_of(mode)
        if pattern.kind != "dense":
            found.setdefault(pattern, (name, mode))
    return list(found.values())


def _colours(n: int) -> list[tuple[float, float, float]]:
    return [to_rgb(PALETTE[i % len(PALETTE)]) for i in range(n)]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
