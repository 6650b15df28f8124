"""The token grid and its tiles: one box of tokens is the unit of quantisation and of sparsity.

A video of T latent frames, Y rows and X columns (after patching) is a sequence of T*Y*X tokens in
raster order, x fastest. A kernel works on blocks of 128 rows, so the grid is cut into tiles, boxes
of at most 128 tokens, and every tile fills one block: its real rows first, then padding. In a joint
sequence the text before and after the video forms blocks of its own, up to 128 tokens each.

Everything here is plain data on the CPU; nothing imports torch.compile or Triton.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

BLOCK = 128
"""Rows of a kernel block; a tile never holds more tokens."""

REACH = 16
"""Tokens that a query looks at in every direction when `plan_tile` weighs a tile's shape.
Our choice, not measured: larger values care less about compact tiles."""

MAX_TILE_RATIO = 1.25
"""Most tiles of a planned grid, as a multiple of ceil(tokens / block): sizes device buffers."""


class TokenGrid(NamedTuple):
    """Latent frames, height and width of a video, in tokens; `Layout.tile_grid` counts tiles."""

    t: int
    y: int
    x: int

    @property
    def tokens(self) -> int:
        return self.t * self.y * self.x


class TileShape(NamedTuple):
    """A box of the grid, in tokens along (t, y, x)."""

    t: int
    y: int
    x: int

    @property
    def tokens(self) -> int:
        return self.t * self.y * self.x


@dataclass(frozen=True, eq=False)
class Layout:
    """The tiles of one joint sequence, in kernel order: prefix text, video, suffix text.

    Video tiles follow the raster of `tile_grid` (x fastest); inside a tile the tokens follow the
    raster of the grid. Tiles at the far edges of a grid that the tile does not divide hold fewer
    tokens. Build one with `layout()`, which caches: equal arguments give the same object.

    Attributes:
        grid: the video's token grid.
        tile: shape of a tile, in tokens.
        prefix, suffix: text tokens before and after the video.
        tile_grid: number of video tiles along each axis.
        video_tiles: which tiles are video.
        gather: int32 [n_tiles, BLOCK]; sequence position of every row, -1 in padding rows.
        valid: int32 [n_tiles]; real rows of every tile, at least 1.
        slot: int32 [tokens]; flat row (tile * BLOCK + row) of every sequence position, the inverse
            of `gather`.
    """

    grid: TokenGrid
    tile: TileShape
    prefix: int
    suffix: int
    tile_grid: TokenGrid
    video_tiles: range
    gather: torch.Tensor
    valid: torch.Tensor
    slot: torch.Tensor

    @property
    def n_tiles(self) -> int:
        return self.gather.shape[0]

    @property
    def tokens(self) -> int:
        """Length of the whole sequence, text included."""
        return self.prefix + self.grid.tokens + self.suffix


def padded_work(grid: Sequence[int], tile: Sequence[int], block: int = BLOCK) -> float:
    """Matrix work of dense attention over padded tiles, as a multiple of the work on real tokens.

    Both queries and keys are padded, so this is (tiles * block / tokens) squared.
    """
    g, s = _grid(grid), _tile(tile)
    return (tile_grid(g, s).tokens * block / g.tokens) ** 2


def spread(tile: Sequence[int]) -> float:
    """How far a tile is from compact: what it visits to see `REACH` tokens in every direction from
    each of its own, a box of (t + 2 REACH)(y + 2 REACH)(x + 2 REACH), as a multiple of what a cube
    of as many tokens would visit. 1 is a cube."""
    s = _tile(tile)
    return _reach(s) / (s.tokens ** (1 / 3) + 2 * REACH) ** 3


def _reach(tile: TileShape) -> int:
    return (tile.t + 2 * REACH) * (tile.y + 2 * REACH) * (tile.x + 2 * REACH)


@functools.lru_cache(maxsize=1024)
def _plan_tile(grid: TokenGrid, block: int) -> TileShape:
    # The cost is the work of a query that must see REACH tokens in every direction, so that among
    # tiles that pad alike the compact one wins, and a long thin one only if it saves much.
    shapes = list(_shapes(grid, block))
    limit = max(
        MAX_TILE_RATIO * -(-grid.tokens // block), min(tile_grid(grid, s).tokens for s in shapes)
    )

    def cost(s: TileShape) -> tuple[int, int, TileShape]:
        tiles = tile_grid(grid, s).tokens
        return tiles * tiles * _reach(s), tiles, s

    return min((s for s in shapes if tile_grid(grid, s).tokens <= limit), key=cost)


def plan_tile(grid: Sequence[int], block: int = BLOCK) -> TileShape:
    """The tile for a grid: least padded work, weighed against compactness. Deterministic, cached.

    Args:
        grid: (t, y, x) in tokens.
        block: rows of a kernel block.

    Raises:
        ValueError: a size is not a positive integer.
    """
    return _plan_tile(_grid(grid), block)


def tile_grid(grid: TokenGrid, tile: TileShape) -> TokenGrid:
    """Number of tiles along each axis."""
    return TokenGrid(-(-grid.t // tile.t), -(-grid.y // tile.y), -(-grid.x // tile.x))


def layout(grid: Sequence[int], tile: Sequence[int], prefix: int = 0, suffix: int = 0) -> Layout:
    """The tiles of `prefix` text tokens, a video grid and `suffix` text tokens. Cached.

    Raises:
        ValueError: a size is not a positive integer, the tile holds more than `BLOCK` tokens, or
            the prefix or suffix is negative.
    """
    g, s = _grid(grid), _tile(tile)
    if s.tokens > BLOCK:
        raise ValueError(
            f"tile {tuple(s)} holds {s.tokens} tokens; expected at most {BLOCK}, "
            f"for example {tuple(plan_tile(g))}"
        )
    for name, n in (("prefix", prefix), ("suffix", suffix)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"{name} must be a number of tokens, 0 or more; found {n!r}")
    return _layout(g, s, prefix, suffix)


@functools.lru_cache(maxsize=64)
def _layout(grid: TokenGrid, tile: TileShape, prefix: int, suffix: int) -> Layout:
    tiles = tile_grid(grid, tile)
    head, tail = -(-prefix // BLOCK), -(-suffix // BLOCK)
    n_tiles = head + tiles.tokens + tail

    # For every sequence position: its tile, then its row, which is its rank inside that tile. A
    # stable sort by tile keeps raster order inside a tile and makes the ranks consecutive.
    t, y, x = (np.arange(n, dtype=np.int64) // d for n, d in zip(grid, tile, strict=True))
    video = (t[:, None, None] * tiles.y + y[:, None]) * tiles.x + x
    tile_of = np.concatenate(
        [
            np.arange(prefix) // BLOCK,
            head + video.reshape(-1),
            head + tiles.tokens + np.arange(suffix) // BLOCK,
        ]
    )
    order = np.argsort(tile_of, kind="stable")
    valid = np.bincount(tile_of, minlength=n_tiles)
    first = np.cumsum(valid) - valid
    row = np.arange(tile_of.size) - first[tile_of[order]]

    slot = np.empty(tile_of.size, np.int32)
    slot[order] = tile_of[order] * BLOCK + row
    gather = np.full(n_tiles * BLOCK, -1, np.int32)
    gather[slot] = np.arange(tile_of.size)
    return Layout(
        grid=grid,
        tile=tile,
        prefix=prefix,
        suffix=suffix,
        tile_grid=tiles,
        video_tiles=range(head, head + tiles.tokens),
        gather=from_numpy(gather.reshape(n_tiles, BLOCK)),
        valid=from_numpy(valid.astype(np.int32)),
        slot=from_numpy(slot),
    )


def to_tiles(x: torch.Tensor, layout: Layout, fill: float = 0.0) -> torch.Tensor:
    """Raster to tile order: x [..., N, D] -> [..., n_tiles, BLOCK, D], `fill` in padding rows."""
    _check_length(x.shape[-2], layout.tokens)
    index = layout.gather.to(x.device, torch.long)
    tiles = x[..., index.clamp_min(0), :]
    return torch.where((index >= 0).unsqueeze(-1), tiles, fill)


def from_tiles(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Tile to raster order: x [..., n_tiles, BLOCK, D] -> [..., N, D]; padding rows are dropped."""
    _check_length(x.shape[-3], layout.n_tiles, "tiles")
    return x.flatten(-3, -2)[..., layout.slot.to(x.device, torch.long), :]


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """A real CPU tensor that may be cached, even when built under inference or fake-tensor mode."""
    with torch.inference_mode(False), _disable_current_modes():
        return torch.from_numpy(array)


def _shapes(grid: TokenGrid, block: int) -> Iterator[TileShape]:
    for t in range(1, min(grid.t, block) + 1):
        for y in range(1, min(grid.y, block // t) + 1):
            for x in range(1, min(grid.x, block // (t * y)) + 1):
                yield TileShape(t, y, x)


def _grid(sizes: Sequence[int]) -> TokenGrid:
    return TokenGrid(*_sizes(sizes, "grid"))


def _tile(sizes: Sequence[int]) -> TileShape:
    return TileShape(*_sizes(sizes, "tile"))


def _sizes(sizes: Sequence[int], name: str) -> tuple[int, int, int]:
    good = len(sizes) == 3 and not any(isinstance(n, bool | float) or n < 1 for n in sizes)
    if not good:
        raise ValueError(
            f"{name} must be three positive integers (t, y, x); found {tuple(sizes)!r}"
        )
    t, y, x = map(operator.index, sizes)
    return t, y, x


def _check_length(found: int, expected: int, what: str = "tokens") -> None:
    if found != expected:
        raise ValueError(f"the layout has {expected} {what}, the tensor has {found}")
