"""A policy against a model and a grid: the table and the plan that the kernels read.

The table says which mode each (layer, noise row, head) has; the plan says what each pattern means
on a grid. Their shapes depend on capacities, never on a policy's numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from ..grid import BLOCK, Layout, TileShape, TokenGrid, from_numpy, tile_grid
from .load import Policy
from .patterns import Pattern, PatternError, fraction, lists, pattern_of
from .schema import MODES, ROWS
from .tables import NO_CHOICE
from .values import NoiseRange, QKScales, Span

__all__ = [
    "GROUPINGS",
    "MODES",
    "PATTERNS",
    "ROWS",
    "TOLERANCE",
    "Cell",
    "Plan",
    "Table",
    "kinds_of",
    "plan",
    "resolve",
    "structure_key",
]

PATTERNS = MODES
"""Rows of a plan's list pointers: at most one pattern a mode."""

GROUPINGS = MODES + 1
"""Rows of a plan's groups: that of single tiles, and at most one other a mode."""

TOLERANCE = 1e-6
"""How far above an edge a level still counts as on it: float32 and timesteps / 1000 are inexact."""

NOMINAL_GRID = (21, 45, 80)
"""Where nothing names a grid, rows are compared by their keep on this one (Wan2.1 at 720p)."""

DTYPES = {"bf16": 0, "fp8": 1}

Grouping = tuple[int, int, int] | Literal["head"]
"""Which tiles share a scale: boxes of tiles (t, y, x), or all of the video."""

GRANULARITIES: dict[str, Grouping] = {
    "tile": (1, 1, 1),
    "fine": (1, 1, 1),
    "intermediate": (2, 2, 2),
    "coarse": (4, 4, 4),
    "head": "head",
}
"""The groupings that have names. FPSAttention (arXiv 2506.04648) quantises in coarse, fine and
intermediate granularity in the course of sampling and publishes no sizes: these are our choice."""


class Cell(NamedTuple):
    """What one head of one layer does in one row, and the line of the policy that says so."""

    mode: str
    noise: NoiseRange
    rule: str
    """Place of the winning phase or rule: "wan.yaml:12 except[0]"."""


