"""What a policy saves: keep and work of every phase, layer and head, and attention's share in it.

Counted, not measured: from the lists that the kernels walk, a product of [m, k] and [k, n] taken as
2 m k n operations. What a device makes of an operation less, or of one in FP8, is another question,
which `predicted` answers by a model of the device (`fpsc.cost`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cost import DeviceCost, Dtype, Heads, load_of
from ..grid import BLOCK, Layout, layout
from .load import Policy
from .models import ModelSize
from .resolve import MODES, Plan, Table, plan, resolve

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Account:
    """A policy on one forward of a model; rows are stretches of noise, from noisy to clean.

    Attributes:
        policy, size: what was counted.
        table, plan: what the counting is from.
        applies: False where the video is shorter than `limits.min_tokens` and stays dense.
        keep: [layers, rows, heads], the fraction of the video's key tiles visited.
        flops: [layers, rows, heads], of both products of attention over real tokens.
        padded_flops: the same over whole blocks, which is what a kernel multiplies.
        fp8: bool [layers, rows, heads], whether the products are of FP8 numbers.
        dense_flops: of one head where every token sees every token.
        other_flops: of one layer besides, 0 where that is not known.
        rows_of_steps: the row of each step of the run that was given.
    """

    policy: Policy
    size: ModelSize
    table: Table
    plan: Plan
    applies: bool
    keep: Array
    flops: Array
    padded_flops: Array
    fp8: Array
    dense_flops: int
    other_flops: int
    rows_of_steps: list[int]

    @property
    def rows(self) -> int:
        return self.table.n_rows

    def modes_of(self, row: int) -> dict[str, float]:
        """The modes of a row by name, most frequent first, with their fraction of its cells."""
        if not self.applies:
            return {"dense (short video)": 1.0}
        cells = self.table.cells[:, row].numpy()
        counts = np.bincount(cells.ravel(), minlength=len(self.table.mode_names))
        order = np.argsort(-counts, kind="stable")
        return {self.table.mode_names[i]: float(counts[i]) / cells.size for i in order if counts[i]}

    def row_keep(self) -> Array:
        """[rows]: mean keep over layers and heads."""
        return self.keep.mean(axis=(0, 2))

    def row_flops(self) -> Array:
        """[rows]: work of all attention of one forward, over real tokens."""
        return self.flops.sum(axis=(0, 2))

    @property
    def dense_forward(self) -> int:
        """Work of all attention of one dense forward."""
        return self.dense_flops * self.size.layers * self.size.heads

    def share(self) -> Array | None:
        """[rows]: attention's part of all the work of a forward; None where the rest is unknown."""
        if not self.other_flops:
            return None
        attention = self.row_flops()
        return attention / (attention + self.other_flops * self.size.layers)

    @property
    def dense_share(self) -> float | None:
        """The same of a dense forward."""
        if not self.other_flops:
            return None
        return self.dense_forward / (self.dense_forward + self.other_flops * self.size.layers)

    def run_keep(self) -> float | None:
        """Mean keep over the steps; None without steps."""
        return float(self.row_keep()[self.rows_of_steps].mean()) if self.rows_of_steps else None

    def run_share(self) -> tuple[float, float] | None:
        """The work of the whole run as a fraction of the dense one: (attention, everything).

        None without steps, or where the rest is unknown.
        """
        if not self.rows_of_steps or not self.other_flops:
            return None
        attention = float(self.row_flops()[self.rows_of_steps].mean())
        rest = self.other_flops * self.size.layers
        return (
            attention / self.dense_forward,
            (attention + rest) / (self.dense_forward + rest),
        )

    def dense_steps(self) -> int:
        """Steps in which every cell visits every tile."""
        dense = (self.keep == 1).all(axis=(0, 2))
        return int(dense[self.rows_of_steps].sum()) if self.rows_of_steps else 0


