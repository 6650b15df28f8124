"""Backward of FP8 cells with FP8 products: what is rounded once, then dq, then dk and dv.

The formulas are those of `fpsc.kernels.reference`. Hopper multiplies e4m3 by e4m3 only where both
operands lie along the sum, so beside the tiles that forward left there are transposed copies:

| product | sums over | its operands | from |
|---|---|---|---|
| S = Q K^T | channels | q8, k8 | forward |
| dP = dO V^T | channels | y8, rows of v8 | `quantise_gradients`, `turn_tiles` |
| dQ = dS K | keys | dS, k8 transposed | registers, `turn_tiles` |
| dV = P^T dO | queries | P, y8 transposed | registers, `turn_tiles` |
| dK = dS^T Q | queries | dS, q8 transposed | registers, `turn_tiles` |

Transposed copies are permuted in groups of 16, so that P and dS need no exchange between lanes
(`forward.permute_columns`), and zero in padding, so that no loop compares columns with a length.

A sum over keys or queries starts from zero in every tile and is added to float32 outside: there the
scale of the tile is a factor of the addition. All that a score needs beside its product is a number
of its row, m, and one more for dP: delta. Both come with the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fpsc.kernels.triton.backward import store_query_gradients
from fpsc.kernels.triton.forward import LOG2_E, list_of, load_meta, permute_columns
from fpsc.kernels.triton.pack import (
    E4M3_MAX,
    K,
    V,
    finite_or_nan,
    magnitude,
    permuted,
    scale_of,
    wanted,
)

P_MAX = tl.constexpr(2.0**8)


@triton.jit
def exponent_for(bound):
    """The least whole e, not negative, with which bound / 2^e is within e4m3, as float32."""
    least = tl.maximum(bound / E4M3_MAX, 1.0)
    bits = least.to(tl.int32, bitcast=True)
    return (((bits + 0x7FFFFF) >> 23) - 127).to(tl.float32)


@triton.jit
def turn_tiles(
    x_ptr, y_ptr, norm_ptr, count_ptr, modes_ptr, stride_count, H, HEADS, TILES,
    DP: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """e4m3 tiles of forward, transposed.

    Q and K [B, HEADS, TILES, BLOCK, DP] -> [B, HEADS, DP, TILES * BLOCK], permuted; keys beyond
    the count of a tile are zero. V the other way, from as forward stored it (PERMUTED) to rows in
    their order; norm: float32 [B, HEADS], zero before, gets the largest norm of its rows.
    """
    head, tile, b = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS, tl.program_id(1)
    if wanted(modes_ptr, b * H + head * (H // HEADS), H // HEADS, 1):
        row = b * HEADS + head
        rows = tl.arange(0, BLOCK)
        d = tl.arange(0, DP)
        across = d.to(tl.int64)[:, None] * (TILES * BLOCK) + rows[None, :]
        wide = row.to(tl.int64) * DP * TILES * BLOCK + tile * BLOCK
        long = (row.to(tl.int64) * TILES + tile) * BLOCK * DP
        if OPERAND == V:
            x = tl.trans(tl.load(x_ptr + wide + across))
            to = permuted(rows) if PERMUTED else rows
            tl.store(y_ptr + long + to[:, None] * DP + d[None, :], x)
            x = magnitude(x.to(tl.float32))
            tl.atomic_max(norm_ptr + row, tl.sqrt(tl.max(tl.sum(x * x, 1), 0)))
        else:
            source = permuted(rows)
            x = tl.load(x_ptr + long + source[:, None] * DP + d[None, :])
            if OPERAND == K:
                real = source < tl.load(count_ptr + b * stride_count + tile)
                x = tl.where(real[:, None], x.to(tl.float32), 0.0).to(x_ptr.dtype.element_ty)
            tl.store(y_ptr + wide + across, tl.trans(x))


@triton.jit
def quantise_gradients(
    dout_ptr, out_ptr, lse_ptr, shift_ptr, offset_ptr, q_scale_ptr, v_scale_ptr, norm_ptr,
    y_ptr, tile_ptr, row_ptr, modes_ptr, gather_ptr, valid_ptr,
    dout_b, dout_h, dout_n, out_b, out_h, out_n,
    H, G, N, TILES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of a query tile in e4m3, and what its products need of its rows.

    y [B, H, TILES, BLOCK, DP]. All else float32. tile [B, H,
    TILES, 4]: scale of q, scale of y, 1 / unit of dS, product of the two scales and the unit. row
    [B, H, TILES, 4, BLOCK]: m with the exponent of the unit of the row, delta; m, delta in units of
    the tile. m is +inf, so that P is 0, in padding and where a query saw no key.
    """
    head, tile, b = tl.program_id(0) % H, tl.program_id(0) // H, tl.program_id(1)
    row = b * H + head
    if tl.load(modes_ptr + row * 3 + 1) == 1:
        rows = tl.arange(0, BLOCK)
        d = tl.arange(0, DP)
        position = tl.load(gather_ptr + tile * BLOCK + rows).to(tl.int64)
        real = (rows < tl.load(valid_ptr + tile)) & (position >= 0) & (position < N)
        mask = real[:, None] & (d < D)[None, :]
        dout_ptr += b.to(tl.int64) * dout_b + head.to(tl.int64) * dout_h
        out_ptr += b.to(tl.int64) * out_b + head.to(tl.int64) * out_h
        y = tl.load(dout_ptr + position[:, None] * dout_n + d[None, :], mask=mask, other=0.0)
        out = tl.load(out_ptr + position[:, None] * out_n + d[None, :], mask=mask, other=0.0)

        at = row.to(tl.int64) * N + position
        lse = tl.load(lse_ptr + at, mask=real, other=float("-inf"))
        seen = lse != float("-inf")
        lse -= tl.load(shift_ptr + at, mask=real, other=0.0)
        m = tl.load(offset_ptr + at, mask=real, other=0.0)
        m = tl.where(seen, m, float("inf"))
        share = tl.where(seen, tl.math.exp2(m - lse * LOG2_E), 0.0)  # 1 / l

        key_head = b * G + head // (H // G)
        c = tl.load(v_scale_ptr + key_head * DP + d)
        y = finite_or_nan(y.to(tl.float32)) * c[None, :] * share[:, None]
        y_scale = scale_of(tl.max(tl.max(magnitude(y), 1), 0))
        y /= y_scale
        # NaN stays, and nothing else is beyond 448 but by a rounding of the division.
        y = tl.where(y == y, tl.minimum(tl.maximum(y, -E4M3_MAX), E4M3_MAX), y)
        y8 = y.to(y_ptr.dtype.element_ty)
        y = y8.to(tl.float32)
        delta = tl.sum(y * (out.to(tl.float32) / c[None, :]), 1)
        bound = tl.sqrt(tl.sum(y * y, 1)) * tl.load(norm_ptr + key_head) + tl.abs(delta)
        bound *= P_MAX
        of_row = exponent_for(bound)
        of_tile = exponent_for(tl.max(magnitude(bound), 0))

        slot = row * TILES + tile
        per_unit = tl.math.exp2(-of_tile)
        q_scale = tl.load(q_scale_ptr + slot)
        tl.store(tile_ptr + slot * 4, q_scale)
        tl.store(tile_ptr + slot * 4 + 1, y_scale)
        tl.store(tile_ptr + slot * 4 + 2, per_unit)
        tl.store(tile_ptr + slot * 4 + 3, q_scale * y_scale / per_unit)
        numbers = row_ptr + slot.to(tl.int64) * 4 * BLOCK + rows
        tl.store(numbers, m + of_row)
        tl.store(numbers + BLOCK, delta)
        tl.store(numbers + 2 * BLOCK, m)
        tl.store(numbers + 3 * BLOCK, delta * per_unit)
        tl.store(y_ptr + (slot.to(tl.int64) * BLOCK + rows)[:, None] * DP + d[None, :], y8)


