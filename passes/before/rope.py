"""Reading of rotary embeddings: the matrices of a value as tables of cos and sin."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import fx

from fpsc.kernels.before import HALF_SPLIT, INTERLEAVED
from fpsc.passes.before.declined import require
from fpsc.passes.before.digits import Digit, canonical
from fpsc.passes.before.front import Rope, RopeTable
from fpsc.passes.before.layout import Layout
from fpsc.passes.before.matrix import IDENTITY, Table
from fpsc.passes.before.value import Piece, Value
from fpsc.passes.graph import CASTS, Dim, argument, is_cat, op_name, same, shape, spelled_out
from fpsc.passes.sizes import Sizes


class _Turn(NamedTuple):
    """The rotation of a piece: its tables, and the token that their first row is for.

    negative: it turns the other way.
    """

    cos: Table
    sin: Table
    negative: bool
    start: Dim


def read_rope(value: Value, layout: Layout, sizes: Sizes) -> Rope | None:
    """How queries or keys are rotated; None where they are not."""
    turns: list[_Turn] = []
    position: Dim = 0
    covered: Dim = 0
    for piece in value.pieces:
        if piece.matrix != IDENTITY:
            turns.append(_turn(piece, value.pair, position))
            covered = covered + piece.length
        position = position + piece.length
    if not turns:
        return None
    cos, sin, negative, start = turns[0]
    one_table = all(turn[:3] == (cos, sin, negative) for turn in turns)
    require(one_table, "parts of the sequence are rotated by different tables")
    in_order = all(turn.start == start for turn in turns)
    require(in_order, "tokens are rotated by rows of other tokens")
    neighbours = value.pair == Digit(value.channels, 1, 2)
    known = neighbours or value.pair == Digit(value.channels, layout.head_dim // 2, 2)
    require(known, "pairs of channels that are neither neighbours nor half a head apart")
    wide = _tells(cos, value.pair)
    one_width = wide == _tells(sin, value.pair)
    require(one_width, "cos has one value a channel and sin one a pair, or the other way")
    channels = layout.head_dim if wide else layout.head_dim // 2
    first, second = (
        RopeTable(t.node, t.value, t.part, layout.of_table(t.axes, covered, channels))
        for t in (cos, sin)
    )
    every = wide and all(_repeats(table.node, neighbours, sizes) for table in (cos, sin))
    return Rope(INTERLEAVED if neighbours else HALF_SPLIT, start, first, second, negative, every)


def _turn(piece: Piece, pair: Digit | None, position: Dim) -> _Turn:
    """Args: position: of the piece."""
    entries = [entry for _, entry in sorted(piece.matrix.items())]
    tables = [entry.table for entry in entries if entry.table]
    signs = [entry.sign for entry in entries]
    rotation = len(tables) == 4 and signs in ([1, -1, 1, 1], [1, 1, -1, 1])
    require(rotation, "a product that is no rotation")
    met = [table.channel for table in tables if _tells(table, pair)]
    cos, sin, *others = (replace(table, channel=0) for table in tables)
    alike = others == [sin, cos] and met in ([], [0, 1], [0, 0, 1, 1])
    require(alike, "channels of a pair are rotated by different tables")
    require(cos.row == sin.row, "tokens are rotated by rows of other tokens")
    start = canonical(position - piece.start - cos.row)
    return _Turn(replace(cos, row=0), replace(sin, row=0), signs[1] > 0, start)


def _tells(table: Table, pair: Digit | None) -> bool:
    """Whether a table has a value for each channel of a pair."""
    return pair is not None and any(
        digit.axis == pair.axis and digit.stride <= pair.stride < digit.stride * digit.size
        for axis in table.axes
        for digit in axis
    )


_CONSTANT = frozenset(["ones_like", "zeros_like", "ones", "zeros"])
_EACH = CASTS | frozenset(
    ["cos", "sin", "neg", "unsqueeze", "getitem", "expand", "reshape", "view", "flatten"]
)
"""Calls that treat all channels alike, where the last axis stays as long as it is."""


def _repeats(node: fx.Node, neighbours: bool, sizes: Sizes) -> bool:
    """Whether both channels of every pair have the same value, for sure.

    Args:
        node: a table [..., D].
        neighbours: how channels are paired; else they are half of D apart.
    """
    outer, name = shape(node), op_name(node)
    if node.op == "placeholder" or not outer:
        return False
    last = len(outer) - 1
    if name in _CONSTANT:
        return True
    if is_cat(node):
        parts, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        if not isinstance(parts, list | tuple) or not isinstance(axis, int):
            return False
        nodes = [part for part in parts if isinstance(part, fx.Node)]
        along = axis % len(outer) == last
        if along and not neighbours:
            return len(nodes) == 2 and sizes.value_of(nodes[0]) is sizes.value_of(nodes[1])
        widths = [(shape(n) or [1])[-1] for n in nodes] if along else []
        even = all(isinstance(width, int) and width % 2 == 0 for width in widths)
        return even and all(_repeats(n, neighbours, sizes) for n in nodes)
    if name == "repeat_interleave":
        count, axis = argument(node, 1, "repeats"), argument(node, 2, "dim")
        even = isinstance(count, int) and count % 2 == 0
        return neighbours and even and axis in (-1, last)
    source = argument(node, 0, "input")
    inner = shape(source)
    if name not in _EACH or not isinstance(source, fx.Node) or not inner:
        return False
    whole = name != "getitem" or spelled_out(node.args[1], len(inner))[-1] == slice(None)
    return whole and same(inner[-1], outer[-1]) and _repeats(source, neighbours, sizes)
