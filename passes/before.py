"""Pass: what stands in front of a site's queries and keys, so that the op can do it itself.

Models normalise queries and keys and rotate them, in many spellings: by complex numbers, by
interleaved or half-split pairs, before or after heads are split, for the video alone or for all
tokens, written into slices. Here these calls are not matched but read. Each value between the
projection and the attention is described by

- where its elements come from: every axis of it is made of digits of axes of one tensor, the leaf;
- what was done to them: nothing, or a row of a 2 x 2 matrix of tables for each channel of a pair.

A call that is not understood is a leaf itself, hence whatever comes out is right: what is in front
of a leaf stays as it is. A norm is a leaf of which the rest is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from fpsc.kernels.before import ACROSS, HALF_SPLIT, INTERLEAVED, LAYER, NO_NORM, NO_ROTATION, RMS
from fpsc.passes.axes import RESHAPES, permutation, regions
from fpsc.passes.calls import AttentionCall
from fpsc.passes.graph import (
    CASTS,
    Dim,
    Program,
    argument,
    dim,
    example,
    fixed,
    is_cat,
    is_convolution,
    is_linear,
    memory_of,
    op_name,
    plain_name,
    product,
    same,
    shape,
    writers_of,
)
from fpsc.passes.sizes import Sizes

_VIEWS = frozenset(
    ["getitem", "view", "unflatten", "transpose", "permute", "unbind", "chunk", "split",
     "split_with_sizes", "tensor_split", "unsqueeze", "squeeze", "swapaxes", "swapdims",
     "view_as_real", "view_as_complex", "detach"]
)  # fmt: skip
"""Calls whose result is in the memory of their first argument."""

_MAY_SHARE = CASTS | frozenset(["reshape", "flatten"])
"""Calls whose result may be."""

_REPEATS = frozenset(["expand", "repeat", "repeat_interleave", "broadcast_to"])
"""Calls that change nothing where sizes stay the same."""

_EMPTY = frozenset(["empty_like", "empty", "new_empty", "zeros_like", "zeros", "new_zeros"])


class Factor(NamedTuple):
    """A digit of an axis of a leaf: (index // stride) % size."""

    axis: int
    stride: Dim
    size: Dim


Digits = tuple[Factor, ...]


class Table(NamedTuple):
    """A tensor that rows of a leaf were multiplied by.

    part: which channel of a pair is meant, where it has one value a channel; None where it has one
    a pair. of: "" for the tensor itself, "real" or "imag". dims: digits of its axes, none where it
    has one element. offset: its first token that is used.
    """

    node: fx.Node
    part: int | None
    of: str
    dims: tuple[Digits, ...]
    offset: Dim


class Entry(NamedTuple):
    """sign times a table, or just sign."""

    sign: int
    table: Table | None


Row = tuple[Entry | None, Entry | None]
"""What a channel of the result takes of the first and the second channel of its pair."""


@dataclass(frozen=True)
class Map:
    """What became of the channels: `rows` of a pair, or `row` where one channel was picked, or else
    `entry` for every channel."""

    entry: Entry | None = None
    rows: tuple[Row | None, Row | None] | None = None
    row: Row | None = None


UNTOUCHED = Map(Entry(1, None))


class Piece(NamedTuple):
    """Tokens start .. start + length of a leaf."""

    leaf: fx.Node
    start: Dim
    length: Dim
    map: Map


@dataclass(frozen=True)
class Form:
    """A value, as its leaves and what was done to them.

    Attributes:
        dims: digits of every axis.
        pieces: leaves along the tokens; one where tokens were neither cut nor joined.
        tokens: the axis of the leaves that holds tokens, where that is known.
        pair: the digit that tells the channels of a pair apart, where that is known.
        complex: pairs are complex numbers.
    """

    dims: tuple[Digits, ...]
    pieces: tuple[Piece, ...]
    tokens: int | None = None
    pair: Factor | None = None
    complex: bool = False

    def each(self, change: Callable[[Map], Map]) -> Form:
        return replace(self, pieces=tuple(p._replace(map=change(p.map)) for p in self.pieces))


class Unread(Exception):
    """A call that is not understood; says which and why."""


@dataclass(frozen=True)
class Normed:
    """A norm over the last axis of a tensor.

    Attributes:
        node: its result. x: what it normalises, behind casts that widen.
        kind: RMS or LAYER. weight, bias: [width] or None.
    """

    node: fx.Node
    x: fx.Node
    kind: str
    epsilon: float
    weight: fx.Node | None
    bias: fx.Node | None
    width: int


@dataclass(frozen=True)
class Source:
    """Where queries or keys, or the tokens of one stream of them, come from.

    Attributes:
        x: the tensor as the op gets it, but for the order of its axes.
        order: what each axis of it is: letters of "b", "n", "h", "d", or "c" for heads and channels
            in one.
        length: tokens.
        weight, bias: of the norm.
    """

    x: fx.Node
    order: str
    length: Dim
    weight: fx.Node | None = None
    bias: fx.Node | None = None


@dataclass(frozen=True)
class TableUse:
    """A table as it becomes an argument of the op.

    Attributes:
        node, of: see `Table`. negative: with the other sign.
        dims: for each axis the letters it is made of, "" for one of one element.
        every: keep one channel of each pair, whose channels are alike.
    """

    node: fx.Node
    of: str
    dims: tuple[str, ...]
    negative: bool = False
    every: bool = False


@dataclass(frozen=True)
class Front:
    """What the op is to do with queries and keys, beginning with `query` and `key`.

    Attributes:
        query, key: what they come from, in the order of tokens.
        heads, head_dim: of both.
        norm, epsilon, rotation: as the op takes them.
        start: the first token that is rotated.
        notes: what was left to the graph, and why.
    """

    query: tuple[Source, ...]
    key: tuple[Source, ...]
    heads: tuple[int, int]
    head_dim: int
    norm: str = NO_NORM
    epsilon: float = 0.0
    rotation: str = NO_ROTATION
    cos: TableUse | None = None
    sin: TableUse | None = None
    start: Dim = 0
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        names = {RMS: "rms per head", ACROSS: "rms across heads", LAYER: "layer norm per head"}
        parts = [names[self.norm]] if self.norm in names else []
        if self.rotation != NO_ROTATION:
            parts.append(f"rope {self.rotation}")
        return " + ".join(parts) + "".join(f"; {note}" for note in self.notes)


class Fronts:
    """What stands in front of the attentions of a program, which is only read."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._sizes = Sizes(program)
        self._carrying = _projected(program)

    def read(self, call: AttentionCall) -> Front | str:
        """What the op can do of what is in front of an attention; why nothing, in words."""
        assert call.query is not None and call.key is not None and call.value is not None
        reader = _Reader(self.program, self._sizes, self._carrying, call.sdpa)
        try:
            query, key = (_Side.of(reader, node) for node in (call.query, call.key))
            return _front(reader, call, query, key)
        except Unread as error:
            return str(error) + "".join(f" ({note})" for note in reader.notes[:1])


# ---- reading


class _Reader:
    """Forms of the nodes in front of one attention.

    Args:
        carrying: what comes from a projection; all else is tables and weights.
        site: the attention; what is written after it does not count.
    """

    def __init__(
        self, program: Program, sizes: Sizes, carrying: set[fx.Node], site: fx.Node
    ) -> None:
        self.program = program
        self.sizes = sizes
        self.carrying = carrying
        self.site = site
        self.notes: list[str] = []
        self._known: dict[tuple[fx.Node, int], Form | None] = {}

    def size(self, size: Dim) -> Dim:
        """The same size, one expression for all that are equal."""
        size = self.sizes.of(size)
        if isinstance(size, int):
            return size
        size = sympy.expand(size)
        return int(size) if size.is_Integer else size

    def at(self, node: fx.Node) -> int:
        return self.program.order[node]

    def read(self, node: fx.Node, reader: fx.Node) -> Form | None:
        """The value of a node when `reader` reads it; None where nothing was written to it yet.

        Raises: Unread, where its memory is written in a way that is not understood.
        """
        writes = [w for w in writers_of(node) if self.at(w) < self.at(reader)]
        key = (node, len(writes))
        if key not in self._known:
            form = self._made(node, reader)
            for write in writes:
                form = self._written(form, node, write)
            self._known[key] = form
        return self._known[key]

    def form(self, node: fx.Node, reader: fx.Node) -> Form:
        found = self.read(node, reader)
        if found is None:
            raise Unread(f"{node.name} is read before it is written")
        return found

    def leaf(self, node: fx.Node) -> Form:
        sizes = shape(node)
        if sizes is None:
            raise Unread(f"{op_name(node)} yields no tensor")
        dims = tuple(_digits(Factor(a, 1, self.size(size))) for a, size in enumerate(sizes))
        return Form(dims, (Piece(node, 0, 0, UNTOUCHED),))

    def _made(self, node: fx.Node, reader: fx.Node) -> Form | None:
        name = op_name(node)
        if name in _EMPTY:
            return None
        if node not in self.carrying or node.op not in ("call_function", "call_method"):
            return self.leaf(node)
        if is_linear(node) or is_convolution(node):
            return self.leaf(node)
        if name not in _VIEWS and read_norm(self, node) is not None:
            return self.leaf(node)
        try:
            return self._understood(node, name, reader)
        except Unread as error:
            self.notes.append(str(error))
            return self.leaf(node)

    def _understood(self, node: fx.Node, name: str, reader: fx.Node) -> Form:
        source = node.args[0] if node.args else None
        if name in _VIEWS and isinstance(source, fx.Node):
            return self._viewed(node, name, source, reader)
        if name in _MAY_SHARE and isinstance(source, fx.Node):
            self._untouched_between(source, node, reader)
            return self._viewed(node, name, source, node)
        if name in _REPEATS and isinstance(source, fx.Node):
            if not _same_sizes(shape(source), shape(node) or []):
                raise Unread(f"{name} of queries or keys")
            self._untouched_between(source, node, reader)
            return self.form(source, node)
        plain = plain_name(node)
        if plain == "neg" and isinstance(source, fx.Node):
            return self.form(source, node).each(_negated)
        if plain in ("add", "sub") and len(node.args) == 2 and not node.kwargs:
            return self._sum(node, -1 if plain == "sub" else 1)
        if plain == "mul" and len(node.args) == 2:
            return self._product(node)
        if name == "stack" or is_cat(node):
            return self._joined(node, stacked=name == "stack")
        raise Unread(f"{name} is no part of a norm or a rotation")

    def _untouched_between(self, source: fx.Node, node: fx.Node, reader: fx.Node) -> None:
        """A copy or a view, that is not known: nothing may be written in between."""
        if any(self.at(node) < self.at(w) < self.at(reader) for w in writers_of(memory_of(source))):
            raise Unread(f"{source.name} is written in place after {node.name}")

    # ---- views

    def _viewed(self, node: fx.Node, name: str, source: fx.Node, reader: fx.Node) -> Form:
        if name == "getitem" and not isinstance(example(source), torch.Tensor):
            return self._part(node, source, reader)
        form, sizes = self.form(source, reader), shape(node)
        assert sizes is not None
        order = permutation(node)
        if name in CASTS or name == "detach":
            value = example(node)
            if name == "detach" or (isinstance(value, torch.Tensor) and value.is_complex()):
                raise Unread(f"{name} of queries or keys")
            return form
        if order is not None:
            return replace(form, dims=tuple(form.dims[axis] for axis in order))
        if name in RESHAPES:
            return replace(form, dims=_reshaped(form.dims, shape(source) or [], sizes))
        if name == "getitem":
            return self._indexed(form, shape(source) or [], node.args[1])
        if name in ("unsqueeze", "squeeze"):
            return replace(form, dims=_reshaped(form.dims, shape(source) or [], sizes))
        if name == "view_as_complex":
            *dims, last = form.dims
            if len(last) != 1 or not same(last[0].size, 2):
                raise Unread("complex numbers of channels that are no pairs")
            self._pairs_by(form, last[0])
            return replace(form, dims=tuple(dims), pair=last[0], complex=True)
        if name == "view_as_real" and form.complex and form.pair is not None:
            return replace(form, dims=(*form.dims, (form.pair,)), complex=False)
        raise Unread(f"{name} of queries or keys")

    @staticmethod
    def _pairs_by(form: Form, digit: Factor) -> None:
        if form.pair not in (None, digit):
            raise Unread("channels are paired in two ways")

    def _part(self, node: fx.Node, source: fx.Node, reader: fx.Node) -> Form:
        """What `unbind`, `chunk` or `split` yields at an index."""
        index, name, whole = node.args[1], op_name(source), source.args[0]
        sizes = shape(whole)
        if not isinstance(index, int) or not isinstance(whole, fx.Node) or sizes is None:
            raise Unread(f"a part of {name}")
        by_position = 1 if name == "unbind" else 2
        axis = argument(source, by_position, "dim", 0)
        if not isinstance(axis, int):
            raise Unread(f"a part of {name}")
        axis %= len(sizes)
        form = self.form(whole, reader)
        chosen: list[Any] = [slice(None)] * len(sizes)
        if name == "unbind":
            chosen[axis] = index
        else:
            part = shape(node)
            assert part is not None
            before = [u for u in source.users if op_name(u) == "getitem" and u.args[1] == 0]
            length = part[axis]
            if name in ("split_with_sizes", "split") and isinstance(
                argument(source, 1, "split_size_or_sections"), list | tuple
            ):
                listed: Any = argument(source, 1, "split_size_or_sections")
                starts = [_number(n) for n in listed[:index]]
                first: Dim = reduce(lambda a, b: a + b, starts, _zero())
            elif index == 0:
                first = 0
            elif before and (each := shape(before[0])) is not None:
                first = each[axis] * index
            else:
                raise Unread(f"a part of {name}")
            return self._cut(form, axis, first, length, sizes[axis])
        return self._indexed(form, sizes, tuple(chosen))

    def _indexed(self, form: Form, sizes: list[Dim], index: Any) -> Form:
        items = _spelled_out(index if isinstance(index, tuple) else (index,), len(sizes))
        axis = 0  # of what is left of form
        for item in items:
            if item is None:
                form = replace(form, dims=(*form.dims[:axis], (), *form.dims[axis:]))
                sizes = [*sizes[:axis], 1, *sizes[axis:]]
                axis += 1
            elif isinstance(item, int):
                form = self._picked(form, axis, item)
                form = replace(form, dims=(*form.dims[:axis], *form.dims[axis + 1 :]))
                sizes = [*sizes[:axis], *sizes[axis + 1 :]]
            elif isinstance(item, slice):
                form = self._sliced(form, axis, item, sizes[axis])
                axis += 1
            else:
                raise Unread("an index that is data")
        return form

    def _picked(self, form: Form, axis: int, index: int) -> Form:
        """One channel of every pair, that is along an axis of its own, which is kept."""
        digits = form.dims[axis]
        if not digits and index in (0, -1):
            return form
        if len(digits) != 1 or not same(digits[0].size, 2):
            raise Unread("one of several parts")
        return self._channel(form, digits[0], index % 2, axis, ())

    def _channel(self, form: Form, digit: Factor, which: int, axis: int, left: Digits) -> Form:
        self._pairs_by(form, digit)
        if form.complex:
            raise Unread("a part of complex numbers")
        dims = (*form.dims[:axis], left, *form.dims[axis + 1 :])
        return replace(form, dims=dims, pair=digit).each(lambda m: Map(row=_row(m, which, digit)))

    def _sliced(self, form: Form, axis: int, item: slice, size: Dim) -> Form:
        start, stop = _bound(item.start, 0, size), _bound(item.stop, size, size)
        if item.step not in (None, 1):
            digits = form.dims[axis]
            ends = stop is not None and same(stop, size)
            if item.step != 2 or start not in (0, 1) or not ends or not digits:
                raise Unread("a slice with steps")
            rest, last = _split_last(digits)
            return self._channel(form, last, int(start), axis, rest)
        if start is None or stop is None:
            raise Unread("a slice with bounds that are data")
        if same(start, 0) and same(stop, size):
            return form
        return self._cut(form, axis, start, stop - start, size)

    def _cut(self, form: Form, axis: int, start: Dim, length: Dim, size: Dim) -> Form:
        """Elements start .. start + length of an axis: half the channels, or some tokens."""
        start, length, size = (self.size(n) for n in (start, length, size))
        digits = form.dims[axis]
        halves = isinstance(size, int) and isinstance(length, int) and 2 * length == size
        if halves and start in (0, length) and self._is_channels(form, digits):
            first, rest = _split_first(digits)
            return self._channel(form, first, int(start != 0), axis, rest)
        form = self._along_tokens(form, axis)
        pieces: list[Piece] = []
        position: Dim = 0
        for piece in form.pieces:
            end = self.size(position + piece.length)
            if self._within(position, end, start, start + length):
                pieces.append(piece)
            elif self._within(start, start + length, position, end):
                skipped = start - position
                pieces.append(_cut_piece(piece, self.size(skipped), length))
            elif not (self._known_le(end, start) or self._known_le(start + length, position)):
                raise Unread("tokens are cut where neither a text nor a video ends")
            position = end
        if not pieces or not self.sizes.same(_total(pieces), length):
            raise Unread("tokens are cut where neither a text nor a video ends")
        return self._with_pieces(form, axis, pieces)

    def _is_channels(self, form: Form, digits: Digits) -> bool:
        """Whether digits are of the last axis of a leaf, or of what was split off it."""
        if not digits or form.tokens == digits[0].axis:
            return False
        rank = len(shape(form.pieces[0].leaf) or ())
        return all(digit.axis == rank - 1 for digit in digits)

    def _within(self, a: Dim, b: Dim, start: Dim, stop: Dim) -> bool:
        return self._known_le(start, a) and self._known_le(b, stop)

    def _known_le(self, a: Dim, b: Dim) -> bool:
        """Whether a <= b is known: sizes are not negative."""
        difference = self.size(self.size(b) - self.size(a))
        if isinstance(difference, int):
            return difference >= 0
        return all(c >= 0 for c in difference.as_coefficients_dict().values())

    def _along_tokens(self, form: Form, axis: int) -> Form:
        """With the axis known for that of tokens."""
        digits = form.dims[axis]
        if len(digits) != 1 or not same(digits[0].stride, 1):
            raise Unread("a part of queries or keys")
        (token,) = digits
        if token.axis == _channels(form):
            raise Unread("a part of the channels")
        if form.tokens not in (None, token.axis):
            raise Unread("two axes of tokens")
        if form.tokens is None:
            (piece,) = form.pieces
            full = self.size((shape(piece.leaf) or [])[token.axis])
            if not self.sizes.same(full, token.size):
                raise Unread("a part of queries or keys")
            form = replace(form, tokens=token.axis, pieces=(piece._replace(length=full),))
        return form

    def _with_pieces(self, form: Form, axis: int, pieces: Iterable[Piece]) -> Form:
        made = tuple(pieces)
        assert form.tokens is not None
        token = Factor(form.tokens, 1, self.size(_total(made)))
        dims = (*form.dims[:axis], (token,), *form.dims[axis + 1 :])
        return replace(form, dims=dims, pieces=made)

    # ---- arithmetic

    def _operands(self, node: fx.Node) -> tuple[Form, Form]:
        a, b = node.args[:2]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            raise Unread(f"{op_name(node)} with a number")
        if not {a, b} <= self.carrying:
            raise Unread(f"{op_name(node)} with what does not come from a projection")
        return self.form(a, node), self.form(b, node)

    def _sum(self, node: fx.Node, sign: int) -> Form:
        a, b = self._operands(node)
        return self._added(a, b if sign > 0 else b.each(_negated))

    def _added(self, a: Form, b: Form) -> Form:
        a, b = _alike(a, b)
        pieces = tuple(
            p._replace(map=_sum_of(p.map, q.map, a.pair))
            for p, q in zip(a.pieces, b.pieces, strict=True)
        )
        return replace(a, pieces=pieces)

    def _product(self, node: fx.Node) -> Form:
        a, b = node.args[:2]
        if isinstance(a, fx.Node) and a not in self.carrying:
            a, b = b, a
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            raise Unread("mul with a number")
        if a not in self.carrying or b in self.carrying:
            raise Unread("mul of two values that both come from projections")
        return self.times(self.form(a, node), b, shape(node) or [])

    def times(self, form: Form, table: fx.Node, sizes: list[Dim]) -> Form:
        """A form times what does not depend on queries or keys."""
        given, value = shape(table), example(table)
        if given is None or not isinstance(value, torch.Tensor) or not _fits(given, form, sizes):
            raise Unread("mul with a tensor of another shape")
        if value.requires_grad:
            raise Unread(f"the table {table.name} has a gradient")
        if writers_of(memory_of(table)):
            raise Unread(f"the table {table.name} is written in place")
        aligned = form.dims[len(form.dims) - len(given) :]
        dims = tuple(
            () if same(size, 1) else digits for size, digits in zip(given, aligned, strict=True)
        )
        if not any(digits and digits[0].axis != _channels(form) for digits in dims):
            raise Unread("mul with a tensor that is the same for all tokens")
        if value.is_complex() != form.complex:
            raise Unread("mul of complex and real numbers")
        pieces, position = [], _zero()
        for piece in form.pieces:
            made = _times(piece.map, Table(table, None, "", dims, position), form)
            pieces.append(piece._replace(map=made))
            position = self.size(position + piece.length)
        return replace(form, pieces=tuple(pieces))

    # ---- joining

    def _joined(self, node: fx.Node, *, stacked: bool) -> Form:
        operands, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        if not isinstance(operands, list | tuple) or not isinstance(axis, int):
            raise Unread("a concatenation")
        if not all(isinstance(o, fx.Node) and o in self.carrying for o in operands):
            raise Unread("a concatenation with what does not come from a projection")
        forms = [self.form(o, node) for o in operands]  # type: ignore[arg-type]
        axis %= len(shape(node) or ())
        channels = len(forms) == 2 and all(p.map.row is not None for f in forms for p in f.pieces)
        if channels:
            a, b = forms
            if stacked:
                a, b = (replace(f, dims=(*f.dims[:axis], (), *f.dims[axis:])) for f in (a, b))
            return _paired(a, b, axis, leading=not stacked)
        if stacked:
            raise Unread("a stack of queries or keys")
        return self._in_a_row(forms, axis)

    def _in_a_row(self, forms: list[Form], axis: int) -> Form:
        """Tokens of several tensors."""
        forms = [self._along_tokens(form, axis) for form in forms]
        first = forms[0]
        pairs = {form.pair for form in forms if form.pair is not None}
        for form in forms:
            others = [d for i, d in enumerate(form.dims) if i != axis]
            expected = [d for i, d in enumerate(first.dims) if i != axis]
            if others != expected or form.complex or form.tokens != first.tokens:
                raise Unread("a concatenation of tensors that are laid out differently")
        if len(pairs) > 1:
            raise Unread("channels are paired in two ways")
        first = replace(first, pair=next(iter(pairs), None))
        return self._with_pieces(first, axis, [p for form in forms for p in form.pieces])

    # ---- writes

    def _written(self, form: Form | None, node: fx.Node, write: fx.Node) -> Form | None:
        """A value after a call wrote into it, or into a slice of it."""
        target, name = write.args[0], op_name(write)
        assert isinstance(target, fx.Node)
        index: Any = Ellipsis
        if target is not node:
            if op_name(target) != "getitem" or target.args[0] is not node:
                raise Unread(f"{node.name} is written in place through {op_name(target)}")
            index = target.args[1]
        if name == "setitem":
            if index is not Ellipsis:
                raise Unread(f"a slice of a slice of {node.name} is written")
            index, value = write.args[1], write.args[2]
            if not isinstance(value, fx.Node) or value not in self.carrying:
                raise Unread(f"{node.name} is overwritten")
            new = self.form(value, write)
        elif name == "copy_":
            value = write.args[1]
            if not isinstance(value, fx.Node) or value not in self.carrying:
                raise Unread(f"{node.name} is overwritten")
            new = self.form(value, write)
        elif name == "addcmul_" and len(write.args) == 3 and not write.kwargs and form is not None:
            a, b = write.args[1:]
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
                raise Unread("addcmul_ with a number")
            x, table = (b, a) if b in self.carrying else (a, b)
            if x not in self.carrying or table in self.carrying:
                raise Unread("addcmul_ of two values that both come from projections")
            sign = 1
            if op_name(table) == "neg" and isinstance(table.args[0], fx.Node):
                table, sign = table.args[0], -1
            term = self.times(self.form(x, write), table, shape(write) or [])
            old = form if index is Ellipsis else self._indexed(form, shape(node) or [], index)
            new = self._added(old, term if sign > 0 else term.each(_negated))
        else:
            raise Unread(f"{node.name} is written in place by {name}")
        return self._assigned(form, node, index, new)

    def _assigned(self, form: Form | None, node: fx.Node, index: Any, new: Form) -> Form | None:
        """form, with new in place of form[index]; form may be blank."""
        sizes = shape(node)
        assert sizes is not None
        items = _spelled_out(index if isinstance(index, tuple) else (index,), len(sizes))
        if None in items or len(items) != len(sizes):
            raise Unread("a slice that is written has new axes")
        cut = [i for i, item in enumerate(items) if not _is_all(item, sizes[i])]
        if not cut:
            return new
        if len(cut) > 1:
            raise Unread("a part of two axes is written")
        (axis,) = cut
        if new.pieces[0].map.row is not None:
            return self._channel_written(form, items[axis], axis, sizes[axis], new)
        if form is None or not isinstance(items[axis], slice):
            raise Unread("some of the tokens are written")
        return self._tokens_written(form, items[axis], axis, sizes[axis], new)

    def _channel_written(
        self, form: Form | None, item: Any, axis: int, size: Dim, new: Form
    ) -> Form:
        assert new.pair is not None
        dims = new.dims
        if isinstance(item, int):
            dims = (*dims[:axis], (new.pair,), *dims[axis:])
            which = item % 2
        elif item.step == 2:
            dims = (*dims[:axis], _merged((*dims[axis], new.pair)), *dims[axis + 1 :])
            which = item.start or 0
        else:
            dims = (*dims[:axis], _merged((new.pair, *dims[axis])), *dims[axis + 1 :])
            start = _bound(item.start, 0, size)
            which = 0 if start == 0 else 1
        if form is None:
            form = replace(new, dims=dims).each(lambda m: Map(rows=(None, None)))
        if form.dims != dims or form.pair not in (None, new.pair):
            raise Unread("channels are written in another order than they were read")
        form = replace(form, pair=new.pair)
        if [p[:3] for p in form.pieces] != [p[:3] for p in new.pieces]:
            raise Unread("channels of other tokens are written")
        pieces = []
        for old, of in zip(form.pieces, new.pieces, strict=True):
            rows = list(_rows(old.map, new.pair))
            rows[which] = of.map.row
            pieces.append(old._replace(map=Map(rows=(rows[0], rows[1]))))
        return replace(form, pieces=tuple(pieces))

    def _tokens_written(self, form: Form, item: slice, axis: int, size: Dim, new: Form) -> Form:
        start, stop = _bound(item.start, 0, size), _bound(item.stop, size, size)
        if start is None or stop is None or item.step not in (None, 1):
            raise Unread("some of the tokens are written")
        form, new = self._along_tokens(form, axis), self._along_tokens(new, axis)
        parts = [new]
        if not same(start, 0):
            parts.insert(0, self._cut(form, axis, 0, start, size))
        if not self.sizes.same(stop, size):
            parts.append(self._cut(form, axis, stop, size - stop, size))
        return self._in_a_row(parts, axis)


def _projected(program: Program) -> set[fx.Node]:
    """What depends on a projection in front of it, and is no attention."""
    found: set[fx.Node] = set()
    before = -1
    while before != len(found):
        before = len(found)
        for node in program.nodes:
            if node not in found and (
                is_linear(node)
                or is_convolution(node)
                or any(previous in found for previous in program.inputs_of(node))
            ):
                found.add(node)
    return found


# ---- digits


def _digits(*factors: Factor) -> Digits:
    return tuple(f for f in factors if not same(f.size, 1))


def _merged(digits: Digits) -> Digits:
    """The same with neighbours joined that are one digit."""
    found: list[Factor] = []
    for digit in digits:
        last = found[-1] if found else None
        if last and last.axis == digit.axis and same(last.stride, digit.stride * digit.size):
            found[-1] = Factor(last.axis, digit.stride, last.size * digit.size)
        else:
            found.append(digit)
    return tuple(found)


def _taken(digits: list[Factor], size: Dim) -> Digits:
    """The leading digits that make an axis of a size; they are removed."""
    found: list[Factor] = []
    left = size
    while not same(left, 1):
        if not digits:
            raise Unread("a reshape")
        digit = digits.pop(0)
        if same(digit.size, left):
            found.append(digit)
            return tuple(found)
        if not isinstance(digit.size, int) or not isinstance(left, int):
            raise Unread("a reshape of axes whose length is not fixed")
        if left % digit.size == 0:
            found.append(digit)
            left //= digit.size
        elif digit.size % left == 0:
            inner = digit.size // left
            found.append(Factor(digit.axis, digit.stride * inner, left))
            digits.insert(0, Factor(digit.axis, digit.stride, inner))
            return tuple(found)
        else:
            raise Unread("a reshape")
    return tuple(found)


def _reshaped(dims: tuple[Digits, ...], before: list[Dim], after: list[Dim]) -> tuple[Digits, ...]:
    groups = regions(before, after)
    if groups is None:
        raise Unread("a reshape")
    found: list[Digits] = [()] * len(after)
    for left, right in groups:
        digits = [d for axis in left for d in dims[axis]]
        big = [axis for axis in right if not same(after[axis], 1)]
        if len(big) == 1:
            found[big[0]] = _merged(tuple(digits))
            continue
        for axis in big:
            found[axis] = _merged(_taken(digits, after[axis]))
        if digits:
            raise Unread("a reshape")
    return tuple(found)


def _split_last(digits: Digits) -> tuple[Digits, Factor]:
    """The rest, and a last digit of two."""
    *rest, last = digits
    if not isinstance(last.size, int) or last.size % 2:
        raise Unread("every other of an odd number of channels")
    inner = Factor(last.axis, last.stride, 2)
    return (*rest, *_digits(Factor(last.axis, last.stride * 2, last.size // 2))), inner


def _split_first(digits: Digits) -> tuple[Factor, Digits]:
    first, *rest = digits
    if not isinstance(first.size, int) or first.size % 2:
        raise Unread("half of an odd number of channels")
    half = first.size // 2
    outer = Factor(first.axis, first.stride * half, 2)
    return outer, (*_digits(Factor(first.axis, first.stride, half)), *rest)


def _channels(form: Form) -> int:
    """The last axis of the leaves."""
    return len(shape(form.pieces[0].leaf) or ()) - 1


def _fits(given: list[Dim], form: Form, sizes: list[Dim]) -> bool:
    """Whether a table's axes meet those of a form, and widen none."""
    if len(given) > len(form.dims) or len(sizes) != len(form.dims):
        return False
    aligned = zip(given, form.dims[len(form.dims) - len(given) :], strict=True)
    return all(same(g, 1) or same(g, product(d.size for d in digits)) for g, digits in aligned)


def _same_sizes(a: list[Dim] | None, b: list[Dim]) -> bool:
    return a is not None and len(a) == len(b) and all(map(same, a, b))


# ---- maps


def _negated(of: Map) -> Map:
    def entry(e: Entry | None) -> Entry | None:
        return None if e is None else e._replace(sign=-e.sign)

    def row(r: Row | None) -> Row | None:
        return None if r is None else (entry(r[0]), entry(r[1]))

    rows = None if of.rows is None else (row(of.rows[0]), row(of.rows[1]))
    return Map(entry(of.entry), rows, row(of.row))


def _of_part(table: Table, part: int, pair: Factor | None) -> Table:
    """A table as it meets one channel of each pair."""
    tells = pair is not None and any(
        d.axis == pair.axis
        and _le(d.stride, pair.stride)
        and not _le(d.stride * d.size, pair.stride)
        for digits in table.dims
        for d in digits
    )
    return table._replace(part=part) if tells else table


def _entry_of_part(entry: Entry | None, part: int, pair: Factor | None) -> Entry | None:
    if entry is None or entry.table is None:
        return entry
    return entry._replace(table=_of_part(entry.table, part, pair))


def _rows(of: Map, pair: Factor | None) -> tuple[Row | None, Row | None]:
    if of.rows is not None:
        return of.rows
    if of.entry is None or pair is None:
        raise Unread("channels of pairs are mixed with single ones")
    first, second = (_entry_of_part(of.entry, part, pair) for part in (0, 1))
    return (first, None), (None, second)


def _row(of: Map, which: int, pair: Factor) -> Row:
    if of.row is not None:
        raise Unread("a channel of a channel")
    row = _rows(of, pair)[which]
    if row is None:
        raise Unread("channels are read before they are written")
    return row


def _sum_of(a: Map, b: Map, pair: Factor | None) -> Map:
    def entry(x: Entry | None, y: Entry | None) -> Entry | None:
        if x is not None and y is not None:
            raise Unread("a sum that is no rotation")
        return x or y

    def row(x: Row | None, y: Row | None) -> Row:
        if x is None or y is None:
            raise Unread("channels are read before they are written")
        return entry(x[0], y[0]), entry(x[1], y[1])

    if a.row is not None and b.row is not None:
        return Map(row=row(a.row, b.row))
    if a.row is not None or b.row is not None:
        raise Unread("channels of pairs are mixed with single ones")
    x, y = _rows(a, pair), _rows(b, pair)
    return Map(rows=(row(x[0], y[0]), row(x[1], y[1])))


def _times(of: Map, table: Table, form: Form) -> Map:
    def entry(e: Entry | None, part: int | None) -> Entry | None:
        if e is None:
            return None
        if e.table is not None:
            raise Unread("a product with two tables")
        return Entry(e.sign, table if part is None else _of_part(table, part, form.pair))

    if form.complex:
        if of != UNTOUCHED:
            raise Unread("a product with two tables")
        real, imaginary = table._replace(of="real"), table._replace(of="imag")
        return Map(
            rows=((Entry(1, real), Entry(-1, imaginary)), (Entry(1, imaginary), Entry(1, real)))
        )
    if of.row is not None:
        return Map(row=(entry(of.row[0], None), entry(of.row[1], None)))
    if of.rows is not None:
        rows = []
        for part, row in enumerate(of.rows):
            if row is None:
                raise Unread("channels are read before they are written")
            rows.append((entry(row[0], part), entry(row[1], part)))
        return Map(rows=(rows[0], rows[1]))
    return Map(entry=entry(of.entry, None))


def _alike(a: Form, b: Form) -> tuple[Form, Form]:
    """Two forms of the same elements, with the same pairs."""
    pairs = {form.pair for form in (a, b) if form.pair is not None}
    if (
        a.dims != b.dims
        or a.complex != b.complex
        or len(pairs) > 1
        or [p[:3] for p in a.pieces] != [p[:3] for p in b.pieces]
    ):
        raise Unread("a sum of different tensors")
    pair = next(iter(pairs), None)
    return replace(a, pair=pair), replace(b, pair=pair)


def _paired(a: Form, b: Form, axis: int, *, leading: bool) -> Form:
    """Both channels of pairs, from one each: `cat` and `stack`."""
    a, b = _alike(a, b)
    assert a.pair is not None
    dims = (*a.dims[:axis], _merged((a.pair, *a.dims[axis])), *a.dims[axis + 1 :])
    pieces = tuple(
        p._replace(map=Map(rows=(p.map.row, q.map.row)))
        for p, q in zip(a.pieces, b.pieces, strict=True)
    )
    return replace(a, dims=dims, pieces=pieces)


# ---- pieces and indices


def _zero() -> Dim:
    return 0


def _total(pieces: Iterable[Piece]) -> Dim:
    total: Dim = 0
    for piece in pieces:
        total = total + piece.length
    return total


def _cut_piece(piece: Piece, skipped: Dim, length: Dim) -> Piece:
    def entry(e: Entry | None) -> Entry | None:
        if e is None or e.table is None:
            return e
        return e._replace(table=e.table._replace(offset=e.table.offset + skipped))

    def row(r: Row | None) -> Row | None:
        return None if r is None else (entry(r[0]), entry(r[1]))

    of = piece.map
    rows = None if of.rows is None else (row(of.rows[0]), row(of.rows[1]))
    return Piece(piece.leaf, piece.start + skipped, length, Map(entry(of.entry), rows, row(of.row)))


def _spelled_out(items: tuple[Any, ...], rank: int) -> list[Any]:
    """An index with an item for every axis."""
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if not any(item is Ellipsis for item in items):
        items = (*items, Ellipsis)
    found: list[Any] = []
    for item in items:
        found += [slice(None)] * (rank - taken) if item is Ellipsis else [item]
    return found


def _is_all(item: Any, size: Dim) -> bool:
    if not isinstance(item, slice) or item.step not in (None, 1):
        return False
    start, stop = _bound(item.start, 0, size), _bound(item.stop, size, size)
    return start is not None and stop is not None and same(start, 0) and same(stop, size)


def _number(value: object) -> Dim:
    found = example(value) if isinstance(value, fx.Node) else value
    if not isinstance(found, int | torch.SymInt):
        raise Unread("a length that is data")
    return dim(found)


def _bound(value: object, default: Dim, size: Dim) -> Dim | None:
    """A bound of a slice as a position; None where it is computed."""
    if value is None:
        return default
    found = example(value) if isinstance(value, fx.Node) else value
    if not isinstance(found, int | torch.SymInt):
        return None
    bound = dim(found)
    if isinstance(bound, int):
        if bound < 0:
            return size + bound
        return min(bound, size) if isinstance(size, int) else bound
    negative = all(c < 0 for c in bound.as_coefficients_dict().values())
    return size + bound if negative else bound


# ---- norms


def read_norm(reader: _Reader, node: fx.Node) -> Normed | None:
    """The norm whose result a node is; None if it is none that the op has."""
    name, sizes = op_name(node), shape(node)
    if sizes is None or not isinstance(width := sizes[-1], int):
        return None
    if name in ("rms_norm", "layer_norm"):
        over = argument(node, 1, "normalized_shape")
        weight = argument(node, 2, "weight")
        bias = argument(node, 3, "bias") if name == "layer_norm" else None
        at = 4 if name == "layer_norm" else 3
        epsilon = argument(node, at, "eps", 1e-5 if name == "layer_norm" else None)
        x = argument(node, 0, "input")
        if not isinstance(over, list | tuple) or len(over) != 1:
            return None
        kind = LAYER if name == "layer_norm" else RMS
        return _normed(reader, node, x, kind, epsilon, weight, bias, width)
    if plain_name(node) == "mul" and len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        for x, weight in ((a, b), (b, a)):
            if _is_channel_weight(reader, weight, width) and isinstance(x, fx.Node):
                found = _scaled(_behind_casts(x))
                if found is not None:
                    return _normed(reader, node, found[0], RMS, found[1], weight, None, width)
    found = _scaled(node)
    if found is None:
        return None
    return _normed(reader, node, found[0], RMS, found[1], None, None, width)


def _normed(
    reader: _Reader,
    node: fx.Node,
    x: object,
    kind: str,
    epsilon: object,
    weight: object,
    bias: object,
    width: int,
) -> Normed | None:
    epsilon = fixed(epsilon)
    if not isinstance(x, fx.Node) or not isinstance(epsilon, float) or epsilon <= 0:
        return None
    for parameter in (weight, bias):
        if parameter is not None and not _is_channel_weight(reader, parameter, width):
            return None
    found = [p if isinstance(p, fx.Node) else None for p in (weight, bias)]
    return Normed(node, _unwidened(x), kind, epsilon, found[0], found[1], width)


def _is_channel_weight(reader: _Reader, node: object, width: int) -> bool:
    sizes = shape(node)
    return (
        isinstance(node, fx.Node)
        and node not in reader.carrying
        and sizes is not None
        and len(sizes) == 1
        and same(sizes[0], width)
        and not writers_of(memory_of(node))
    )


def _scaled(node: fx.Node) -> tuple[fx.Node, object] | None:
    """x and epsilon of `x * rsqrt(mean(x ** 2, -1, keepdim=True) + epsilon)`."""
    name = plain_name(node)
    if name not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    for x, root in ((a, b), (b, a)) if name == "mul" else ((a, b),):
        if not isinstance(x, fx.Node) or not isinstance(root, fx.Node):
            continue
        root = _behind_casts(root)
        if op_name(root) != ("rsqrt" if name == "mul" else "sqrt") or not root.args:
            continue
        total = root.args[0]
        if not isinstance(total, fx.Node) or plain_name(total) != "add" or len(total.args) != 2:
            continue
        mean, epsilon = total.args
        if not isinstance(mean, fx.Node):
            mean, epsilon = epsilon, mean
        squared = _mean_of(mean)
        if squared is None or total.kwargs:
            continue
        if _unwidened(_behind_casts(squared)) is _unwidened(_behind_casts(x)):
            return x, epsilon
    return None


def _mean_of(node: object) -> fx.Node | None:
    """x of `mean(x ** 2, -1, keepdim=True)`."""
    if not isinstance(node, fx.Node) or op_name(node) != "mean" or node.kwargs.get("dtype"):
        return None
    over, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    square = node.args[0]
    rank = len(shape(square) or ())
    if over not in (-1, (-1,), [-1], rank - 1, (rank - 1,), [rank - 1]) or keep is not True:
        return None
    if not isinstance(square, fx.Node) or not square.args:
        return None
    name, x = plain_name(square), square.args[0]
    power = name == "pow" and square.args[1:] in ((2,), (2.0,))
    product_of = name == "mul" and square.args[1:] == (x,)
    if isinstance(x, fx.Node) and (power or product_of or name == "square"):
        return x
    return None


def _behind_casts(node: fx.Node) -> fx.Node:
    while op_name(node) in CASTS and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _unwidened(node: fx.Node) -> fx.Node:
    """What a node is, behind casts that lose nothing."""
    while op_name(node) in CASTS and node.args and isinstance(node.args[0], fx.Node):
        before, after = example(node.args[0]), example(node)
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            break
        if torch.promote_types(before.dtype, after.dtype) != after.dtype:
            break
        node = node.args[0]
    return node


# ---- what the op gets


@dataclass(frozen=True)
class _Side:
    """Queries or keys, read and laid out."""

    pieces: tuple[Piece, ...]
    pair: Factor | None
    layout: _Layout
    norms: tuple[Normed | None, ...]

    @staticmethod
    def of(reader: _Reader, node: fx.Node) -> _Side:
        form, sizes = reader.form(node, reader.site), shape(node)
        if sizes is None or len(sizes) != 4 or form.complex:
            raise Unread("queries and keys are no tensors of heads")
        layout = _Layout.of(reader.sizes, form, sizes)
        if form.tokens is None:
            (piece,) = form.pieces
            form = replace(form, pieces=(piece._replace(length=sizes[2]),))
        norms = []
        for piece in form.pieces:
            norm = read_norm(reader, piece.leaf) if op_name(piece.leaf) not in _VIEWS else None
            if norm is not None and norm.width not in (layout.head_dim, layout.width):
                norm = None
            if norm is not None and norm.kind == LAYER and norm.width != layout.head_dim:
                reader.notes.append("a layer norm across heads is left to the graph")
                norm = None
            norms.append(norm)
        return _Side(form.pieces, form.pair, layout, tuple(norms))

    def sources(self, reader: _Reader, normed: bool) -> tuple[Source, ...]:
        """Every leaf, whole, in order."""
        found: list[Source] = []
        leaf, position = None, _zero()
        for piece, norm in zip(self.pieces, self.norms, strict=True):
            if piece.leaf is not leaf:
                if leaf is not None and not reader.sizes.same(position, found[-1].length):
                    raise Unread(f"only a part of {leaf.name} is used")
                leaf, position = piece.leaf, _zero()
                length = (shape(leaf) or [])[self.layout.tokens]
                x, weight, bias = leaf, None, None
                if normed and norm is not None:
                    x, weight, bias = norm.x, norm.weight, norm.bias
                self._unwritten(reader, x)
                found.append(Source(x, self.layout.order, length, weight, bias))
            if not reader.sizes.same(piece.start, position):
                raise Unread(f"tokens of {leaf.name} are in another order")
            position = position + piece.length
        if leaf is not None and not reader.sizes.same(position, found[-1].length):
            raise Unread(f"only a part of {leaf.name} is used")
        return tuple(found)

    @staticmethod
    def _unwritten(reader: _Reader, x: fx.Node) -> None:
        """What the op reads later than the graph did may not change in between."""
        since, until = reader.at(x), reader.at(reader.site)
        if any(since < reader.at(w) < until for w in writers_of(memory_of(x))):
            raise Unread(f"{x.name} is written in place in front of the attention")


@dataclass(frozen=True)
class _Layout:
    """Where heads and channels are in a leaf.

    Attributes:
        order: see `Source`. tokens: the axis of tokens.
        heads, head_dim: sizes. width: of both.
    """

    order: str
    tokens: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @staticmethod
    def of(equal: Sizes, form: Form, sizes: list[Dim]) -> _Layout:
        """From a form of [B, H, N, D], which are `sizes`."""
        heads, head_dim = sizes[1], sizes[3]
        inner = shape(form.pieces[0].leaf)
        if not isinstance(heads, int) or not isinstance(head_dim, int) or inner is None:
            raise Unread("the number of heads is not fixed")
        rank = len(inner)
        if rank not in (3, 4):
            raise Unread(f"a tensor of {rank} axes")
        last = rank - 1
        letters = ["?"] * rank
        batch, head, token, channel = form.dims
        expected_channel = _digits(Factor(last, 1, head_dim))
        if channel != expected_channel:
            raise Unread("channels are in another order")
        for digits, letter, size in ((batch, "b", sizes[0]), (token, "n", sizes[2])):
            if not digits:
                continue
            (digit,) = digits[:1]
            if len(digits) != 1 or not same(digit.stride, 1) or not equal.same(digit.size, size):
                raise Unread(f"{'batch' if letter == 'b' else 'tokens'} in another order")
            letters[digit.axis] = letter
        if head == _digits(Factor(last, head_dim, heads)) and same(inner[last], heads * head_dim):
            letters[last] = "c" if rank == 3 else "?"
        if rank == 4 and same(inner[last], head_dim):
            letters[last] = "d"
            for digit in head[:1]:
                if len(head) == 1 and same(digit.stride, 1) and same(digit.size, heads):
                    letters[digit.axis] = "h"
        # Axes of one element have no digits: the letters that are left are theirs.
        expected = "bnc" if rank == 3 else "bhnd"
        for axis in range(rank):
            if letters[axis] == "?" and same(inner[axis], 1):
                missing = [c for c in expected if c not in letters]
                letters[axis] = missing[0] if missing else "?"
        order = "".join(letters)
        if sorted(order) != sorted(expected):
            raise Unread("queries and keys are laid out in another way")
        return _Layout(order, order.index("n"), heads, head_dim)


def _front(reader: _Reader, call: AttentionCall, query: _Side, key: _Side) -> Front:
    if query.layout.head_dim != key.layout.head_dim:
        raise Unread("queries and keys have channels of different numbers")
    notes: list[str] = []
    norm, epsilon = _norm_of((query, key), notes)
    turn = _rotation_of(reader, (query, key))
    if norm == NO_NORM and turn is None:
        raise Unread("; ".join(notes) or "no norm and no rotation")
    if norm == NO_NORM and reader.notes:
        notes.append(f"norm left to the graph: {reader.notes[0]}")
    sources = [side.sources(reader, norm != NO_NORM) for side in (query, key)]
    if norm != NO_NORM:
        _two_weights(reader, sources)
    _one_dtype(call, sources)
    front = Front(
        query=sources[0],
        key=sources[1],
        heads=(query.layout.heads, key.layout.heads),
        head_dim=query.layout.head_dim,
        norm=norm,
        epsilon=epsilon,
        notes=tuple(notes),
    )
    return front if turn is None else replace(front, **turn)


def _norm_of(sides: tuple[_Side, _Side], notes: list[str]) -> tuple[str, float]:
    """The norm that all of queries and keys have; none where they differ."""
    found = [norm for side in sides for norm in side.norms]
    known = [norm for norm in found if norm is not None]
    if not known:
        return NO_NORM, 0.0
    layout = sides[0].layout
    kinds = {(n.kind, n.epsilon, n.width == layout.head_dim) for n in known}
    has = {(n.weight is not None, n.bias is not None) for side in sides for n in known}
    for side in sides:
        if len({n is not None and (n.weight is None, n.bias is None) for n in side.norms}) > 1:
            has.add((False, True))
    if len(known) < len(found) or len(kinds) > 1 or len(has) > 1:
        notes.append("norm left to the graph: it differs between queries, keys or their parts")
        return NO_NORM, 0.0
    kind, epsilon, per_head = kinds.pop()
    return kind if per_head else ACROSS, epsilon


def _two_weights(reader: _Reader, sources: list[tuple[Source, ...]]) -> None:
    lengths = [[s.length for s in side] for side in sources]
    if len(lengths[0]) > 2 or len(lengths[0]) != len(lengths[1]):
        raise Unread(f"norms of {len(lengths[0])} and {len(lengths[1])} parts of the sequence")
    if not reader.sizes.same(lengths[0][0], lengths[1][0]):
        raise Unread("parts of queries and of keys differ in length")


def _one_dtype(call: AttentionCall, sources: list[tuple[Source, ...]]) -> None:
    """What the op takes for q, k and v: one dtype, in front of all that is done to them."""
    found = [s.x for side in sources for s in side] + [call.value]
    dtypes = {v.dtype for n in found if isinstance(v := example(n), torch.Tensor)}
    if len(dtypes) != 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise Unread(f"queries, keys and values are of different dtypes ({names}) in front of it")


def _rotation_of(reader: _Reader, sides: tuple[_Side, _Side]) -> dict[str, Any] | None:
    """cos, sin, rotation and start of a front; None where nothing is rotated."""
    found = [_turn_of(reader, side) for side in sides]
    if found == [None, None]:
        return None
    one, other = found
    if one is None or other is None:
        raise Unread("of queries and keys only one is seen to be rotated")
    if not _alike_turns(reader, one, other):
        raise Unread("queries and keys are rotated by different tables")
    start, cos, sin, interleaved, negative = one
    head_dim = sides[0].layout.head_dim
    shared = sides[0].layout.heads == sides[1].layout.heads
    uses = []
    for table, turned in ((cos, False), (sin, negative)):
        wide = table.part is not None
        dims = tuple(_letters(d, sides[0].layout, head_dim) for d in table.dims)
        if not shared and any("h" in d for d in dims):
            raise Unread("tables for each head, and fewer heads of keys")
        every = wide and _repeats(reader, table.node, interleaved)
        uses.append((TableUse(table.node, table.of, dims, turned, every), wide))
    (cos_use, cos_wide), (sin_use, sin_wide) = uses
    if cos_wide != sin_wide:
        raise Unread("cos has one value a channel and sin one a pair, or the other way")
    if cos_use.every != sin_use.every:
        cos_use, sin_use = replace(cos_use, every=False), replace(sin_use, every=False)
    return {
        "rotation": INTERLEAVED if interleaved else HALF_SPLIT,
        "cos": cos_use,
        "sin": sin_use,
        "start": start,
    }


Turn = tuple[Dim, Table, Table, bool, bool]
"""Start, cos, sin, interleaved, whether sin has the other sign."""


def _turn_of(reader: _Reader, side: _Side) -> Turn | None:
    found: tuple[Table, Table, bool] | None = None
    start, position, covered = _zero(), _zero(), _zero()
    for piece in side.pieces:
        of = piece.map
        if of == UNTOUCHED:
            position = position + piece.length
            continue
        cos, sin, negative = _tables_of(reader, of)
        offset = cos.offset
        plain = cos._replace(offset=0), sin._replace(offset=0), negative
        if found is None:
            found, start = plain, position
        elif not _same_tables(reader, found, plain):
            raise Unread("parts of the sequence are rotated by different tables")
        if not reader.sizes.same(sin.offset, offset) or not reader.sizes.same(
            position, start + offset
        ):
            raise Unread("tokens are rotated by rows of other tokens")
        covered = covered + piece.length
        position = position + piece.length
    if found is None:
        return None
    cos, sin, negative = found
    rows = [d for digits in cos.dims for d in digits if d.axis == side.layout.tokens]
    if len(rows) != 1 or not reader.sizes.same(rows[0].size, covered):
        raise Unread("a rotation of a part of its tokens")
    assert side.pair is not None
    last = len(shape(side.pieces[0].leaf) or ()) - 1
    head_dim = side.layout.head_dim
    if side.pair == Factor(last, 1, 2):
        interleaved = True
    elif side.pair == Factor(last, head_dim // 2, 2):
        interleaved = False
    else:
        raise Unread("pairs of channels that are neither neighbours nor half a head apart")
    return start, cos, sin, interleaved, negative


def _tables_of(reader: _Reader, of: Map) -> tuple[Table, Table, bool]:
    """cos and sin of a rotation, and whether it turns the other way."""
    first, second = of.rows or (None, None)
    if first is None or second is None:
        raise Unread("a product that is no rotation")
    (cos_a, sin_a), (sin_b, cos_b) = first, second
    entries = (cos_a, sin_a, sin_b, cos_b)
    if any(e is None or e.table is None for e in entries):
        raise Unread("a product that is no rotation")
    signs = [e.sign for e in entries if e is not None]
    if signs not in ([1, -1, 1, 1], [1, 1, -1, 1]):
        raise Unread("a product that is no rotation")
    tables = [e.table for e in entries if e is not None and e.table is not None]
    for a, b in ((tables[0], tables[3]), (tables[1], tables[2])):
        parts = (a.part, b.part)
        same_tensor = _same_table(reader, a._replace(part=0), b._replace(part=0))
        if parts not in ((None, None), (0, 1)) or not same_tensor:
            raise Unread("channels of a pair are rotated by different tables")
    return tables[0], tables[1], signs[1] > 0


def _same_table(reader: _Reader, a: Table, b: Table) -> bool:
    return (
        reader.sizes.value_of(a.node) is reader.sizes.value_of(b.node)
        and (a.part is None) == (b.part is None)
        and a.of == b.of
        and a.dims == b.dims
        and reader.sizes.same(a.offset, b.offset)
    )


def _same_tables(
    reader: _Reader, a: tuple[Table, Table, bool], b: tuple[Table, Table, bool]
) -> bool:
    return _same_table(reader, a[0], b[0]) and _same_table(reader, a[1], b[1]) and a[2] == b[2]


def _alike_turns(reader: _Reader, a: Turn, b: Turn) -> bool:
    def letters(table: Table) -> Table:
        return table._replace(dims=())

    tables = zip(a[1:3], b[1:3], strict=True)
    return (
        reader.sizes.same(a[0], b[0])
        and a[3:] == b[3:]
        and all(_same_table(reader, letters(x), letters(y)) for x, y in tables)
        and all(
            [len(d) for d in x.dims] == [len(d) for d in y.dims]
            for x, y in zip(a[1:3], b[1:3], strict=True)
        )
    )


def _letters(digits: Digits, layout: _Layout, head_dim: int) -> str:
    """What an axis of a table is made of: letters of "b", "h", "n", "d"."""
    found = ""
    for digit in digits:
        letter = layout.order[digit.axis]
        if letter == "c":
            low, high = digit.stride, digit.stride * digit.size
            heads = "h" if not _le(high, head_dim) else ""
            letter = heads + ("d" if not _le(head_dim, low) else "")
        found += letter
    return found


def _le(a: Dim, b: Dim) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a <= b


_KEEP_CHANNELS = CASTS | frozenset(["unsqueeze", "getitem", "expand", "reshape", "view", "flatten"])
_EACH = frozenset(["cos", "sin", "neg", "float", "to"])


def _repeats(reader: _Reader, node: fx.Node, interleaved: bool) -> bool:
    """Whether both channels of every pair have the same value, for sure."""
    sizes, name = shape(node), op_name(node)
    if not sizes or node.op == "placeholder" or not isinstance(width := sizes[-1], int):
        return False
    if name in ("ones_like", "zeros_like", "ones", "zeros"):
        return True
    source = argument(node, 0, "input")
    if is_cat(node):
        parts, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        if not isinstance(parts, list | tuple) or not isinstance(axis, int):
            return False
        if axis % len(sizes) != len(sizes) - 1:
            return all(isinstance(p, fx.Node) and _repeats(reader, p, interleaved) for p in parts)
        if interleaved:
            even = [isinstance(w := (shape(p) or [1])[-1], int) and w % 2 == 0 for p in parts]
            return all(even) and all(
                isinstance(p, fx.Node) and _repeats(reader, p, True) for p in parts
            )
        values = {reader.sizes.value_of(p) for p in parts if isinstance(p, fx.Node)}
        return len(parts) == 2 and len(values) == 1
    if not isinstance(source, fx.Node):
        return False
    inner = shape(source)
    if name == "repeat_interleave":
        repeats, axis = argument(node, 1, "repeats"), argument(node, 2, "dim")
        last = isinstance(axis, int) and axis % len(sizes) == len(sizes) - 1
        return interleaved and last and isinstance(repeats, int) and repeats % 2 == 0
    kept = inner is not None and bool(inner) and same(inner[-1], width)
    if name in _EACH | _KEEP_CHANNELS and kept:
        if name == "getitem":
            items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            last = _spelled_out(items, len(inner or ()))[-1]
            if not isinstance(last, slice) or last != slice(None):
                return False
        return _repeats(reader, source, interleaved)
    return False
