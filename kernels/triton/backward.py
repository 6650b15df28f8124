"""The backward kernels: dq over the lists, dk and dv over their transpose. Products in 16 bits.

The formulas are those of `fpsc.kernels.reference`. All products see 16-bit operands (float32 where
the input is), for both kinds of cell: e4m3 is exact in them, so S of an FP8 cell is the S of its
forward, and the scales are numbers beside the products. `widen_tiles` makes those operands. FP8
products: `fpsc.kernels.triton.backward_fp8`.

FP8 values reach 448. Scales of amax / 448 in dS would leave the range of float16 at its lower end,
so dS carries 448 times the scale, and the result is divided by 448.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fpsc.kernels.triton.forward import LOG2_E, list_of, load_meta
from fpsc.kernels.triton.pack import E4M3_MAX, Q, V, permuted, wanted


@triton.jit
def load_scale(scale_ptr, tile, fp8):
    """Scale of a tile of Q; 1 in cells that are not FP8, or where there are no FP8 cells."""
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + tile, mask=fp8, other=1.0)
    return scale


@triton.jit
def widen_tiles(
    x_ptr, y_ptr, v_scale_ptr, modes_ptr, H, G, HEADS, TILES,
    DP: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """e4m3 tiles of FP8 cells -> tiles of the gradient's dtype [B, HEADS, TILES, BLOCK, DP].

    Q and K exactly, without their scales; V with those of its channels, and no longer transposed.
    x has H heads for Q, else G; where HEADS is more than G, query heads get copies of their own.
    """
    head, tile, b = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS, tl.program_id(1)
    if wanted(modes_ptr, b * H + head * (H // HEADS), H // HEADS, 1):
        row = b * HEADS + head
        x_heads = H if OPERAND == Q else G
        x_row = b * x_heads + head // (HEADS // x_heads)
        rows = tl.arange(0, BLOCK)
        d = tl.arange(0, DP)
        if OPERAND == V:
            x_ptr += x_row.to(tl.int64) * DP * TILES * BLOCK + tile * BLOCK
            at = d.to(tl.int64)[:, None] * (TILES * BLOCK) + rows[None, :]
            x = tl.load(x_ptr + at).to(tl.float32)
            x = tl.trans(x * tl.load(v_scale_ptr + x_row * DP + d)[:, None])
            to = permuted(rows) if PERMUTED else rows
        else:
            x_ptr += (x_row.to(tl.int64) * TILES + tile) * BLOCK * DP
            x = tl.load(x_ptr + rows[:, None] * DP + d[None, :]).to(tl.float32)
            to = rows
        y_ptr += (row.to(tl.int64) * TILES + tile) * BLOCK * DP
        tl.store(y_ptr + to[:, None] * DP + d[None, :], x.to(y_ptr.dtype.element_ty))


@triton.jit
def gradient_tiles(
    dout_ptr, out_ptr, lse_ptr, shift_ptr, dout_tiles_ptr, delta_ptr, lse2_ptr,
    modes_ptr, gather_ptr, valid_ptr,
    dout_b, dout_h, dout_n, out_b, out_h, out_n,
    H, N, TILES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What backward needs of its rows, in tile order: dO, delta = dO . O, and lse in base two.

    lse2 is of the scores as the kernels see them, without the shift. It is +inf, so that P is 0, in
    padding and where a query saw no key.
    """
    head, tile, b = tl.program_id(0) % H, tl.program_id(0) // H, tl.program_id(1)
    rows = tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    position = tl.load(gather_ptr + tile * BLOCK + rows).to(tl.int64)
    real = (rows < tl.load(valid_ptr + tile)) & (position >= 0) & (position < N)
    mask = real[:, None] & (d < D)[None, :]
    dout_ptr += b.to(tl.int64) * dout_b + head.to(tl.int64) * dout_h
    out_ptr += b.to(tl.int64) * out_b + head.to(tl.int64) * out_h
    dout = tl.load(dout_ptr + position[:, None] * dout_n + d[None, :], mask=mask, other=0.0)
    out = tl.load(out_ptr + position[:, None] * out_n + d[None, :], mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)

    row = b * H + head
    at = row.to(tl.int64) * N + position
    lse = tl.load(lse_ptr + at, mask=real, other=float("-inf"))
    if shift_ptr is not None:
        fp8 = tl.load(modes_ptr + row * 3 + 1) == 1
        lse -= tl.load(shift_ptr + at, mask=real & fp8, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)

    slot = (row.to(tl.int64) * TILES + tile) * BLOCK
    tl.store(delta_ptr + slot + rows, delta)
    tl.store(lse2_ptr + slot + rows, lse2)
    tl.store(dout_tiles_ptr + (slot + rows)[:, None] * DP + d[None, :], dout)


