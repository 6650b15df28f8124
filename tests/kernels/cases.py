"""Inputs for the kernel tests: odd grids, text, masks, grouped heads, a mode for every head."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpsc.grid import TokenGrid, layout
from fpsc.policy.patterns import Pattern, lists
from fpsc.policy.resolve import groups_of, transposed, work_order
from fpsc.policy.values import QKScales

PATTERNS = (
    Pattern("dense"),
    Pattern("near", keep=0.4),
    Pattern("window", window=(1, 3, 2)),
)
GROUPINGS: tuple[QKScales, ...] = ("tile", (2, 1, 2), "head")
INPUT_DTYPE, FP8 = 0, 1
DENSE, NEAR, WINDOW, DENSE_FP8, NEAR_FP8, WINDOW_FP8, NEAR_FP8_BOX, WINDOW_FP8_HEAD = range(8)
MODES = torch.tensor(
    [
        *([p, dtype, 0] for dtype in (INPUT_DTYPE, FP8) for p in range(len(PATTERNS))),
        [1, FP8, 1],  # scales shared by boxes of tiles
        [2, FP8, 2],  # by all tiles of the video
    ],
    dtype=torch.int32,
)


class Tables(NamedTuple):
    """What `fpsc::attention` takes beside q, k and v, in its order."""

    rows: Tensor
    cells: Tensor
    modes: Tensor
    list_ptr: Tensor
    list_idx: Tensor
    back_ptr: Tensor
    back_idx: Tensor
    order: Tensor
    groups: Tensor
    gather: Tensor
    valid: Tensor

    @property
    def forward(self) -> tuple[Tensor, ...]:
        """What an implementation's `forward` takes between v and the key mask."""
        lists = self.list_ptr, self.list_idx, self.order, self.groups, self.gather, self.valid
        return (resolved(self), *lists)

    @property
    def backward(self) -> tuple[Tensor, ...]:
        """What an implementation's `backward` takes between saved and the key mask."""
        return (resolved(self), *self[3:])

    @property
    def tokens(self) -> int:
        return int(self.valid.sum())


def tables(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    heads: list[list[int]],
    *,
    prefix: int = 0,
    suffix: int = 0,
) -> Tables:
    """heads: modes of all heads, one list for each batch element."""
    tiles = layout(TokenGrid(*grid), tile, prefix, suffix)
    ptr, idx, back_ptr, back_idx, order, offset = [], [], [], [], [], 0
    for pattern in PATTERNS:
        one_ptr, one_idx = (x.numpy() for x in lists(pattern, tiles))
        back = transposed(one_ptr, one_idx)
        ptr.append(one_ptr + offset)
        idx.append(one_idx)
        order.append(work_order(one_ptr, one_idx, tiles))
        back_ptr.append(back[0] + offset)
        back_idx.append(back[1])
        offset += len(one_idx)
    groups = np.stack([groups_of(grouping, tiles) for grouping in GROUPINGS])
    return Tables(
        rows=torch.arange(len(heads), dtype=torch.int32),
        cells=torch.tensor([heads], dtype=torch.int32),
        modes=MODES.clone(),
        list_ptr=torch.from_numpy(np.stack(ptr)).int(),
        list_idx=torch.from_numpy(np.concatenate(idx)),
        back_ptr=torch.from_numpy(np.stack(back_ptr)).int(),
        back_idx=torch.from_numpy(np.concatenate(back_idx)),
        order=torch.from_numpy(np.stack(order)),
        groups=torch.from_numpy(groups),
        gather=tiles.gather.clone(),
        valid=tiles.valid.clone(),
    )


def qkv(
    tables: Tables,
    *,
    dim: int = 32,
    key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Random q, k, v, slices of a buffer whose other values are NaN, keys with a mean.

    In memory they are [B, N, heads, D], as models have them.
    """
    _, B, H = tables.cells.shape
    made = []
    for heads, mean in ((H, 0.0), (key_heads or H, 2.0), (key_heads or H, 0.5)):
        buffer = torch.full((B, tables.tokens + 3, heads, dim + 5), float("nan"), dtype=dtype)
        some = buffer[:, 1:-2, :, 2:-3]
        some.copy_(torch.randn(some.shape) + mean * torch.randn(dim))
        made.append(some.transpose(1, 2))
    return made


def resolved(tables: Tables) -> Tensor:
    """(pattern, dtype, grouping) of each batch element and head, [B, H, 3]."""
    B = len(tables.rows)
    return torch.stack([tables.modes[tables.cells[0, tables.rows[b]].long()] for b in range(B)])


def visible(tables: Tables, key_mask: Tensor | None = None) -> Tensor:
    """bool [B, H, N, N]: which keys each query sees, made from the lists entry by entry."""
    _, B, H = tables.cells.shape
    N = tables.tokens
    seen = torch.zeros(B, H, N, N, dtype=torch.bool)
    tiles = [rows[:n].long() for rows, n in zip(tables.gather, tables.valid.tolist(), strict=True)]
    for b in range(B):
        for h in range(H):
            pattern = int(resolved(tables)[b, h, 0])
            for u in range(len(tiles)):
                first, last = tables.list_ptr[pattern, u : u + 2].tolist()
                for w in tables.list_idx[first:last].tolist():
                    seen[b, h, tiles[u][:, None], tiles[w]] = True
    if key_mask is not None:
        seen &= key_mask[:, None, None, :]
    return seen