@dataclass(frozen=True, eq=False)
class Table:
    """A policy for a model of `layers` layers and `heads` heads; tensors live on the CPU.

    Attributes:
        edges: float32 [ROWS], descending noise levels between rows, then -1. The row of a level
            is the number of edges that it does not exceed (`fpsc.kernels.rows`); row 0 is the
            noisiest.
        cells: int32 [layers, ROWS, heads], an index into `modes`. Padding rows repeat the last.
        modes: int32 [MODES, 3], columns pattern (the plan's numbering), dtype (0: computed in the
            input's dtype, 1: FP8) and grouping (the plan's numbering). Padding is zero.
        n_rows: rows that are real.
        noise_ranges: noise of every real row.
        densest: the real row with the highest mean keep; of equal ones that with least FP8, then
            the noisiest. Means are taken on the policy's own grid, or a nominal one.
        mode_names: name of every real mode.
        winners: int16 [layers, n_rows, heads]: the phase that won, or after them the rule, or after
            those the choice of the policy's own table.
    """

    policy: Policy
    edges: torch.Tensor
    cells: torch.Tensor
    modes: torch.Tensor
    n_rows: int
    noise_ranges: list[NoiseRange]
    densest: int
    mode_names: list[str]
    winners: np.ndarray = field(repr=False)

    def row_of(self, noise: float) -> int:
        """The row of a noise level.

        Raises:
            ValueError: the level is not between 0 (clean) and 1 (pure noise).
        """
        if not -1e-3 <= noise <= 1 + 1e-3:
            raise ValueError(f"noise lies between 0 (clean) and 1 (pure noise); found {noise}")
        return int(np.sum(np.float32(max(noise, 0.0)) <= self.edges.numpy() + TOLERANCE))

    def structure_key(self) -> str:
        """A hash of what compiled code depends on: tile, block, kinds of dtype; never a number."""
        kinds = sorted({int(d) for d in self.modes[: len(self.mode_names), 1]})
        return structure_key(self.policy.tile, kinds)

    def describe(self, row: int, layer: int, head: int) -> Cell:
        """The mode of a cell and the phase or rule that won it.

        Raises:
            IndexError: there is no such row, layer or head.
        """
        index = {"row": row, "layer": layer, "head": head}
        sizes = (self.n_rows, self.cells.shape[0], self.cells.shape[2])
        for (name, found), n in zip(index.items(), sizes, strict=True):
            if not 0 <= found < n:
                raise IndexError(f"no {name} {found}: the table has {n} (0..{n - 1})")
        winner = int(self.winners[layer, row, head])
        phases, rules = len(self.policy.schedule), len(self.policy.rules)
        place: tuple[str | int, ...] = ("table",)
        if winner < phases:
            place = ("schedule", winner)
        elif winner < phases + rules:
            place = ("except", winner - phases)
        name = self.mode_names[int(self.cells[layer, row, head])]
        return Cell(name, self.noise_ranges[row], self.policy.where(place))

    def lines(self, row: int, layer: int, head: int) -> list[Cell]:
        """Whatever covers a cell: its phase, its choice in the policy's own table, its rules. The
        last one wins; it is what `describe` gives.

        Raises:
            IndexError: there is no such row, layer or head.
        """
        self.describe(row, layer, head)  # checks the indices
        noise, policy = self.noise_ranges[row], self.policy

        def covers(range_: NoiseRange | None) -> bool:
            return bool(_rows([noise], range_))

        found: list[tuple[str, tuple[str | int, ...]]] = [
            (phase.use, ("schedule", i))
            for i, phase in enumerate(policy.schedule)
            if covers(phase.noise)
        ]
        if policy.table is not None:
            choices = policy.table
            for range_, cells in zip(choices.noise, choices.cells[:, layer, head], strict=True):
                if covers(range_) and cells != NO_CHOICE:
                    found.append((choices.modes[cells], ("table",)))
        found += [
            (rule.use, ("except", i))
            for i, rule in enumerate(policy.rules)
            if covers(rule.noise) and _covers(rule.layers, layer) and _covers(rule.heads, head)
        ]
        return [Cell(use, noise, policy.where(place)) for use, place in found]

    def keep(self, plan: Plan) -> list[float]:
        """Mean keep of every real row on a plan's grid, over layers and heads."""
        return _row_means(self.cells[:, : self.n_rows].numpy(), plan.keep.numpy())


@dataclass(frozen=True, eq=False)
class Plan:
    """A policy's patterns on the tiles of one sequence; tensors live on the CPU.

    Attributes:
        layout: the tiles.
        gather, valid: those of the layout.
        list_ptr: int32 [PATTERNS, n_tiles + 1], offsets into `list_idx`: in pattern p query tile u
            sees list_idx[list_ptr[p, u]:list_ptr[p, u + 1]]. Padding repeats the last pattern.
        list_idx: int32 [nnz], key tiles, ascending in each list.
        back_ptr, back_idx: their transpose, of the same shapes: the query tiles that see key tile
            w are back_idx[back_ptr[p, w]:back_ptr[p, w + 1]], ascending.
        order: int32 [PATTERNS, n_tiles], the tiles of a pattern in the order in which a GPU takes
            them up, see `work_order`.
        groups: int32 [GROUPINGS, n_tiles], for each tile the first tile of the group that it shares
            its scales with. Row 0: every tile its own; padding repeats the last grouping.
        keep: float32 [MODES], the fraction of the video key tiles that a video query tile sees,
            on average. Padding is zero.
    """

    layout: Layout
    gather: torch.Tensor
    valid: torch.Tensor
    list_ptr: torch.Tensor
    list_idx: torch.Tensor
    back_ptr: torch.Tensor
    back_idx: torch.Tensor
    order: torch.Tensor
    groups: torch.Tensor
    keep: torch.Tensor


