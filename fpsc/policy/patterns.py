"""Which key tiles each query tile sees.

A pattern is a few lines over one interface: given the query tiles of one time slab, a boolean
matrix over all video tiles. Most are an order on tile offsets, of which the nearest `keep` of all
video tiles are taken: near the borders, the tiles that would lie outside are replaced by the next
nearest ones inside, so that every query tile sees equally many. All of them see at least
themselves. Text tiles of a joint sequence are dense both ways and do not count in `keep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..grid import Layout, TileShape, TokenGrid, from_numpy
from .schema import Mode

Array = np.ndarray


class Pattern(NamedTuple):
    """What of a mode decides its lists; equal patterns share them."""

    kind: str
    keep: float | None = None
    window: tuple[int, int, int] | None = None
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offsets: tuple[tuple[int, int, int], ...] = ()
    lists: tuple[tuple[int, ...], ...] = ()


class PatternError(ValueError):
    """A pattern that does not fit the grid of a video."""


def pattern_of(mode: Mode) -> Pattern:
    """The pattern of a mode; one that keeps everything is the dense one."""
    kind = mode.pattern or "dense"
    if kind == "dense" or mode.keep == 1:
        return Pattern("dense")
    weights = mode.weights or (1.0, 1.0, 1.0)
    return Pattern(kind, mode.keep, mode.window, weights, mode.offsets or (), mode.lists or ())


def lists(mode: Mode | Pattern, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Key tiles of every query tile of a layout, text included.

    Returns:
        (ptr, idx), int32 on the CPU: query tile u sees idx[ptr[u]:ptr[u + 1]], sorted ascending,
        so that neighbours form runs.

    Raises:
        PatternError: the pattern lists the tiles of another grid.
        ValueError: so many entries that int32 cannot count them.
    """
    pattern = pattern_of(mode) if isinstance(mode, Mode) else mode
    video, n = layout.video_tiles, layout.n_tiles
    before, after = video.start, n - video.stop
    everything = np.arange(n, dtype=np.int32)
    counts = [np.full(before, n)]
    keys = [np.tile(everything, before)]
    for slab in range(layout.tile_grid.t):
        seen = visible(pattern, layout.tile_grid, layout.tile, slab)
        seen = np.pad(seen, ((0, 0), (before, after)), constant_values=True)
        counts.append(seen.sum(axis=1))
        keys.append(np.nonzero(seen)[1].astype(np.int32))
    counts.append(np.full(after, n))
    keys.append(np.tile(everything, after))
    ptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    if ptr[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"the lists of {n} tiles hold {ptr[-1]} entries, more than int32 counts")
    return from_numpy(ptr.astype(np.int32)), from_numpy(np.concatenate(keys))


def visible(pattern: Pattern, tiles: TokenGrid, tile: TileShape, slab: int) -> Array:
    """bool [Y * X, T * Y * X]: key tiles seen by the query tiles (slab, :, :), both in raster."""
    if pattern.kind in ORDERS:
        return _nearest(pattern, tiles, tile, slab)
    return SETS[pattern.kind](pattern, tiles, slab)


# Patterns that are an order: sort keys of the absolute offsets (in tiles), most important first.


def _near(pattern: Pattern, tile: TileShape, dt: Array, dy: Array, dx: Array) -> list[Array]:
    """The Euclidean distance in tokens, every axis times its weight."""
    (wt, wy, wx), (t, y, x) = pattern.weights, tile
    return [(wt * t * dt) ** 2 + (wy * y * dy) ** 2 + (wx * x * dx) ** 2]


def _frame(pattern: Pattern, tile: TileShape, dt: Array, dy: Array, dx: Array) -> list[Array]:
    """The tile's own frames first, then the frames around them."""
    return [dt, _across(tile, dy, dx)]


def _column(pattern: Pattern, tile: TileShape, dt: Array, dy: Array, dx: Array) -> list[Array]:
    """The tile's own place in all frames first, then the places around it."""
    return [_across(tile, dy, dx), dt]


def _radial(pattern: Pattern, tile: TileShape, dt: Array, dy: Array, dx: Array) -> list[Array]:
    """Radial Attention (arXiv 2506.19852): the reach in space halves as the distance in time
    doubles. A key is seen while (r + 1) * 2^floor(log2 max(d, 1)) <= s, with r the distance in
    space and d that in frames; `keep` takes the place of s."""
    frames = np.maximum(tile.t * dt, 1)
    return [(np.sqrt(_across(tile, dy, dx)) + 1) * 2.0 ** np.floor(np.log2(frames))]


def _across(tile: TileShape, dy: Array, dx: Array) -> Array:
    return (tile.y * dy) ** 2 + (tile.x * dx) ** 2


Order = Callable[[Pattern, TileShape, Array, Array, Array], list[Array]]
ORDERS: dict[str, Order] = {"near": _near, "frame": _frame, "column": _column, "radial": _radial}


