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

*P without an exchange between lanes.* Scores lie in registers in another order than the next
product wants its operand. Where V is stored PERMUTED, or K is copied REORDERED, the one is the
other with other names for its columns.

*Two tiles at a time*, where BN is twice a tile: the maximum, and what is multiplied by it, occur
once for both. They need not be neighbours. Where a last tile has no second one, it stands in for
that itself: with values of zero, which a copy from beyond the end of V is, and no part in the sum.

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
    """Columns of P in the order in which V is stored where that is permuted (`pack.permuted`), and
    which undoes that of K where that is copied so (`keys_descriptor`).
    """
    p = tl.reshape(p, [ROWS, COLUMNS // 16, 2, 4, 2])
    p = tl.permute(p, [0, 1, 3, 2, 4])
    return tl.reshape(p, [ROWS, COLUMNS])


@triton.jit
def load_meta(meta_ptr, tile):
    """Scale of a key tile, and the weight of its last key: two float32, loaded as one int64."""
    both = tl.load(meta_ptr + tile)
    scale = both.to(tl.uint32).to(tl.float32, bitcast=True)
    weight = (both >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return scale, weight


@triton.jit
def after(x, first):
    """x [ROWS, COLUMNS], as what seems to need `first` [ROWS].

    Triton divides the rows of a specialised loop between two warp groups by walking from the first
    product to all that follows from it, and gives up at a maximum that does not. The bits that are
    added are zero, which Triton does not see, and LLVM does.
    """
    nothing = (first.to(tl.uint32, bitcast=True) >> 31) >> 1
    return (x.to(tl.uint32, bitcast=True) | nothing[:, None]).to(tl.float32, bitcast=True)


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
def keys_descriptor(k_ptr, rows, DP: tl.constexpr, KEYS: tl.constexpr, REORDERED: tl.constexpr):
    """Blocks of KEYS rows of K [rows, DP].

    REORDERED: of 16 rows, place 8x + 2y + z holds row 4y + 2x + z.
    """
    if REORDERED:
        return tl.make_tensor_descriptor(
            k_ptr, [rows // 16, 2, 4, 2, DP], [16 * DP, 2 * DP, 4 * DP, DP, 1],
            [KEYS // 16, 2, 4, 2, DP],
        )  # fmt: skip
    else:
        return tl.make_tensor_descriptor(k_ptr, [rows, DP], [DP, 1], [KEYS, DP])


@triton.jit
def load_keys(k_desc, row, DP: tl.constexpr, KEYS: tl.constexpr, REORDERED: tl.constexpr):
    """A block of K, transposed: [DP, KEYS]."""
    if REORDERED:
        k = tl.reshape(k_desc.load([row // 16, 0, 0, 0, 0]), [KEYS, DP])
    else:
        k = k_desc.load([row, 0])
    return k.T


@triton.jit
def visit_tiles(
    q, k_desc, v_desc, q_scale, meta_ptr, list_idx, visits, key_row, channel,
    DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr,
    PERMUTED: tl.constexpr, REORDERED: tl.constexpr, SPECIALISE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The key tiles of a list, BN keys at a time.

    m, total [BM], acc [BM, DP]: the exponent that was taken from scores, the sum of weights, and
    the weighted sum of V. key_row, channel: of the key head, in K and in transposed V.
    """
    PARTS: tl.constexpr = BLOCK // BN
    m = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    is_last = (tl.arange(0, BN) == BN - 1)[None, :]
    next_tile = tl.load(list_idx, mask=visits > 0, other=0)
    next_scale, next_weight = load_meta(meta_ptr, next_tile)
    for j in tl.range(0, visits * PARTS, num_stages=STAGES, warp_specialize=SPECIALISE):
        # Specialised, the warps that load find the tile by themselves.
        w = next_tile if PARTS == 1 and not SPECIALISE else tl.load(list_idx + j // PARTS)
        row = w * BLOCK + (j % PARTS) * BN
        s = tl.dot(q, load_keys(k_desc, key_row + row, DP, BN, REORDERED))
        c = q_scale
        if FP8:
            c *= next_scale
        weight = next_weight
        if PARTS > 1:
            keys = weight + (BLOCK - 1.0) - (j % PARTS) * BN
            weight = tl.minimum(tl.maximum(keys, 0.0), BN * 1.0) - (BN - 1.0)
        next_tile = tl.load(list_idx + tl.minimum((j + 1) // PARTS, visits - 1))
        next_scale, next_weight = load_meta(meta_ptr, next_tile)

        largest = tl.max(s, 1) * c
        if FP8:  # a whole number, so that P rounds alike whichever tile comes first
            largest = tl.ceil(largest - P_OFFSET)
        new_m = tl.maximum(m, largest)
        p = tl.math.exp2(s * c - new_m[:, None])
        alpha = tl.math.exp2(m - new_m)
        m = new_m
        total = total * alpha + tl.sum(tl.where(is_last, p * weight, p), 1)
        if FP8:
            p8 = p.to(tl.float8e4nv)
            if PERMUTED or REORDERED:
                p8 = permute_columns(p8, BM, BN)
            v = v_desc.load([channel, row])
            acc = acc * alpha[:, None] + tl.dot(p8, v.T)
        else:
            v = v_desc.load([key_row + row, 0])
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return m, total, acc


@triton.jit
def visit_pairs(
    q, k_desc, v_desc, q_scale, meta_ptr, list_idx, visits, key_row, channel, beyond,
    DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, PERMUTED: tl.constexpr,
    REORDERED: tl.constexpr, SPECIALISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `visit_tiles`, for FP8 cells, two tiles at a time. beyond: a column behind those of V."""
    m = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    is_last = (tl.arange(0, BLOCK) == BLOCK - 1)[None, :]
    next_tile = tl.load(list_idx, mask=visits > 0, other=0)
    next_scale, next_weight = load_meta(meta_ptr, next_tile)
    second_tile = tl.load(list_idx + tl.minimum(1, visits - 1), mask=visits > 0, other=0)
    second_scale, second_weight = load_meta(meta_ptr, second_tile)
    for j in tl.range(0, visits, 2, num_stages=STAGES, warp_specialize=SPECIALISE):
        has_second = j + 1 < visits
        row = tl.load(list_idx + j) * BLOCK
        second_row = tl.load(list_idx + tl.minimum(j + 1, visits - 1)) * BLOCK
        s = tl.dot(q, load_keys(k_desc, key_row + row, DP, BLOCK, REORDERED))
        second_s = tl.dot(q, load_keys(k_desc, key_row + second_row, DP, BLOCK, REORDERED))
        c, weight = q_scale * next_scale, next_weight
        second_c, last_weight = q_scale * second_scale, second_weight
        next_tile = tl.load(list_idx + tl.minimum(j + 2, visits - 1))
        next_scale, next_weight = load_meta(meta_ptr, next_tile)
        second_tile = tl.load(list_idx + tl.minimum(j + 3, visits - 1))
        second_scale, second_weight = load_meta(meta_ptr, second_tile)

        first_max = tl.max(s, 1)
        second_s = after(second_s, first_max)
        largest = tl.maximum(first_max * c, tl.max(second_s, 1) * second_c)
        new_m = tl.maximum(m, tl.ceil(largest - P_OFFSET))
        alpha = tl.math.exp2(m - new_m)
        m = new_m
        p = tl.math.exp2(s * c - m[:, None])
        second_p = tl.math.exp2(second_s * second_c - m[:, None])
        total = total * alpha + tl.sum(tl.where(is_last, p * weight, p), 1)
        second_total = tl.sum(tl.where(is_last, second_p * last_weight, second_p), 1)
        total += tl.where(has_second, 1.0, 0.0) * second_total
        p8, second_p8 = p.to(tl.float8e4nv), second_p.to(tl.float8e4nv)
        if PERMUTED or REORDERED:
            p8 = permute_columns(p8, BM, BLOCK)
            second_p8 = permute_columns(second_p8, BM, BLOCK)
        product = tl.dot(p8, v_desc.load([channel, row]).T)
        second_v = v_desc.load([channel, tl.where(has_second, second_row, beyond)])
        product = tl.dot(second_p8, second_v.T, product)
        acc = acc * alpha[:, None] + product
    return m, total, acc


@triton.jit
def attend_tile(
    q_desc, k_desc, v_desc, q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr,
    offset_ptr, modes_ptr, heads_ptr, list_ptr, list_idx, visits_ptr, order_ptr, gather_ptr,
    valid_ptr, item, active, scale, H, G, N, TILES, PATTERNS, ENTRIES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FP8: tl.constexpr, PERMUTED: tl.constexpr, REORDERED: tl.constexpr, SPECIALISE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One item: BM rows of a query tile of a head. Where not active, none of it is stored."""
    tl.static_assert(BN <= BLOCK or (BN == 2 * BLOCK and FP8))
    tl.static_assert(not REORDERED or (FP8 and not PERMUTED))
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
    channel = key_head * DP
    if BN > BLOCK:
        m, total, acc = visit_pairs(
            q, k_desc, v_desc, q_scale, meta_ptr, list_idx, visits, key_row, channel, TILES * BLOCK,
            DP, BLOCK, BM, PERMUTED, REORDERED, SPECIALISE, STAGES,
        )  # fmt: skip
    else:
        m, total, acc = visit_tiles(
            q, k_desc, v_desc, q_scale, meta_ptr, list_idx, visits, key_row, channel,
            DP, BLOCK, BM, BN, FP8, PERMUTED, REORDERED, SPECIALISE, STAGES,
        )  # fmt: skip

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
    FP8: tl.constexpr, PERMUTED: tl.constexpr, REORDERED: tl.constexpr, SPECIALISE: tl.constexpr,
    STAGES: tl.constexpr, PERSISTENT: tl.constexpr,
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
    KEYS: tl.constexpr = min(BN, BLOCK)  # of a copy
    k_desc = keys_descriptor(k_ptr, B * G * TILES * BLOCK, DP, KEYS, REORDERED)
    if FP8:
        columns = TILES * BLOCK
        v_desc = tl.make_tensor_descriptor(v_ptr, [B * G * DP, columns], [columns, 1], [DP, KEYS])
    else:
        v_desc = tl.make_tensor_descriptor(v_ptr, [B * G * TILES * BLOCK, DP], [DP, 1], [KEYS, DP])
    items = tl.load(heads_ptr) * TILES * PARTS
    if PERSISTENT:
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
            attend_tile(
                q_desc, k_desc, v_desc, q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr,
                lse_ptr, offset_ptr, modes_ptr, heads_ptr, list_ptr, list_idx, visits_ptr,
                order_ptr, gather_ptr, valid_ptr, item, True, scale, H, G, N, TILES, PATTERNS,
                ENTRIES, D, DP, BLOCK, BM, BN, FP8, PERMUTED, REORDERED, SPECIALISE, STAGES,
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
            D, DP, BLOCK, BM, BN, FP8, PERMUTED, REORDERED, SPECIALISE, STAGES,
        )  # fmt: skip