def structure_key(tile: TileShape | Literal["auto"], dtypes: Sequence[int]) -> str:
    """The hash behind `Table.structure_key`."""
    shape = tile if isinstance(tile, str) else tuple(tile)
    text = f"fpsc 1; block {BLOCK}; tile {shape}; dtypes {sorted(dtypes)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kinds_of(policy: Policy, fp8: bool) -> int:
    """The dtypes that cells may have, as the op takes them: 1 the input's, 2 FP8, 3 both.

    fp8: as for `resolve`.
    """
    dtypes = {DTYPES[mode.dtype] if fp8 else 0 for mode in policy.modes.values()}
    return sum(1 << dtype for dtype in dtypes)


def resolve(policy: Policy, *, layers: int, heads: int, fp8: bool) -> Table:
    """The table of a policy for a model.

    Args:
        layers, heads: of the model, counted over all ranks.
        fp8: whether FP8 cells may run as such; if not they run in the input's dtype.

    Raises:
        PolicyError: a rule names a layer or head that the model does not have.
    """
    names = list(policy.modes)
    patterns = _patterns(policy)
    groupings = _groupings(policy)
    modes = np.zeros((MODES, 3), np.int32)
    for i, mode in enumerate(policy.modes.values()):
        pattern = patterns.index(pattern_of(mode))
        grouping = groupings.index(_grouping(mode.scales.qk))
        modes[i] = pattern, DTYPES[mode.dtype] if fp8 else 0, grouping

    levels = policy.edges
    bounds = [1.0, *levels, 0.0]
    ranges = [NoiseRange(hi, lo) for hi, lo in pairwise(bounds)]
    padded_edges = np.full(ROWS, -1, np.float32)
    padded_edges[: len(levels)] = levels

    winners = np.zeros((layers, len(ranges), heads), np.int16)
    for i, phase in enumerate(policy.schedule):
        winners[:, _rows(ranges, phase.noise), :] = i
    _choose(policy, winners, ranges)
    for i, rule in enumerate(policy.rules):
        at = _members(policy, i, rule.layers, "layers", layers)
        who = _members(policy, i, rule.heads, "heads", heads)
        winners[np.ix_(at, _rows(ranges, rule.noise), who)] = len(policy.schedule) + i
    used = [p.use for p in policy.schedule] + [r.use for r in policy.rules]
    used += policy.table.modes if policy.table else ()
    cells = np.array([names.index(name) for name in used], np.int32)[winners]
    padding = np.repeat(cells[:, -1:], ROWS - len(ranges), axis=1)
    return Table(
        policy=policy,
        edges=from_numpy(padded_edges),
        cells=from_numpy(np.concatenate([cells, padding], axis=1)),
        modes=from_numpy(modes),
        n_rows=len(ranges),
        noise_ranges=ranges,
        densest=_densest(policy, cells, modes[:, 1]),
        mode_names=names,
        winners=winners,
    )