def fraction(pattern: Pattern, tiles: TokenGrid) -> float:
    """The keep of a pattern on a grid of tiles, without its lists: mean over the query tiles."""
    n = tiles.tokens
    match pattern.kind:
        case "dense":
            return 1.0
        case "window":
            assert pattern.window is not None
            return math.prod(map(min, tiles, pattern.window)) / n
        case "explicit" if pattern.lists:
            return sum(map(len, pattern.lists)) / len(pattern.lists) ** 2
        case "explicit":  # for each offset, the queries that have such a neighbour
            offsets = {(0, 0, 0), *pattern.offsets}
            pairs = ([max(0, s - abs(d)) for s, d in zip(tiles, o, strict=True)] for o in offsets)
            return sum(map(math.prod, pairs)) / n**2
        case _:
            return wanted(pattern, tiles) / n


def wanted(pattern: Pattern, tiles: TokenGrid) -> int:
    """Video key tiles that each query tile of an ordered pattern sees."""
    if pattern.keep is None:  # only `frame` and `column` may leave it out
        return tiles.y * tiles.x if pattern.kind == "frame" else tiles.t
    return max(1, round(pattern.keep * tiles.tokens))


def _nearest(pattern: Pattern, tiles: TokenGrid, tile: TileShape, slab: int) -> Array:
    shape = (2 * tiles.t - 1, 2 * tiles.y - 1, 2 * tiles.x - 1)
    # Offsets of a key from its query; their place in `flat` mirrors at the middle: -d is last - d.
    dt, dy, dx = (np.abs(a - a.max() // 2).ravel() for a in np.indices(shape))
    flat = np.arange(dt.size)
    # Ties: fewer tiles away in t, then y, then x, which keeps runs of x together; then d and -d
    # side by side, the lower index first. So an odd count is symmetric away from the borders.
    ties = (flat, np.maximum(flat, flat[::-1]), dx, dy, dt)
    order = np.lexsort((*ties, *reversed(ORDERS[pattern.kind](pattern, tile, dt, dy, dx))))
    rank = np.empty(shape, np.int32)
    rank.reshape(-1)[order] = flat
    # For query q and key k the rank of k - q: a window of `rank` that slides against q.
    per_query = np.lib.stride_tricks.sliding_window_view(rank, tiles)
    ranks = per_query[tiles.t - 1 - slab, ::-1, ::-1].reshape(-1, tiles.tokens)
    last = wanted(pattern, tiles) - 1
    return ranks <= np.partition(ranks, last, axis=1)[:, last : last + 1]


# Patterns that are a set.


def _dense(pattern: Pattern, tiles: TokenGrid, slab: int) -> Array:
    return np.ones((tiles.y * tiles.x, tiles.tokens), bool)


def _window(pattern: Pattern, tiles: TokenGrid, slab: int) -> Array:
    """A box of tiles around the query, shifted inside at the borders (Sliding Tile Attention,
    arXiv 2502.04507). An even width has its extra tile on the lower side."""
    assert pattern.window is not None

    def axis(n: int, width: int) -> Array:
        width = min(width, n)
        q, k = np.arange(n)[:, None], np.arange(n)
        first = np.clip(q - width // 2, 0, n - width)
        return (k >= first) & (k < first + width)

    t, y, x = map(axis, tiles, pattern.window)
    seen = t[slab][:, None, None] & y[:, None, None, :, None] & x[:, None, None, :]
    return seen.reshape(tiles.y * tiles.x, tiles.tokens)


def _explicit(pattern: Pattern, tiles: TokenGrid, slab: int) -> Array:
    """The tile itself and what is listed: tiles, or offsets from it that lie inside the grid."""
    if pattern.lists:
        return _listed(pattern, tiles, slab)
    seen = np.zeros((tiles.y, tiles.x, *tiles), bool)
    y, x = np.indices((tiles.y, tiles.x))
    for dt, dy, dx in ((0, 0, 0), *pattern.offsets):
        ky, kx = y + dy, x + dx
        inside = (ky >= 0) & (ky < tiles.y) & (kx >= 0) & (kx < tiles.x)
        if 0 <= slab + dt < tiles.t:
            seen[y[inside], x[inside], slab + dt, ky[inside], kx[inside]] = True
    return seen.reshape(tiles.y * tiles.x, tiles.tokens)


def _listed(pattern: Pattern, tiles: TokenGrid, slab: int) -> Array:
    if len(pattern.lists) != tiles.tokens:
        t, y, x = tiles
        raise PatternError(
            f"{len(pattern.lists)} lists, for as many tiles; this video has {t} x {y} x {x} = "
            f"{tiles.tokens}"
        )
    per_slab = tiles.y * tiles.x
    seen = np.zeros((per_slab, tiles.tokens), bool)
    for row, keys in zip(seen, pattern.lists[slab * per_slab :], strict=False):
        row[list(keys)] = True
    return seen


Set = Callable[[Pattern, TokenGrid, int], Array]
SETS: dict[str, Set] = {"dense": _dense, "window": _window, "explicit": _explicit}
