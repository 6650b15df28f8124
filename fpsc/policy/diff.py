"""What differs between two policies: in their lines, and in the cells of a model's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import BaseModel

from ..grid import TileShape, TokenGrid, layout
from .load import Policy
from .resolve import Table, plan, resolve
from .values import NoiseRange, Span

IGNORED = ("fpsc", "$import", "name", "measured", "sampling", "steps", "percent")
"""Keys that do not change what runs; steps and percent are compared as the noise they stand for."""


@dataclass(frozen=True)
class Change:
    """One value that differs; None where one policy does not have it."""

    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class CellChange:
    """Cells of a table that change from one mode to another, in a stretch of noise.

    `layers` and `heads` are spelled as in a rule; not every pair of them need be among the cells.
    """

    noise: NoiseRange
    before: str
    after: str
    cells: int
    layers: str
    heads: str


@dataclass(frozen=True)
class KeepChange:
    """Mean keep of both policies in a stretch of noise, on a grid."""

    noise: NoiseRange
    before: float
    after: float


def changes(a: Policy, b: Policy) -> list[Change]:
    """Values that differ, in the order of the format."""
    ours, theirs = (dict(_leaves(p.spec, "")) for p in (a, b))
    found = [
        Change(key, ours.get(key), theirs.get(key))
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]
    if a.table and b.table and not a.table.same_as(b.table):
        found.append(Change("table", str(a.table.file), f"{b.table.file}, with other choices"))
    return found


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        value = {f.alias or name: getattr(value, name) for name, f in fields.items()}
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in IGNORED:
                yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{key}[{i}]")
    elif value is not None and value != []:
        yield key, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], Span):
        return ", ".join(_span(s.first, s.last) for s in value)
    return str(list(value)) if isinstance(value, TokenGrid | TileShape) else str(value)


def cell_changes(a: Policy, b: Policy, layers: int, heads: int) -> list[CellChange]:
    """Cells whose modes differ in what they do, whatever they are called.

    Raises:
        PolicyError: a rule of one of them names a layer or head that the model does not have.
    """
    tables = [resolve(policy, layers=layers, heads=heads, fp8=True) for policy in (a, b)]
    found: list[CellChange] = []
    for noise in _stretches(a, b):
        before, after = (_modes_at(table, noise) for table in tables)
        for one in range(len(tables[0].mode_names)):
            for other in range(len(tables[1].mode_names)):
                names = tables[0].mode_names[one], tables[1].mode_names[other]
                if a.modes[names[0]] == b.modes[names[1]]:
                    continue
                at = (before == one) & (after == other)
                if at.any():
                    who = [_members(at.any(axis=axis)) for axis in (1, 0)]
                    found.append(CellChange(noise, *names, int(at.sum()), *who))
    return found


def keep_changes(
    a: Policy, b: Policy, layers: int, heads: int, grid: tuple[int, int, int]
) -> list[KeepChange]:
    """Mean keep by noise on a grid, where it differs.

    Raises:
        PolicyError: as for `cell_changes`.
    """
    keeps = []
    for policy in (a, b):
        table = resolve(policy, layers=layers, heads=heads, fp8=True)
        keep = table.keep(plan(policy, layout(grid, policy.tile_for(grid))))
        keeps.append([keep[_row(table, noise)] for noise in _stretches(a, b)])
    return [
        KeepChange(noise, before, after)
        for noise, before, after in zip(_stretches(a, b), *keeps, strict=True)
        if abs(before - after) > 1e-6
    ]


def _stretches(a: Policy, b: Policy) -> list[NoiseRange]:
    """The stretches of noise in which neither policy changes."""
    inner = sorted({*a.edges, *b.edges}, reverse=True)
    return [NoiseRange(hi, lo) for hi, lo in pairwise([1.0, *inner, 0.0])]


def _row(table: Table, noise: NoiseRange) -> int:
    """The row of a table that a stretch lies in."""
    return next(
        i for i, r in enumerate(table.noise_ranges) if r.hi >= noise.hi and r.lo <= noise.lo
    )


def _modes_at(table: Table, noise: NoiseRange) -> np.ndarray:
    """int32 [layers, heads]: the modes in a stretch."""
    return table.cells[:, _row(table, noise)].numpy()


def _members(chosen: np.ndarray) -> str:
    """Which are true, as in a rule: "all", or "0, 12..18"."""
    if chosen.all():
        return "all"
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))
    return ", ".join(
        _span(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)
    )


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}..{last}"
