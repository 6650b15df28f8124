"""Values in front of an attention: that their digits and matrices say what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from fpsc.passes.before.declined import Declined
from fpsc.passes.before.index import Span, items_of
from fpsc.passes.before.matrix import Table
from fpsc.passes.before.value import Value
from fpsc.passes.before.writes import assigned, paired

SHAPE = (2, 6, 16)
X = torch.arange(2 * 6 * 16).view(SHAPE)
GRAPH = fx.Graph()
LEAF, OTHER, TABLE = (GRAPH.placeholder(name) for name in ("x", "y", "table"))
T = Table(TABLE, TABLE)


def leaf(node: fx.Node = LEAF) -> Value:
    return Value.leaf(node, SHAPE)


def elements(value: Value) -> Tensor:
    """Which element of X each one of a value is."""
    strides, found = X.stride(), torch.zeros((), dtype=torch.int64)
    for axis in value.axes:
        along = torch.zeros(1, dtype=torch.int64)
        for _, (number, stride, size) in enumerate(axis):
            steps = torch.arange(int(size)) * int(stride) * strides[number]
            along = (along[:, None] + steps).flatten()
        found = found[..., None] + along
    if value.tokens is not None:
        found = found + int(value.pieces[0].start) * strides[value.tokens]
    if value.is_picked:
        assert value.pair is not None
        ((_, channel),) = value.pieces[0].matrix
        found = found + channel * int(value.pair.stride) * strides[value.pair.axis]
    return found


Step = tuple[Callable[[Value], Value], Callable[[Tensor], Tensor]]


def permute(order: list[int]) -> Step:
    return lambda v: v.permuted(order), lambda t: t.permute(order)


def reshape(sizes: list[int]) -> Step:
    return lambda v: v.reshaped(sizes), lambda t: t.reshape(sizes)


def index(items: tuple[Any, ...]) -> Step:
    return lambda v: v.indexed(items_of(items, v.sizes, lambda n: n)), lambda t: t[items]


@st.composite
def steps(draw: st.DrawFn, sizes: list[int]) -> Step:
    """A view of a tensor of these sizes."""
    axis = draw(st.integers(0, len(sizes) - 1))
    kind = draw(st.sampled_from(["permute", "split", "merge", "slice", "pick", "new"]))
    before, after = sizes[:axis], sizes[axis + 1 :]
    if kind == "permute":
        return permute(draw(st.permutations(range(len(sizes)))))
    if kind == "split":
        divisors = [n for n in range(1, sizes[axis] + 1) if sizes[axis] % n == 0]
        outer = draw(st.sampled_from(divisors))
        return reshape([*before, outer, sizes[axis] // outer, *after])
    if kind == "merge" and after:
        return reshape([*before, sizes[axis] * after[0], *after[1:]])
    half = sizes[axis] // 2
    slices = [slice(half), slice(half, None), slice(0, None, 2), slice(1, None, 2), slice(None)]
    last = {"pick": draw(st.sampled_from([0, 1, -1])), "new": None}
    item = last[kind] if kind in last else draw(st.sampled_from(slices))
    if item in (1, -1) and sizes[axis] == 1:
        item = 0
    return index((*[slice(None)] * axis, item))


@given(st.data())
def test_views(data: st.DataObject) -> None:
    """What is not understood is declined, everything else is right."""
    value, tensor = leaf(), X
    for _ in range(6):
        if not tensor.ndim or not tensor.numel():
            break
        read, view = data.draw(steps(list(tensor.shape)))
        try:
            value = read(value)
        except Declined:
            continue
        tensor = view(tensor)
        assert value.sizes == list(tensor.shape)
        assert torch.equal(elements(value), tensor)


def half(value: Value) -> Value:
    return value.sliced(2, Span(0, 8))


@pytest.mark.parametrize("stacked", [False, True])
def test_channels_apart_and_together(stacked: bool) -> None:
    """As they were: by `stack` of neighbours, `cat` of halves, and writes into a blank."""
    spans = [Span(0, 16, 2), Span(1, 16, 2)] if stacked else [Span(0, 8), Span(8, 16)]
    parts = [leaf().sliced(2, span) for span in spans]
    sizes, axis = ([2, 6, 8, 2], 3) if stacked else (list(SHAPE), 2)
    whole = paired(parts, sizes, axis, stacked=stacked).reshaped(SHAPE)
    assert (whole.axes, whole.pieces) == (leaf().axes, leaf().pieces)
    assert paired(parts[::-1], sizes, axis, stacked=stacked).pieces != whole.pieces
    written: Value | None = None
    for part, span in zip(parts, spans, strict=True):
        written = assigned(written, SHAPE, [Span(0, 2), Span(0, 6), span], part)
    assert written == whole


def test_tokens_apart_and_together() -> None:
    first, second = (leaf().sliced(1, Span(*bounds)) for bounds in ((0, 2), (2, 6)))
    whole = Value.in_a_row([first, second], 1)
    assert [(int(p.start), int(p.length)) for p in whole.pieces] == [(0, 2), (2, 4)]
    assert whole.axes == leaf().axes
    again = whole.sliced(1, Span(3, 6))
    assert [(int(p.start), int(p.length)) for p in again.pieces] == [(3, 3)]
    with pytest.raises(Declined, match="neither a text nor a video ends"):
        Value.in_a_row([leaf(), leaf(OTHER)], 1).sliced(1, Span(4, 8))


def test_rows_of_a_table_go_with_their_tokens() -> None:
    """However tokens are cut and joined after the product, and before it."""
    joined = Value.in_a_row([leaf(), leaf(OTHER)], 1)
    made = joined.times(T, [12, 16], complex=False)
    rows = [p.matrix[0, 0].table for p in made.pieces]
    assert [t and (t.row, t.channel) for t in rows] == [(0, 0), (6, 0)]
    late = leaf().sliced(1, Span(2, 6)).times(T, [4, 16], complex=False)
    (piece,) = late.pieces
    entry = piece.matrix[1, 1].table
    assert entry is not None and (entry.row, entry.channel) == (-2, 1)


REFUSED: dict[str, Callable[[], Any]] = {
    "a sum of different tensors": lambda: leaf().plus(leaf(OTHER)),
    "a sum that is no rotation": lambda: leaf().plus(leaf()),
    "paired in two ways": lambda: half(leaf()).sliced(2, Span(0, 4)),
    "no elements": lambda: Value.leaf(LEAF, [2, 0, 16]).reshaped([0, 32]),
    "channels are paired in two ways": lambda: half(
        leaf().reshaped([2, 6, 8, 2]).as_complex().as_real().reshaped(SHAPE)
    ),
    "a product with two tables": lambda: (
        leaf().times(T, [6, 1], complex=False).times(T, [6, 1], complex=False)
    ),
    "the same for all tokens": lambda: leaf().times(T, [16], complex=False),
    "of another shape": lambda: leaf().times(T, [5, 16], complex=False),
    "complex and real": lambda: leaf().times(T, [6, 16], complex=True),
    "one of several parts": lambda: leaf().picked(1, 0),
    "in another order than they were read": lambda: assigned(
        leaf(), SHAPE, [Span(0, 2), Span(0, 6), Span(0, 16, 2)], half(leaf())
    ),
    "some of the tokens": lambda: assigned(
        None, SHAPE, [Span(0, 2), Span(0, 3), Span(0, 16)], leaf()
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_declined(reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        REFUSED[reason]()