def plan(policy: Policy, layout: Layout) -> Plan:
    """The lists of a policy's patterns on the tiles of a sequence.

    A mode's pattern and grouping have the numbers that `Table.modes` gives them.
    `limits.min_tokens` is the caller's to apply: a plan of a short sequence is an ordinary plan.

    Raises:
        PolicyError: a mode lists the tiles of another grid.
        ValueError: the sequence is so long that the lists overflow int32 offsets.
    """
    patterns = _patterns(policy)
    pairs = [_lists(policy, pattern, layout) for pattern in patterns]
    lengths = [len(idx) for _, idx in pairs]
    if sum(lengths) > np.iinfo(np.int32).max:
        raise ValueError(f"the lists hold {sum(lengths)} entries, more than int32 offsets count")
    keep = np.zeros(MODES, np.float32)
    for i, mode in enumerate(policy.modes.values()):
        keep[i] = _keep(pairs[patterns.index(pattern_of(mode))][0], layout)
    starts = np.cumsum([0, *lengths], dtype=np.int32)[:-1, None]
    csr = [(ptr.numpy(), idx.numpy()) for ptr, idx in pairs]
    back = [transposed(ptr, idx) for ptr, idx in csr]
    ptr = np.stack([ptr for ptr, _ in csr])
    orders = np.stack([work_order(ptr, idx, layout) for ptr, idx in csr])
    groups = np.stack([groups_of(grouping, layout) for grouping in _groupings(policy)])
    return Plan(
        layout=layout,
        gather=layout.gather,
        valid=layout.valid,
        list_ptr=from_numpy(_padded(ptr + starts, PATTERNS)),
        list_idx=from_numpy(np.concatenate([idx for _, idx in csr])),
        back_ptr=from_numpy(_padded(np.stack([ptr for ptr, _ in back]) + starts, PATTERNS)),
        back_idx=from_numpy(np.concatenate([idx for _, idx in back])),
        order=from_numpy(_padded(orders, PATTERNS)),
        groups=from_numpy(_padded(groups, GROUPINGS)),
        keep=from_numpy(keep),
    )


def work_order(ptr: np.ndarray, idx: np.ndarray, layout: Layout) -> np.ndarray:
    """int32 [n_tiles]: the tiles of one pattern in the order in which a GPU takes them up.

    Long lists first, by the bit length of their lengths. Within such a class a sweep through the
    video: slowest along the axis of which a tile sees the smallest part, then the next. What those
    tiles that are taken up together see is then a thin slab of the video, and moves on with them:
    most of it is in the cache (bench/l2.py).
    """
    _, bits = np.frexp(np.diff(ptr))
    return np.lexsort((_sweep(ptr, idx, layout), -bits)).astype(np.int32)


