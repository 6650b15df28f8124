"""Which heads have which kind of cell, the costliest first. Made and read on the device.

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
