"""What rotations do to pairs of channels: 2 x 2 matrices of tables."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import fx

from fpsc.passes.before.declined import require
from fpsc.passes.before.digits import Axis
from fpsc.passes.graph import Dim


@dataclass(frozen=True)
class Table:
    """A tensor that a leaf was multiplied by.

    Attributes:
        node: it. Tables of one `value` (`fpsc.passes.sizes`) are equal whichever their nodes.
        part: "" for the tensor itself, "real" or "imag".
        axes: what its axes meet; no digits where it has one element.
        row: of the token 0 of the leaf.
        channel: which one of a pair it met, where it has a value for each.
    """

    node: fx.Node = field(compare=False)
    value: fx.Node
    part: str = ""
    axes: tuple[Axis, ...] = ()
    row: Dim = 0
    channel: int = 0


class Entry(NamedTuple):
    """A sign times a table, or times one."""

    sign: int = 1
    table: Table | None = None


Matrix = dict[tuple[int, int], Entry]
"""What a channel of a pair takes of a channel: by the numbers of both; nothing where there is none.
Where one channel was picked out of every pair it is number 0."""

IDENTITY: Matrix = {(0, 0): Entry(), (1, 1): Entry()}
BLANK: Matrix = {}


def negated(matrix: Matrix) -> Matrix:
    return {at: entry._replace(sign=-entry.sign) for at, entry in matrix.items()}


def times(matrix: Matrix, table: Table) -> Matrix:
    single = all(entry.table is None for entry in matrix.values())
    require(single, "a product with two tables")
    return {at: Entry(e.sign, replace(table, channel=at[0])) for at, e in matrix.items()}


def times_complex(matrix: Matrix, table: Table) -> Matrix:
    """Of pairs that are complex numbers."""
    require(matrix == IDENTITY, "a product with two tables")
    cos, sin = replace(table, part="real"), replace(table, part="imag")
    row = {(0, 0): Entry(1, cos), (0, 1): Entry(-1, sin)}
    return row | {(1, 0): Entry(1, sin), (1, 1): Entry(1, cos)}


def plus(a: Matrix, b: Matrix) -> Matrix:
    require(not a.keys() & b.keys(), "a sum that is no rotation")
    return a | b


def picked(matrix: Matrix, channel: int) -> Matrix:
    """One channel out of every pair."""
    row = {(0, i): entry for (o, i), entry in matrix.items() if o == channel}
    require(row, "channels are read before they are written")
    return row


def placed(matrix: Matrix, channel: int, row: Matrix) -> Matrix:
    """With one channel of every pair replaced by what was picked."""
    rest = {at: entry for at, entry in matrix.items() if at[0] != channel}
    return rest | {(channel, i): entry for (_, i), entry in row.items()}