def account(policy: Policy, size: ModelSize, levels: Sequence[float] = ()) -> Account:
    """Counts a policy on a model.

    Args:
        policy: what is counted.
        size: layers, heads, head_dim and grid of the model, and what else it computes.
        levels: the noise of each step of a run.

    Raises:
        PolicyError: a rule names a layer or head that the model does not have, or a mode lists the
            tiles of another grid.
        ValueError: a level is not between 0 and 1, or the video is too long.
    """
    text = size.text if size.joint else 0
    tiles = layout(size.grid, policy.tile_for(size.grid), suffix=text)
    table = resolve(policy, layers=size.layers, heads=size.heads, fp8=True)
    found = plan(policy, tiles)
    applies = size.grid.tokens >= policy.limits.min_tokens
    cells = table.cells[:, : table.n_rows].numpy()
    dense = 4 * size.head_dim * tiles.tokens**2
    patterns = table.modes[:, 0].numpy()
    keep, pairs, blocks = (values[patterns] for values in visits(found, tiles))
    if not applies:
        keep, pairs = np.ones(MODES), np.full(MODES, tiles.tokens**2)
        blocks = pairs
    return Account(
        policy=policy,
        size=size,
        table=table,
        plan=found,
        applies=applies,
        keep=keep[cells],
        flops=4 * size.head_dim * pairs[cells],
        padded_flops=4 * size.head_dim * blocks[cells],
        fp8=(table.modes[:, 1].numpy()[cells] == 1) & applies,
        dense_flops=dense,
        other_flops=size.other_flops,
        rows_of_steps=[table.row_of(level) for level in levels],
    )


@dataclass(frozen=True, eq=False)
class Predicted:
    """Seconds of the attention of one forward of one clip, its prologue included.

    Attributes:
        rows: [rows], of the policy. dense: of every head dense, in the input's dtype.
        modes: of a layer with one mode in all heads, as a part of a dense one, by name.
    """

    device: DeviceCost
    rows: Array
    dense: float
    modes: dict[str, float]

    @property
    def slower(self) -> list[str]:
        """Modes that visit fewer tiles or use FP8, and take longer than the dense one all the
        same."""
        return [name for name, part in self.modes.items() if part > 1]


def predicted(account: Account, device: DeviceCost) -> Predicted:
    """What a policy takes on a device.

    Raises:
        ValueError: the device's model is of another head dim, or knows no FP8 cells.
    """
    table, size = account.table, account.size
    ptr, tokens = account.plan.list_ptr.numpy(), account.plan.layout.tokens
    patterns, dtypes = table.modes[:, 0].numpy(), table.modes[:, 1].numpy()
    names: tuple[Dtype, ...] = ("bf16", "fp8")

    def layer(heads: Sequence[Heads]) -> float:
        return device.seconds(load_of(heads, tokens, size.head_dim))

    def of_mode(mode: int, count: int) -> Heads:
        return Heads(names[dtypes[mode]], np.diff(ptr[patterns[mode]]), count)

    tiles = account.plan.layout.n_tiles
    dense = layer([Heads("bf16", np.full(tiles, tiles), size.heads)])
    seconds = np.zeros(account.rows)
    known: dict[bytes, float] = {}  # layers that have the same modes equally often
    for row in range(account.rows):
        for cells in table.cells[:, row].numpy():
            counts = np.bincount(cells, minlength=len(table.mode_names))
            key = counts.tobytes()
            if key not in known:
                heads = [of_mode(int(m), int(counts[m])) for m in np.flatnonzero(counts)]
                known[key] = layer(heads) if account.applies else dense
            seconds[row] += known[key]
    modes = {
        name: layer([of_mode(mode, size.heads)]) / dense
        for mode, name in enumerate(table.mode_names)
    }
    return Predicted(device, seconds, dense * size.layers, modes)


def visits(found: Plan, tiles: Layout) -> tuple[Array, Array, Array]:
    """[PATTERNS] each, of what a pattern visits: keep, pairs of real tokens, of rows of blocks."""
    ptr = found.list_ptr.numpy().astype(np.int64)
    valid = tiles.valid.numpy().astype(np.int64)
    # Real keys before every entry of the lists: what a query tile sees is a difference of two.
    keys = np.concatenate([[0], np.cumsum(valid[found.list_idx.numpy()])])
    seen = keys[ptr[:, 1:]] - keys[ptr[:, :-1]]
    video = tiles.video_tiles
    entries = ptr[:, video.stop] - ptr[:, video.start]
    text = tiles.n_tiles - len(video)
    keep = (entries - text * len(video)) / len(video) ** 2
    return keep, (seen * valid).sum(axis=1), (ptr[:, -1] - ptr[:, 0]) * BLOCK**2
