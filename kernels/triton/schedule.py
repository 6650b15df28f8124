"""Which work there is, and in which order. Made and read on the device.

A GPU takes work up in the order in which it is numbered. Heads with long lists go first, so that
the last ones to finish are short; in a head, tiles go in the order of its pattern, for the same
reason. Neighbours in that order mostly see the same keys, which then come from the cache.

All items of a launch are of one kind of cell, so those with longer lists are those that cost more.

Where programs take every n-th item whatever they cost, that order is not enough: a tile of text
sees all keys, and if in every head it falls to the same program, that one is the last by far.
`list_work` puts lists of like lengths together, over all heads. Where those of a head are equally
long but for text, as in all patterns but explicit ones, no program then has more to do than another
by more than the longest item; else at most about twice as much (`bench/l2.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

WORK = {"CLASSES": 32, "WIDTH": 128}
"""Of lengths of lists, one for each number of bits; tiles that a program takes at once."""

COLUMNS = 32
"""Heads whose counts `list_work` reads at once."""


@triton.jit
def order_heads(modes_ptr, list_ptr, heads_ptr, HEADS, TILES, WIDTH: tl.constexpr):
    """heads int32 [2, 1 + HEADS]: for each kind of cell, how many heads have it, and which.

    modes int32 [HEADS, 3], HEADS those of all batch elements; one program a head. Each finds its
    place by counting the heads in front of it, in blocks of WIDTH.
    """
    head = tl.program_id(0)
    pattern = tl.load(modes_ptr + head * 3)
    kind = tl.load(modes_ptr + head * 3 + 1)
    own = tl.load(list_ptr + pattern * (TILES + 1) + TILES) - tl.load(
        list_ptr + pattern * (TILES + 1)
    )
    in_front = 0
    others = 0
    for start in range(0, HEADS, WIDTH):
        h = start + tl.arange(0, WIDTH)
        there = h < HEADS
        patterns = tl.load(modes_ptr + h * 3, mask=there, other=0)
        same = there & (tl.load(modes_ptr + h * 3 + 1, mask=there, other=-1) == kind)
        ends = list_ptr + patterns * (TILES + 1)
        visits = tl.load(ends + TILES, mask=there, other=0) - tl.load(ends, mask=there, other=0)
        earlier = (visits > own) | ((visits == own) & (h < head))
        in_front += tl.sum((same & earlier).to(tl.int32), 0)
        others += tl.sum((there & ~same).to(tl.int32), 0)
    heads_ptr += kind * (1 + HEADS)
    tl.store(heads_ptr + 1 + in_front, head)
    if in_front == 0:  # one of each kind is the first, and says how many there are
        tl.store(heads_ptr, HEADS - others)


@triton.jit
def class_of(visits):
    """The number of bits of a list's length; lists of a class differ by less than twice."""
    exponent = (visits.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return tl.maximum(exponent, 0)


@triton.jit
def count_classes(
    heads_ptr, modes_ptr, list_ptr, counts_ptr, HEADS, TILES,
    CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """counts int32 [CLASSES, HEADS]: how many lists of each class the heads of one kind have.

    heads: of `order_heads`, its part for this kind, whose order is that of the columns; beyond the
    last of them columns are zero. One program a column.
    """
    rank = tl.program_id(0)
    real = rank < tl.load(heads_ptr)
    head = tl.load(heads_ptr + 1 + rank, mask=real, other=0)
    list_ptr += tl.load(modes_ptr + head * 3) * (TILES + 1)
    classes = tl.arange(0, CLASSES)
    found = tl.zeros([CLASSES], tl.int32)
    for start in range(0, TILES, WIDTH):
        tile = start + tl.arange(0, WIDTH)
        there = real & (tile < TILES)
        first = tl.load(list_ptr + tile, mask=there, other=0)
        visits = tl.load(list_ptr + tile + 1, mask=there, other=0) - first
        same = (class_of(visits)[:, None] == classes[None, :]) & there[:, None]
        found += tl.sum(same.to(tl.int32), 0)
    tl.store(counts_ptr + classes * HEADS + rank, found)


@triton.jit
def list_work(
    heads_ptr, modes_ptr, list_ptr, visits_ptr, order_ptr, counts_ptr, work_ptr, H, HEADS, TILES,
    PATTERNS, ENTRIES, CLASSES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """work int32 [items, 4]: all items of one kind of cell, for programs that take every n-th.

    An item is a query tile of a head: the head (of all batch elements), the tile, and where in the
    lists its own begins and how long it is. heads: of `order_heads`, its part for this kind;
    counts: of `count_classes`; lists: see `forward.list_of`. What is beyond the last item is not
    written. One program for WIDTH tiles of a head; it reads COLUMNS counts of each class at once.

    Classes go the shortest first; in a class heads, and in a head tiles, are neighbours as in the
    order of its pattern. Shortest first, because a program that has a long item stays behind, at
    keys that the others are done with; at the end nobody waits for the cache any more.
    """
    rank = tl.program_id(0)
    heads = tl.load(heads_ptr)
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = (rank < heads) & (place < TILES)
    head = tl.load(heads_ptr + 1 + rank, mask=rank < heads, other=0)
    pattern = tl.load(modes_ptr + head * 3)
    tile = tl.load(order_ptr + pattern * TILES + place, mask=real, other=0)
    list_ptr += pattern * (TILES + 1) + tile
    first = tl.load(list_ptr, mask=real, other=0)
    visits = tl.load(list_ptr + 1, mask=real, other=0) - first

    classes = tl.arange(0, CLASSES)
    of_all = tl.zeros([CLASSES], tl.int32)  # lists of each class, of all heads
    in_front = tl.zeros([CLASSES], tl.int32)  # of heads in front of this one
    for start in range(0, HEADS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        counts = tl.load(
            counts_ptr + classes[:, None] * HEADS + column[None, :],
            mask=(column < HEADS)[None, :],
            other=0,
        )
        of_all += tl.sum(counts, 1)
        in_front += tl.sum(tl.where((column < rank)[None, :], counts, 0), 1)
    own = tl.load(counts_ptr + classes * HEADS + rank)
    longer = classes[None, :] > classes[:, None]
    # In the order of all, and in that of this head, items of longer classes come first.
    first_of_all = tl.sum(tl.where(longer, of_all[None, :], 0), 1) + in_front
    first_of_own = tl.sum(tl.where(longer, own[None, :], 0), 1)
    same = class_of(visits)[:, None] == classes[None, :]
    shift = tl.sum(tl.where(same, (first_of_all - first_of_own)[None, :], 0), 1)
    item = heads * TILES - 1 - (place + shift)

    if visits_ptr is not None:
        element = head // H
        visits = tl.load(
            visits_ptr + (element * PATTERNS + pattern) * TILES + tile, mask=real, other=0
        )
        first += element * ENTRIES
    work_ptr += item * 4
    tl.store(work_ptr, head, mask=real)
    tl.store(work_ptr + 1, tile, mask=real)
    tl.store(work_ptr + 2, first, mask=real)
    tl.store(work_ptr + 3, visits, mask=real)
