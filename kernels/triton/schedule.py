"""Which work there is, the costliest first. Made and read on the device.

A GPU takes work up in the order in which it is numbered. Heads with long lists go first, so that
the last ones to finish are short; in a head, tiles go in the order of its pattern, for the same
reason. Neighbours in that order mostly see the same keys, which then come from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def list_work(
    heads_ptr, modes_ptr, list_ptr, visits_ptr, order_ptr, work_ptr, H, TILES, PATTERNS, ENTRIES,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """work int32 [items, 4]: all items of one kind of cell, in the order of `forward.attend`.

    An item is a query tile of a head: the head (of all batch elements), the tile, and where in the
    lists its own begins and how long it is. heads: of `order_heads`, its part for this kind; lists:
    see `forward.list_of`. WIDTH items a program; what is beyond the last item is not written.
    """
    item = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = item < tl.load(heads_ptr) * TILES
    item = tl.where(real, item, 0)
    head = tl.load(heads_ptr + 1 + item // TILES)
    pattern = tl.load(modes_ptr + head * 3)
    tile = tl.load(order_ptr + pattern * TILES + item % TILES)
    list_ptr += pattern * (TILES + 1) + tile
    first = tl.load(list_ptr)
    if visits_ptr is None:
        visits = tl.load(list_ptr + 1) - first
    else:
        visits = tl.load(visits_ptr + ((head // H) * PATTERNS + pattern) * TILES + tile)
        first += (head // H) * ENTRIES
    work_ptr += item * 4
    tl.store(work_ptr, head, mask=real)
    tl.store(work_ptr + 1, tile, mask=real)
    tl.store(work_ptr + 2, first, mask=real)
    tl.store(work_ptr + 3, visits, mask=real)
