"""What writes into slices make of a value, and joins of the channels of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fpsc.passes.before import matrix as matrices
from fpsc.passes.before.declined import Declined, require
from fpsc.passes.before.digits import merged
from fpsc.passes.before.index import Item, Span
from fpsc.passes.before.matrix import BLANK, IDENTITY
from fpsc.passes.before.value import Value
from fpsc.passes.graph import Dim, same


def assigned(old: Value | None, sizes: Sequence[Dim], items: Sequence[Item], new: Value) -> Value:
    """What has these sizes after `old[items] = new`.

    Args:
        old: None where nothing was written yet.
    """
    require(None not in items, "a slice that is written has new axes")
    spans = {i: x for i, x in enumerate(items) if isinstance(x, Span)}
    cut = [i for i, size in enumerate(sizes) if i not in spans or not spans[i].is_all(size)]
    if not cut:
        return new
    require(len(cut) == 1, "a part of two axes is written")
    axis, span = cut[0], spans.get(cut[0])
    if new.is_picked:
        return _with_channel(old or _blank(new, axis, span), items, new)
    if old is None or span is None or span.step != 1:
        raise Declined("some of the tokens are written")
    bounds = (0, span.start), (span.stop, sizes[axis])
    before, after = ([old.sliced(axis, Span(*b))] if not same(*b) else [] for b in bounds)
    return Value.in_a_row([*before, new, *after], axis)


def paired(parts: Sequence[Value], sizes: Sequence[Dim], axis: int, *, stacked: bool) -> Value:
    """One channel each of every pair, side by side along an axis, or stacked along a new one."""
    whole: Value | None = None
    for channel, part in enumerate(parts):
        items: list[Item] = [Span(0, size) for size in sizes]
        half = 0 if stacked else part.sizes[axis]
        items[axis] = channel if stacked else Span(channel * half, (channel + 1) * half)
        whole = assigned(whole, sizes, items, part)
    assert whole is not None
    return whole


def _blank(part: Value, axis: int, span: Span | None) -> Value:
    """What `part` can be written into, which is nothing yet.

    Args:
        span: where along the axis; None for one element of it.
    """
    assert part.pair is not None
    blank = replace(part, is_picked=False).each(lambda matrix: BLANK)
    if span is None:
        return replace(blank, axes=(*part.axes[:axis], (part.pair,), *part.axes[axis:]))
    rest = part.axes[axis]
    whole = (*rest, part.pair) if span.step == 2 else (part.pair, *rest)
    return blank.with_axes(axis, merged(whole))


def _with_channel(whole: Value, items: Sequence[Item], new: Value) -> Value:
    """With one channel of every pair written: it must be what would be read from there."""
    place = whole.each(lambda matrix: IDENTITY).indexed(items)
    alike = place.is_picked and place.is_alike(new)
    require(alike, "channels are written in another order than they were read")
    channel = int((0, 0) not in place.pieces[0].matrix)
    placed = whole.with_matrices(new, lambda old, row: matrices.placed(old, channel, row))
    return placed.paired_by(place.pair)
