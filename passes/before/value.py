"""A value in front of an attention: where its elements come from and what was done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import fx

from fpsc.passes.before import matrix as matrices
from fpsc.passes.before.declined import require
from fpsc.passes.before.digits import (
    Axis,
    Digit,
    alternated,
    at_most,
    axis_of,
    canonical,
    halved,
    reshaped,
    size_of,
)
from fpsc.passes.before.index import Item, Span
from fpsc.passes.before.matrix import IDENTITY, Matrix, Table
from fpsc.passes.graph import Dim, same, same_sizes


class Piece(NamedTuple):
    """Tokens start .. start + length of a leaf, and what was done to their channels."""

    leaf: fx.Node
    start: Dim
    length: Dim
    matrix: Matrix = IDENTITY


@dataclass(frozen=True)
class Value:
    """A value, as its leaves and what was done to them.

    Attributes:
        axes: what every axis is made of.
        pieces: leaves along the tokens. Where `tokens` is None it is one, of length 0, which stands
            for all of it.
        shape: of the first leaf; its last axis is that of the channels.
        tokens: the axis of the leaves that holds tokens; None where that does not show yet.
        pair: the digit that tells the channels of a pair apart; None where no pairs were made.
        is_picked: it is one channel of every pair.
        is_complex: pairs are complex numbers.
    """

    axes: tuple[Axis, ...]
    pieces: tuple[Piece, ...]
    shape: tuple[Dim, ...]
    tokens: int | None = None
    pair: Digit | None = None
    is_picked: bool = False
    is_complex: bool = False

    @staticmethod
    def leaf(node: fx.Node, shape: Sequence[Dim]) -> Value:
        axes = tuple(axis_of(Digit(axis, 1, size)) for axis, size in enumerate(shape))
        return Value(axes, (Piece(node, 0, 0),), tuple(shape))

    @property
    def sizes(self) -> list[Dim]:
        return [size_of(axis) for axis in self.axes]

    @property
    def channels(self) -> int:
        """Their axis in a leaf."""
        return len(self.shape) - 1

    def is_alike(self, other: Value) -> bool:
        """Whether elements come from the same places."""

        def places(value: Value) -> tuple[object, ...]:
            kind = value.axes, value.is_picked, value.is_complex
            return kind, [piece[:3] for piece in value.pieces]

        return places(self) == places(other)

    def each(self, change: Callable[[Matrix], Matrix]) -> Value:
        pieces = tuple(p._replace(matrix=change(p.matrix)) for p in self.pieces)
        return replace(self, pieces=pieces)

    def with_matrices(self, other: Value, join: Callable[[Matrix, Matrix], Matrix]) -> Value:
        """With the matrices of two values joined, piece by piece."""
        pieces = tuple(
            p._replace(matrix=join(p.matrix, q.matrix))
            for p, q in zip(self.pieces, other.pieces, strict=True)
        )
        return replace(self.paired_by(other.pair), pieces=pieces)

    def with_axes(self, axis: int, *new: Axis) -> Value:
        """With other axes in place of one."""
        return replace(self, axes=(*self.axes[:axis], *new, *self.axes[axis + 1 :]))

    def paired_by(self, digit: Digit | None) -> Value:
        found = {self.pair, digit} - {None}
        require(len(found) <= 1, "channels are paired in two ways")
        return replace(self, pair=next(iter(found), None))

    # ---- views

    def permuted(self, order: Iterable[int]) -> Value:
        return replace(self, axes=tuple(self.axes[axis] for axis in order))

    def reshaped(self, sizes: Sequence[Dim]) -> Value:
        return replace(self, axes=reshaped(self.axes, sizes))

    def as_complex(self) -> Value:
        *rest, last = self.axes
        pairs = len(last) == 1 and same(last[0].size, 2)
        require(pairs, "complex numbers of channels that are no pairs")
        return replace(self.paired_by(last[0]), axes=tuple(rest), is_complex=True)

    def as_real(self) -> Value:
        assert self.is_complex and self.pair is not None
        return replace(self, axes=(*self.axes, (self.pair,)), is_complex=False)

    def indexed(self, items: Sequence[Item]) -> Value:
        value, axis = self, 0
        for item in items:
            if isinstance(item, int):
                value = value.picked(axis, item)
                continue
            if item is None:
                value = replace(value, axes=(*value.axes[:axis], (), *value.axes[axis:]))
            else:
                value = value.sliced(axis, item)
            axis += 1
        return value

    def picked(self, axis: int, index: int) -> Value:
        """One element of an axis, which goes away."""
        if not self.axes[axis]:
            return self.with_axes(axis)
        digit, *rest = self.axes[axis]
        require(not rest and same(digit.size, 2), "one of several parts")
        return self._channel(digit, index % 2).with_axes(axis)

    def sliced(self, axis: int, span: Span) -> Value:
        """Some elements of an axis: one channel of every pair, or some tokens."""
        digits, size = self.axes[axis], size_of(self.axes[axis])
        start, stop, step = span
        if span.is_all(size):
            return self
        if step != 1:
            alternate = digits and step == 2 and start in (0, 1) and same(stop, size)
            require(alternate, "a slice with steps")
            digit, rest = alternated(digits)
            return self._channel(digit, int(start)).with_axes(axis, rest)
        half = same(2 * (stop - start), size) and (same(start, 0) or same(stop, size))
        if half and all(digit.axis == self.channels for digit in digits):
            digit, rest = halved(digits)
            return self._channel(digit, int(start != 0)).with_axes(axis, rest)
        return self._cut(axis, start, stop)

    def _channel(self, digit: Digit, channel: int) -> Value:
        """One channel of every pair, but for the axes."""
        require(not self.is_complex, "a part of complex numbers")
        value = self.paired_by(digit).each(lambda matrix: matrices.picked(matrix, channel))
        return replace(value, is_picked=True)

    # ---- tokens

    def along_tokens(self, axis: int) -> Value:
        """With an axis known for that of the tokens."""
        require(len(self.axes[axis]) == 1, "a part of queries or keys")
        (token,) = self.axes[axis]
        require(token.axis != self.channels, "a part of the channels")
        require(self.tokens in (None, token.axis), "two axes of tokens")
        whole = self.shape[token.axis] if self.tokens is None else _total(self.pieces)
        complete = same(token.stride, 1) and same(token.size, whole)
        require(complete, "a part of queries or keys")
        if self.tokens is not None:
            return self
        (piece,) = self.pieces
        return replace(self, tokens=token.axis, pieces=(piece._replace(length=whole),))

    def _cut(self, axis: int, start: Dim, stop: Dim) -> Value:
        value = self.along_tokens(axis)
        pieces: list[Piece] = []
        position: Dim = 0
        for piece in value.pieces:
            end = canonical(position + piece.length)
            if at_most(start, position) and at_most(end, stop):
                pieces.append(piece)
            elif at_most(position, start) and at_most(stop, end):
                skipped = canonical(piece.start + start - position)
                pieces.append(piece._replace(start=skipped, length=canonical(stop - start)))
            position = end
        whole = pieces and same(_total(pieces), stop - start)
        require(whole, "tokens are cut where neither a text nor a video ends")
        return value._with_pieces(axis, pieces)

    def _with_pieces(self, axis: int, pieces: Sequence[Piece]) -> Value:
        assert self.tokens is not None
        token = Digit(self.tokens, 1, _total(pieces))
        return replace(self.with_axes(axis, (token,)), pieces=tuple(pieces))

    @staticmethod
    def in_a_row(values: Iterable[Value], axis: int) -> Value:
        """Tokens of several values, one after the other."""
        first, *others = (value.along_tokens(axis) for value in values)
        joined = first
        for other in others:
            alike = other._but_tokens(axis) == first._but_tokens(axis)
            require(alike, "a concatenation of tensors that are laid out differently")
            joined = joined.paired_by(other.pair)
        return joined._with_pieces(axis, [p for v in (first, *others) for p in v.pieces])

    def _but_tokens(self, axis: int) -> tuple[object, ...]:
        shape = dict(enumerate(self.shape)) | {self.tokens: None}
        return self.with_axes(axis).axes, shape, self.is_picked, self.is_complex

    # ---- arithmetic

    def negated(self) -> Value:
        return self.each(matrices.negated)

    def plus(self, other: Value) -> Value:
        require(self.is_alike(other), "a sum of different tensors")
        return self.with_matrices(other, matrices.plus)

    def times(self, table: Table, sizes: Sequence[Dim], *, complex: bool) -> Value:
        """Times a tensor of these sizes that does not depend on queries or keys."""
        missing = len(self.axes) - len(sizes)
        aligned = zip(sizes, self.axes[max(missing, 0) :], strict=False)
        axes = tuple(() if same(size, 1) else axis for size, axis in aligned)
        fits = missing >= 0 and same_sizes(sizes, [size_of(axis) for axis in axes])
        require(fits, "mul with a tensor of another shape")
        for_tokens = any(axis[0].axis != self.channels for axis in axes if axis)
        require(for_tokens, "mul with a tensor that is the same for all tokens")
        require(complex == self.is_complex, "mul of complex and real numbers")
        times = matrices.times_complex if complex else matrices.times
        pieces: list[Piece] = []
        position: Dim = 0
        for piece in self.pieces:
            met = replace(table, axes=axes, row=canonical(position - piece.start))
            pieces.append(piece._replace(matrix=times(piece.matrix, met)))
            position = position + piece.length
        return replace(self, pieces=tuple(pieces))


def _total(pieces: Iterable[Piece]) -> Dim:
    total: Dim = 0
    for piece in pieces:
        total = total + piece.length
    return canonical(total)