@triton.jit
def query_gradients(
    q_ptr, k_ptr, v_ptr, dout_ptr, q_scale_ptr, meta_ptr, delta_ptr, lse2_ptr, dq_ptr,
    modes_ptr, list_ptr, list_idx, visits_ptr, order_ptr, gather_ptr, valid_ptr,
    scale, B, H, G, N, TILES, PATTERNS, ENTRIES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, SKIP_FP8: tl.constexpr,
):  # fmt: skip
    """dq [B, H, N, D]. One program a part of a query tile of a head; see `gradient_tiles`.

    SKIP_FP8: dq of FP8 cells is not written.
    """
    QUERY_PARTS: tl.constexpr = BLOCK // BM
    KEY_PARTS: tl.constexpr = BLOCK // BN
    q_desc = tl.make_tensor_descriptor(q_ptr, [B * H * TILES * BLOCK, DP], [DP, 1], [BM, DP])
    dout_desc = tl.make_tensor_descriptor(dout_ptr, [B * H * TILES * BLOCK, DP], [DP, 1], [BM, DP])
    k_desc = tl.make_tensor_descriptor(k_ptr, [B * G * TILES * BLOCK, DP], [DP, 1], [BN, DP])
    v_desc = tl.make_tensor_descriptor(v_ptr, [B * G * TILES * BLOCK, DP], [DP, 1], [BN, DP])
    item = tl.program_id(0)
    head = item // (TILES * QUERY_PARTS)
    part = item % QUERY_PARTS
    pattern = tl.load(modes_ptr + head * 3)
    fp8 = tl.load(modes_ptr + head * 3 + 1) == 1
    active = True
    if SKIP_FP8:
        active = tl.load(modes_ptr + head * 3 + 1) != 1
    tile = tl.load(order_ptr + pattern * TILES + (item // QUERY_PARTS) % TILES)
    b, h = head // H, head % H
    key_head = b * G + h // (H // G)

    slot = (head * TILES + tile) * BLOCK + part * BM
    rows = part * BM + tl.arange(0, BM)
    q = q_desc.load([slot, 0])
    dout = dout_desc.load([slot, 0])
    delta = tl.load(delta_ptr + slot + tl.arange(0, BM))
    lse2 = tl.load(lse2_ptr + slot + tl.arange(0, BM))
    q_scale = scale * LOG2_E * load_scale(q_scale_ptr, head * TILES + tile, fp8)
    factor = tl.where(fp8, E4M3_MAX, 1.0)
    meta_ptr += key_head * TILES
    key_row = key_head * TILES * BLOCK
    columns = tl.arange(0, BN)

    list_idx, visits = list_of(
        list_ptr, list_idx, visits_ptr, b, pattern, tile, TILES, PATTERNS, ENTRIES
    )
    visits = tl.where(active, visits, 0)
    dq = tl.zeros([BM, DP], tl.float32)
    for j in tl.range(0, visits * KEY_PARTS, num_stages=STAGES):
        w = tl.load(list_idx + j // KEY_PARTS)
        row = w * BLOCK + (j % KEY_PARTS) * BN
        k_scale, weight = load_meta(meta_ptr, w)
        k_scale = tl.where(fp8, k_scale, 1.0)
        k = k_desc.load([key_row + row, 0])
        s = tl.dot(q, k.T)
        p = tl.math.exp2(s * (q_scale * k_scale) - lse2[:, None])
        keys = weight + (BLOCK - 1.0) - (j % KEY_PARTS) * BN
        if keys < BN:  # the last of a tile
            p = tl.where((columns < keys)[None, :], p, 0.0)
        v = v_desc.load([key_row + row, 0])
        dp = tl.dot(dout, v.T)
        unit = k_scale * factor
        ds = p * (dp * unit - (delta * unit)[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)

    dq *= scale / factor
    store_query_gradients(
        dq, dq_ptr, head, rows, active, gather_ptr + tile * BLOCK, valid_ptr + tile, N, D, DP
    )


@triton.jit
def store_query_gradients(
    dq, dq_ptr, head, rows, active, gather_ptr, valid_ptr, N, D: tl.constexpr, DP: tl.constexpr
):
    """Rows of dq where their tokens stand. gather, valid: of their tile."""
    position = tl.load(gather_ptr + rows).to(tl.int64)
    real = (rows < tl.load(valid_ptr)) & (position >= 0) & (position < N) & active
    channels = tl.arange(0, DP)
    to = dq_ptr + (head.to(tl.int64) * N + position)[:, None] * D + channels[None, :]
    mask = real[:, None] & (channels < D)[None, :]
    tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_gradients(
    q_ptr, k_ptr, v_ptr, dout_ptr, q_scale_ptr, meta_ptr, delta_ptr, lse2_ptr, dk_ptr, dv_ptr,
    modes_ptr, back_ptr, back_idx, order_ptr, gather_ptr, count_ptr, stride_gather, stride_count,
    scale, B, H, G, N, TILES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, SKIP_FP8: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, G, N, D]. One program a part of a key tile, for all query heads of its key head.

    gather, count: of the keys that take part; rows of other keys are not written. SKIP_FP8: nor
    are those of FP8 cells.
    """
    QUERY_PARTS: tl.constexpr = BLOCK // BM
    KEY_PARTS: tl.constexpr = BLOCK // BN
    q_desc = tl.make_tensor_descriptor(q_ptr, [B * H * TILES * BLOCK, DP], [DP, 1], [BM, DP])
    dout_desc = tl.make_tensor_descriptor(dout_ptr, [B * H * TILES * BLOCK, DP], [DP, 1], [BM, DP])
    k_desc = tl.make_tensor_descriptor(k_ptr, [B * G * TILES * BLOCK, DP], [DP, 1], [BN, DP])
    v_desc = tl.make_tensor_descriptor(v_ptr, [B * G * TILES * BLOCK, DP], [DP, 1], [BN, DP])
    item = tl.program_id(0)
    key_head = item // (TILES * KEY_PARTS)
    part = item % KEY_PARTS
    b = key_head // G
    first_head = b * H + (key_head % G) * (H // G)
    fp8 = tl.load(modes_ptr + first_head * 3 + 1) == 1  # the same for all heads of a key head
    active = True
    if SKIP_FP8:
        active = tl.load(modes_ptr + first_head * 3 + 1) != 1
    order = tl.load(modes_ptr + first_head * 3) * TILES + (item // KEY_PARTS) % TILES
    tile = tl.load(order_ptr + order)

    slot = (key_head * TILES + tile) * BLOCK + part * BN
    k = k_desc.load([slot, 0])
    v = v_desc.load([slot, 0])
    k_scale, _ = load_meta(meta_ptr, key_head * TILES + tile)
    k_scale = tl.where(fp8, k_scale, 1.0) * (scale * LOG2_E)
    factor = tl.where(fp8, E4M3_MAX, 1.0)

    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for head in range(first_head, first_head + tl.where(active, H // G, 0)):
        pattern = tl.load(modes_ptr + head * 3)
        first = tl.load(back_ptr + pattern * (TILES + 1) + tile)
        visits = tl.load(back_ptr + pattern * (TILES + 1) + tile + 1) - first
        for j in tl.range(0, visits * QUERY_PARTS, num_stages=STAGES):
            u = head * TILES + tl.load(back_idx + first + j // QUERY_PARTS)
            row = u * BLOCK + (j % QUERY_PARTS) * BM
            q_scale = load_scale(q_scale_ptr, u, fp8)
            lse2 = tl.load(lse2_ptr + row + tl.arange(0, BM))
            delta = tl.load(delta_ptr + row + tl.arange(0, BM))
            q = q_desc.load([row, 0])
            s = tl.dot(k, q.T)
            p = tl.math.exp2(s * (k_scale * q_scale) - lse2[None, :])
            dout = dout_desc.load([row, 0])
            dv = tl.dot(p.to(dout.dtype), dout, dv)
            dp = tl.dot(v, dout.T)
            unit = q_scale * factor
            ds = p * (dp * unit - (delta * unit)[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)

    dk *= scale / factor
    rows = part * BN + tl.arange(0, BN)
    real = rows < tl.load(count_ptr + b * stride_count + tile)
    at = gather_ptr + b * stride_gather + tile * BLOCK + rows
    position = tl.load(at, mask=real, other=-1).to(tl.int64)
    real = real & (position >= 0) & (position < N) & active
    channels = tl.arange(0, DP)
    to = (key_head.to(tl.int64) * N + position)[:, None] * D + channels[None, :]
    mask = real[:, None] & (channels < D)[None, :]
    tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=mask)
