"""The forward kernel: a query tile against the key tiles of its list, FP8 or in the input's dtype.

The formulas are those of `fpsc.kernels.reference`. Operands come in tile order from
`fpsc.kernels.triton.pack`; the result goes back to raster order. What is done differently here:

*Padding costs nothing.* A padding row of K is a copy of the first key of its tile, and one of V is
zero. A copy changes neither the largest score nor, its V being zero, the output. In the denominator
the last copy takes away what the others of its block add: its weight is one less their number,
which is 1 for a last column that is no copy. Comparing columns with a length would cost every score
two instructions.

*Two-level accumulation.* Hopper's FP8 tensor cores keep about 14 bits of a running sum. So the
product P V of every key tile starts from zero, and is added to the float32 accumulator outside.

*One tile ahead.* Scale and weight of the next key tile are loaded while this one is worked on, and
are carried by the loop: the scores never wait for a load that depends on a load.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)
P_OFFSET = tl.constexpr(8.0)  # m is less by it: P is at most 2^8 = 256, and e4m3 holds 448


@triton.jit
def permute_columns(p, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of P in the order in which V is stored where that is permuted (`pack.permuted`).

    The accumulator of S then already has the layout of an FP8 operand, and no value changes lanes.
    """
    p = tl.reshape(p, [ROWS, COLUMNS // 16, 2, 4, 2])
    p = tl.permute(p, [0, 1, 3, 2, 4])
    return tl.reshape(p, [ROWS, COLUMNS])


@triton.jit
def load_meta(meta_ptr, tile):
    """Scale and number of keys of a key tile: two float32, loaded as one int64."""
    both = tl.load(meta_ptr + tile)
    scale = both.to(tl.uint32).to(tl.float32, bitcast=True)
    keys = (both >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return scale, keys


@triton.jit
def list_of(list_ptr, list_idx, visits_ptr, b, pattern, tile, TILES, PATTERNS, ENTRIES):
    """Where the list of a query tile begins, and how long it is.

    visits_ptr: None, or where a mask took key tiles away, what `pack.compact_lists` left; then
    list_idx holds the lists of each batch element.
    """
    first = tl.load(list_ptr + pattern * (TILES + 1) + tile)
    if visits_ptr is None:
        visits = tl.load(list_ptr + pattern * (TILES + 1) + tile + 1) - first
    else:
        visits = tl.load(visits_ptr + (b * PATTERNS + pattern) * TILES + tile)
        list_idx += b.to(tl.int64) * ENTRIES
    return list_idx + first, visits


@triton.jit
def attend_tile(
    q_desc, k_desc, v_desc, q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr,
    offset_ptr, modes_ptr, heads_ptr, list_ptr, list_idx, visits_ptr, order_ptr, gather_ptr,
    valid_ptr, item, active, scale, H, G, N, TILES, PATTERNS, ENTRIES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FP8: tl.constexpr, PERMUTED: tl.constexpr, SPECIALISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One item: BM rows of a query tile of a head. Where not active, none of it is stored."""
    PARTS: tl.constexpr = BLOCK // BN
    QUERY_PARTS: tl.constexpr = BLOCK // BM
    head = tl.load(heads_ptr + 1 + item // (TILES * QUERY_PARTS))
    b, h, part = head // H, head % H, item % QUERY_PARTS
    pattern = tl.load(modes_ptr + head * 3)
    tile = tl.load(order_ptr + pattern * TILES + (item // QUERY_PARTS) % TILES)
    list_idx, visits = list_of(
        list_ptr, list_idx, visits_ptr, b, pattern, tile, TILES, PATTERNS, ENTRIES
    )
    visits = tl.where(active, visits, 0)
    key_head = b * G + h // (H // G)
    rows = part * BM + tl.arange(0, BM)

    q = q_desc.load([(head * TILES + tile) * BLOCK + part * BM, 0])
    q_scale = scale * LOG2_E
    if FP8:
        q_scale *= tl.load(q_scale_ptr + head * TILES + tile)
    meta_ptr += key_head * TILES
    key_row = key_head * TILES * BLOCK
    is_last = tl.arange(0, BN) == BN - 1

    m = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    next_tile = tl.load(list_idx, mask=visits > 0, other=0)
    next_scale, next_keys = load_meta(meta_ptr, next_tile)
    for j in tl.range(0, visits * PARTS, num_stages=STAGES, warp_specialize=SPECIALISE):
        # Specialised, the warps that load find the tile by themselves.
        w = next_tile if PARTS == 1 and not SPECIALISE else tl.load(list_idx + j // PARTS)
        row = w * BLOCK + (j % PARTS) * BN
        k = k_desc.load([key_row + row, 0])
        s = tl.dot(q, k.T)
        c = q_scale
        if FP8:
            c *= next_scale
        keys = next_keys
        if PARTS > 1:
            keys = tl.minimum(tl.maximum(keys - (j % PARTS) * BN, 0.0), BN * 1.0)
        weight = keys - (BN - 1.0)  # of the last column: one less the copies
        next_tile = tl.load(list_idx + tl.minimum((j + 1) // PARTS, visits - 1))
        next_scale, next_keys = load_meta(meta_ptr, next_tile)

        largest = tl.max(s, 1) * c
        if FP8:  # a whole number, so that P rounds alike whichever tile comes first
            largest = tl.ceil(largest - P_OFFSET)
        new_m = tl.maximum(m, largest)
        p = tl.math.exp2(s * c - new_m[:, None])
        alpha = tl.math.exp2(m - new_m)
        m = new_m
        total = total * alpha + tl.sum(tl.where(is_last[None, :], p * weight, p), 1)
        if FP8:
            p8 = p.to(tl.float8e4nv)
            if PERMUTED:
                p8 = permute_columns(p8, BM, BN)
            v = v_desc.load([key_head * DP, row])
            acc = acc * alpha[:, None] + tl.dot(p8, v.T)
        else:
            v = v_desc.load([key_row + row, 0])
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])

    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc / total[:, None]
    channels = tl.arange(0, DP)
    if FP8:
        acc *= tl.load(v_scale_ptr + key_head * DP + channels)[None, :]
    position = tl.load(gather_ptr + tile * BLOCK + rows).to(tl.int64)
    real = (rows < tl.load(valid_ptr + tile)) & (position >= 0) & (position < N) & active
    row_of = head.to(tl.int64) * N + position
    lse = tl.where(seen, (m + tl.math.log2(total)) * LN_2, float("-inf"))
    if FP8:
        lse += tl.load(shift_ptr + row_of, mask=real, other=0.0)
    tl.store(lse_ptr + row_of, lse, mask=real)
    if offset_ptr is not None:
        tl.store(offset_ptr + row_of, m, mask=real)
    out_row = ((b.to(tl.int64) * N + position) * H + h) * D
    tl.store(
        out_ptr + out_row[:, None] + channels[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (channels < D)[None, :],
    )


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr,
    offset_ptr, modes_ptr, heads_ptr, list_ptr, list_idx, visits_ptr, order_ptr, gather_ptr,
    valid_ptr, scale, B, H, G, N, TILES, PATTERNS, ENTRIES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FP8: tl.constexpr, PERMUTED: tl.constexpr, SPECIALISE: tl.constexpr, STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """All cells of one kind: FP8, or in the input's dtype.

    q, k: tile order [B, heads, TILES, BLOCK, DP]; v: the same, or where FP8 transposed [B, G, DP,
    TILES * BLOCK]. meta: int64 [B, G, TILES], see `load_meta`. heads: [1 + B * H], how many heads
    have this kind of cell, then which, the costliest first. Lists: see `list_of`. out: [B, N, H,
    D]; lse, shift, offset [B, H, N]; offset: m, or None. scale > 0: its sign is in q.

    Items go head by head, whose keys stay in the cache, and in a head in the order of its pattern.
    PERSISTENT: a program takes item after item; else there are as many programs as items.
    """
    PARTS: tl.constexpr = BLOCK // BM
    q_desc = tl.make_tensor_descriptor(q_ptr, [B * H * TILES * BLOCK, DP], [DP, 1], [BM, DP])
    k_desc = tl.make_tensor_descriptor(k_ptr, [B * G * TILES * BLOCK, DP], [DP, 1], [BN, DP])
    if FP8:
        columns = TILES * BLOCK
        v_desc = tl.make_tensor_descriptor(v_ptr, [B * G * DP, columns], [columns, 1], [DP, BN])
    else:
        v_desc = tl.make_tensor_descriptor(v_ptr, [B * G * TILES * BLOCK, DP], [DP, 1], [BN, DP])
    items = tl.load(heads_ptr) * TILES * PARTS
    if PERSISTENT:
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
            attend_tile(
                q_desc, k_desc, v_desc, q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr,
                lse_ptr, offset_ptr, modes_ptr, heads_ptr, list_ptr, list_idx, visits_ptr,
                order_ptr, gather_ptr, valid_ptr, item, True, scale, H, G, N, TILES, PATTERNS,
                ENTRIES, D, DP, BLOCK, BM, BN, FP8, PERMUTED, SPECIALISE, STAGES,
            )  # fmt: skip
    else:
        # Programs without an item do nothing with the first: a branch around all of it would cost
        # the loop instructions.
        item = tl.program_id(0)
        attend_tile(
            q_desc, k_desc, v_desc, q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr,
            lse_ptr, offset_ptr, modes_ptr, heads_ptr, list_ptr, list_idx, visits_ptr,
            order_ptr, gather_ptr, valid_ptr, tl.where(item < items, item, 0), item < items,
            scale, H, G, N, TILES, PATTERNS, ENTRIES,
            D, DP, BLOCK, BM, BN, FP8, PERMUTED, SPECIALISE, STAGES,
        )  # fmt: skip