def _sweep(ptr: np.ndarray, idx: np.ndarray, layout: Layout) -> np.ndarray:
    """[n_tiles]: when a sweep comes to each tile of video; to text at the end."""
    grid, video = np.array(layout.tile_grid), layout.video_tiles
    middle = video.start + int(np.ravel_multi_index(tuple(grid // 2), tuple(grid)))
    keys = idx[ptr[middle] : ptr[middle + 1]] - video.start
    seen = np.unravel_index(keys[(keys >= 0) & (keys < len(video))], tuple(grid))
    parts = [(axis.max() - axis.min() + 1) / n for axis, n in zip(seen, grid, strict=True)]
    axes = np.argsort(parts, kind="stable")
    places = np.indices(tuple(grid)).reshape(3, -1)[axes]
    found = np.full(layout.n_tiles, layout.n_tiles)
    found[video.start : video.stop] = np.ravel_multi_index(tuple(places), tuple(grid[axes]))
    return found


def transposed(ptr: np.ndarray, idx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lists of one pattern the other way round: for each key tile its query tiles, sorted."""
    n = len(ptr) - 1
    seen = np.zeros((n, n), bool)
    seen.reshape(-1)[np.repeat(np.arange(0, n * n, n), np.diff(ptr)) + idx] = True
    back_ptr = np.concatenate([[0], np.cumsum(seen.sum(axis=0))])
    back_idx = np.flatnonzero(seen.T) % n
    return back_ptr.astype(np.int32), back_idx.astype(np.int32)


def groups_of(qk: QKScales, layout: Layout) -> np.ndarray:
    """int32 [n_tiles]: the first tile of every tile's group. Text tiles are groups of their own."""
    grouping, tiles, video = _grouping(qk), layout.tile_grid, layout.video_tiles
    box = tiles if grouping == "head" else grouping
    t, y, x = (n - n % size for n, size in zip(np.indices(tiles), box, strict=True))
    groups = np.arange(layout.n_tiles, dtype=np.int32)
    groups[video.start : video.stop] = video.start + ((t * tiles.y + y) * tiles.x + x).ravel()
    return groups


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """array with its last row repeated."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])


def _grouping(qk: QKScales) -> Grouping:
    return GRANULARITIES[qk] if isinstance(qk, str) else qk


def _groupings(policy: Policy) -> list[Grouping]:
    """The distinct groupings of a policy's modes in order, that of single tiles first."""
    used = (_grouping(mode.scales.qk) for mode in policy.modes.values())
    return list(dict.fromkeys([GRANULARITIES["tile"], *used]))


def _patterns(policy: Policy) -> list[Pattern]:
    """The distinct patterns of a policy's modes, in order."""
    return list(dict.fromkeys(map(pattern_of, policy.modes.values())))


def _lists(policy: Policy, pattern: Pattern, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return lists(pattern, layout)
    except PatternError as e:
        name = next(n for n, mode in policy.modes.items() if pattern_of(mode) == pattern)
        raise policy.error(("modes", name, "lists"), str(e)) from None


def _keep(ptr: torch.Tensor, layout: Layout) -> float:
    """Mean fraction of the video key tiles in the lists of the video query tiles."""
    video = layout.video_tiles
    entries = int(ptr[video.stop]) - int(ptr[video.start])
    text = layout.n_tiles - len(video)
    return (entries / len(video) - text) / len(video)


def _densest(policy: Policy, cells: np.ndarray, dtypes: np.ndarray) -> int:
    """See `Table.densest`; cells [layers, rows, heads], dtypes [MODES]."""
    grid = policy.tuned_on.grid or TokenGrid(*NOMINAL_GRID)
    tiles = tile_grid(grid, policy.tile_for(grid))
    keep = np.array([fraction(pattern_of(mode), tiles) for mode in policy.modes.values()])
    order = list(zip(_row_means(cells, keep), _row_means(cells, -dtypes), strict=True))
    return order.index(max(order))


def _row_means(cells: np.ndarray, values: np.ndarray) -> list[float]:
    """Mean over layers and heads of a value per mode: cells [layers, rows, heads] -> [rows]."""
    # Rounded, because equal mixtures must compare equal whatever the order of summation, and
    # because float32 knows no more of a keep.
    return [round(float(m), 6) for m in values.astype(np.float64)[cells].mean(axis=(0, 2))]


def _rows(ranges: Sequence[NoiseRange], noise: NoiseRange | None) -> list[int]:
    """The rows inside a range of noise; None is all of it. Rows never straddle a range's ends."""
    if noise is None:
        return list(range(len(ranges)))
    return [i for i, row in enumerate(ranges) if noise.hi >= row.hi and row.lo >= noise.lo]


def _covers(spans: Sequence[Span] | None, number: int) -> bool:
    return spans is None or any(span.first <= number <= span.last for span in spans)


def _choose(policy: Policy, winners: np.ndarray, ranges: Sequence[NoiseRange]) -> None:
    """Enter the choices of the policy's own table; winners [layers, rows, heads]."""
    choices = policy.table
    if choices is None:
        return
    layers, _, heads = winners.shape
    if (choices.layers, choices.heads) != (layers, heads):
        message = (
            f"{policy.spec.table} is for {choices.layers} layers of {choices.heads} heads, and the "
            f"model has {layers} of {heads}"
        )
        raise policy.error(("table",), message)
    first = len(policy.schedule) + len(policy.rules)
    for noise, cells in zip(choices.noise, choices.cells, strict=True):
        for row in _rows(ranges, noise):
            chosen = cells != NO_CHOICE
            winners[:, row][chosen] = first + cells[chosen]


def _members(
    policy: Policy,
    rule: int,
    spans: Sequence[Span] | None,
    kind: Literal["layers", "heads"],
    n: int,
) -> list[int]:
    """The layers or heads that the spans of rule number `rule` name, of `n`; None is all."""
    if spans is None:
        return list(range(n))
    for span in spans:
        if span.last >= n:
            message = (
                f"{kind.removesuffix('s')} {span.last} does not exist; the model has {n} {kind} "
                f"(0..{n - 1})"
            )
            raise policy.error(("except", rule, kind), message)
    return sorted({i for span in spans for i in range(span.first, span.last + 1)})