@triton.jit
def query_gradients_fp8(
    q_ptr, k_ptr, v_ptr, y_ptr, k_turned_ptr, meta_ptr, tile_ptr, row_ptr, dq_ptr,
    modes_ptr, list_ptr, list_idx, visits_ptr, order_ptr, gather_ptr, valid_ptr,
    scale, B, H, G, N, TILES, PATTERNS, ENTRIES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq [B, H, N, D] of FP8 cells; that of others is not written. One program a part of a query
    tile of a head. tile, row: see `quantise_gradients`; lists: see `forward.list_of`."""
    QUERY_PARTS: tl.constexpr = BLOCK // BM
    KEY_PARTS: tl.constexpr = BLOCK // BN
    COLUMNS = TILES * BLOCK
    q_desc = tl.make_tensor_descriptor(q_ptr, [B * H * COLUMNS, DP], [DP, 1], [BM, DP])
    y_desc = tl.make_tensor_descriptor(y_ptr, [B * H * COLUMNS, DP], [DP, 1], [BM, DP])
    k_desc = tl.make_tensor_descriptor(k_ptr, [B * G * COLUMNS, DP], [DP, 1], [BN, DP])
    v_desc = tl.make_tensor_descriptor(v_ptr, [B * G * COLUMNS, DP], [DP, 1], [BN, DP])
    turned_desc = tl.make_tensor_descriptor(
        k_turned_ptr, [B * G * DP, COLUMNS], [COLUMNS, 1], [DP, BN]
    )
    item = tl.program_id(0)
    head = item // (TILES * QUERY_PARTS)
    part = item % QUERY_PARTS
    active = tl.load(modes_ptr + head * 3 + 1) == 1
    pattern = tl.load(modes_ptr + head * 3)
    tile = tl.load(order_ptr + pattern * TILES + (item // QUERY_PARTS) % TILES)
    b, h = head // H, head % H
    key_head = b * G + h // (H // G)
    list_idx, visits = list_of(
        list_ptr, list_idx, visits_ptr, b, pattern, tile, TILES, PATTERNS, ENTRIES
    )
    visits = tl.where(active, visits, 0)

    slot = head * TILES + tile
    rows = part * BM + tl.arange(0, BM)
    q = q_desc.load([slot * BLOCK + part * BM, 0])
    y = y_desc.load([slot * BLOCK + part * BM, 0])
    row_ptr += slot.to(tl.int64) * 4 * BLOCK + rows
    m = tl.load(row_ptr)
    delta = tl.load(row_ptr + BLOCK)
    q_scale = scale * LOG2_E * tl.load(tile_ptr + slot * 4)
    meta_ptr += key_head * TILES
    key_row = key_head * COLUMNS

    dq = tl.zeros([BM, DP], tl.float32)
    next_tile = tl.load(list_idx, mask=visits > 0, other=0)
    next_scale, _ = load_meta(meta_ptr, next_tile)
    for j in tl.range(0, visits * KEY_PARTS, num_stages=STAGES):
        row = next_tile * BLOCK + (j % KEY_PARTS) * BN
        k_scale = next_scale
        k = k_desc.load([key_row + row, 0])
        s = tl.dot(q, k.T)
        v = v_desc.load([key_row + row, 0])
        x = tl.dot(y, v.T)
        next_tile = tl.load(list_idx + tl.minimum((j + 1) // KEY_PARTS, visits - 1))
        next_scale, _ = load_meta(meta_ptr, next_tile)
        p = tl.math.exp2(s * (q_scale * k_scale) - m[:, None])
        ds = (p * (x - delta[:, None])).to(k.dtype)
        k_turned = turned_desc.load([key_head * DP, row])
        dq += tl.dot(permute_columns(ds, BM, BN), k_turned.T) * k_scale

    seen = m != float("inf")
    unit = tl.math.exp2(tl.where(seen, m - tl.load(row_ptr + 2 * BLOCK), 0.0))
    dq *= (unit * (scale * tl.load(tile_ptr + slot * 4 + 1)))[:, None]
    store_query_gradients(
        dq, dq_ptr, head, rows, active, gather_ptr + tile * BLOCK, valid_ptr + tile, N, D, DP
    )


@triton.jit
def weigh_queries(
    k, v, q_desc, y_desc, row, rows_ptr, c, per_unit,
    BN: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P and dS of some keys and queries in e4m3, [BN, BM], columns permuted.

    row: of the first query in q and y; rows_ptr: of its numbers from `quantise_gradients`.
    """
    m = tl.load(rows_ptr + 2 * BLOCK + tl.arange(0, BM))
    delta = tl.load(rows_ptr + 3 * BLOCK + tl.arange(0, BM))
    s = tl.dot(k, q_desc.load([row, 0]).T)
    x = tl.dot(v, y_desc.load([row, 0]).T)
    p = tl.math.exp2(s * c - m[None, :])
    ds = p * (x * per_unit - delta[None, :])
    return permute_columns(p.to(k.dtype), BN, BM), permute_columns(ds.to(k.dtype), BN, BM)


@triton.jit
def side_by_side(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of two halves."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [ROWS, COLUMNS])


@triton.jit
def key_gradients_fp8(
    q_ptr, k_ptr, v_ptr, y_ptr, turned_ptr, meta_ptr, v_scale_ptr, tile_ptr, row_ptr, dk_ptr,
    dv_ptr, modes_ptr, back_ptr, back_idx, order_ptr, gather_ptr, count_ptr, stride_gather,
    stride_count, scale, B, H, G, HEADS, N, TILES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, HEADS, N, D] of FP8 cells; those of others are not written. One program a part of
    a key tile, for the EACH query heads of one of HEADS, which is G, or H where each has its own.

    turned: e4m3 [2, B, H, DP, TILES * BLOCK], Q and y; tile, row: see `quantise_gradients`. gather,
    count: of the keys that take part; rows of other keys are not written.

    Both sums stay in registers, and beside them the product that is added to one. So a product has
    half of the channels of wide heads, and scores are those of 64 queries at a time.
    """
    QUERY_PARTS: tl.constexpr = BLOCK // BM
    KEY_PARTS: tl.constexpr = BLOCK // BN
    AT_ONCE: tl.constexpr = 64 if BM > 64 else BM
    WIDTH: tl.constexpr = DP // 2 if DP >= 128 else DP
    COLUMNS = TILES * BLOCK
    q_desc = tl.make_tensor_descriptor(q_ptr, [B * H * COLUMNS, DP], [DP, 1], [AT_ONCE, DP])
    y_desc = tl.make_tensor_descriptor(y_ptr, [B * H * COLUMNS, DP], [DP, 1], [AT_ONCE, DP])
    k_desc = tl.make_tensor_descriptor(k_ptr, [B * G * COLUMNS, DP], [DP, 1], [BN, DP])
    v_desc = tl.make_tensor_descriptor(v_ptr, [B * G * COLUMNS, DP], [DP, 1], [BN, DP])
    turned_desc = tl.make_tensor_descriptor(
        turned_ptr, [2 * B * H * DP, COLUMNS], [COLUMNS, 1], [WIDTH, BM]
    )
    item = tl.program_id(0)
    group = item // (TILES * KEY_PARTS)
    part = item % KEY_PARTS
    b = group // HEADS
    first_head = b * H + (group % HEADS) * EACH
    key_head = b * G + (group % HEADS) // (HEADS // G)
    active = tl.load(modes_ptr + first_head * 3 + 1) == 1  # as all heads of the group
    order = tl.load(modes_ptr + first_head * 3) * TILES + (item // KEY_PARTS) % TILES
    tile = tl.load(order_ptr + order)

    slot = (key_head * TILES + tile) * BLOCK + part * BN
    k = k_desc.load([slot, 0])
    v = v_desc.load([slot, 0])
    k_scale, _ = load_meta(meta_ptr, key_head * TILES + tile)

    dk = tl.zeros([BN, WIDTH], tl.float32)
    dv = tl.zeros([BN, WIDTH], tl.float32)
    dk_rest = tl.zeros([BN, WIDTH], tl.float32)
    dv_rest = tl.zeros([BN, WIDTH], tl.float32)
    for i in range(EACH):
        head = first_head + i
        pattern = tl.load(modes_ptr + head * 3)
        first = tl.load(back_ptr + pattern * (TILES + 1) + tile)
        visits = tl.load(back_ptr + pattern * (TILES + 1) + tile + 1) - first
        visits = tl.where(active, visits, 0)
        for j in tl.range(0, visits * QUERY_PARTS, num_stages=STAGES):
            u = tl.load(back_idx + first + j // QUERY_PARTS)
            at = head * TILES + u
            within = (j % QUERY_PARTS) * BM
            c = scale * LOG2_E * tl.load(tile_ptr + at * 4) * k_scale  # as in forward, in every bit
            y_scale = tl.load(tile_ptr + at * 4 + 1)
            per_unit = tl.load(tile_ptr + at * 4 + 2)
            unit = tl.load(tile_ptr + at * 4 + 3)
            rows = row_ptr + at.to(tl.int64) * 4 * BLOCK + within
            row = at * BLOCK + within
            p, ds = weigh_queries(k, v, q_desc, y_desc, row, rows, c, per_unit, BN, AT_ONCE, BLOCK)
            if BM > AT_ONCE:
                more_p, more_ds = weigh_queries(
                    k, v, q_desc, y_desc, row + AT_ONCE, rows + AT_ONCE, c, per_unit,
                    BN, AT_ONCE, BLOCK,
                )  # fmt: skip
                p = side_by_side(p, more_p, BN, BM)
                ds = side_by_side(ds, more_ds, BN, BM)
            column = u * BLOCK + within
            of_q, of_y = head * DP, (B * H + head) * DP
            dv += tl.dot(p, turned_desc.load([of_y, column]).T) * y_scale
            if WIDTH < DP:
                y_rest = turned_desc.load([of_y + WIDTH, column])
                dv_rest += tl.dot(p, y_rest.T) * y_scale
            dk += tl.dot(ds, turned_desc.load([of_q, column]).T) * unit
            if WIDTH < DP:
                q_rest = turned_desc.load([of_q + WIDTH, column])
                dk_rest += tl.dot(ds, q_rest.T) * unit

    rows = part * BN + tl.arange(0, BN)
    real = rows < tl.load(count_ptr + b * stride_count + tile)
    at = gather_ptr + b * stride_gather + tile * BLOCK + rows
    position = tl.load(at, mask=real, other=-1).to(tl.int64)
    real = real & (position >= 0) & (position < N) & active
    to = group.to(tl.int64) * N + position
    v_scale_ptr += key_head * DP
    store_gradients(dk, dv, dk_ptr, dv_ptr, v_scale_ptr, to, real, scale, 0, D, WIDTH)
    if WIDTH < DP:
        store_gradients(
            dk_rest, dv_rest, dk_ptr, dv_ptr, v_scale_ptr, to, real, scale, WIDTH, D, WIDTH
        )


@triton.jit
def store_gradients(
    dk, dv, dk_ptr, dv_ptr, v_scale_ptr, row, real, scale, first,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some channels of dk and dv."""
    channels = first + tl.arange(0, WIDTH)
    dv /= tl.load(v_scale_ptr + channels)[None, :]
    to = row[:, None] * D + channels[None, :]
    mask = real[:, None] & (channels < D)[None, :]
    tl.store(dk_ptr + to, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=mask)
