"""From raster order to tile order: gather, normalise, rotate, quantise, in one pass.

Small kernels come first. `compact_keys` turns a key mask into lists of the keys of each tile that
take part, and `compact_lists` drops the tiles that have none, so that no product knows of masks.
`statistics` and `finish_statistics` find
the mean of K and the largest |V| of each channel, which one tile alone does not know.

In tile order a tile is BLOCK rows of DP channels, DP a power of two; channels beyond D are zero.
Rows beyond the tile's length are zero in Q and V, and in K copies of the first key
(`fpsc.kernels.triton.forward` says why).

Before anything else a row may be normalised and rotated: `fpsc.kernels.before` has the formulas.
What is not compiled in there is passed as

    rstd              float32 [B, N], where NORM is GIVEN: `token_statistics` finds it
    weight, bias      [WEIGHTS, C], C = stride_weight; the second row is for tokens from `split`
    cos, sin          [B, heads, length, D or where not WIDE D / 2], strides zero where shared; the
                      first row is that of token `first`
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)

# Which operand a program packs.
Q = tl.constexpr(0)
K = tl.constexpr(1)
V = tl.constexpr(2)

# Kinds of norm and of rotation.
NONE = tl.constexpr(0)
PER_HEAD = tl.constexpr(1)  # the statistic is that of the row's own D channels
GIVEN = tl.constexpr(2)  # the statistic of every token is an input
LAYER = tl.constexpr(3)  # as PER_HEAD, less the mean
INTERLEAVED = tl.constexpr(1)
HALF_SPLIT = tl.constexpr(2)


@triton.jit
def finite_or_nan(x):
    """x, with NaN in place of infinities."""
    return x + (x - x)


@triton.jit
def magnitude(x):
    """|x|, with zero in place of NaN."""
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def scale_of(largest):
    """largest / 448, or 1 where that is zero (or so small that float32 holds it badly)."""
    s = largest / E4M3_MAX
    return tl.where(s >= SMALLEST_SCALE, s, 1.0)


@triton.jit
def permuted(column):
    """Which key stands at a column of V where V is permuted.

    Bits of a place in a group of 16 columns, lowest first: k0 k1 k2 k3 holds key k0 k2 k3 k1.
    """
    return (column & ~15) | (column & 1) | ((column >> 1) & 6) | ((column << 2) & 8)


@triton.jit
def channel_of(column, D: tl.constexpr, DP: tl.constexpr, ROTATION: tl.constexpr):
    """Which channel stands at a column of what `load_rows` gives.

    The column itself, but where pairs are half a head apart: there the two halves of DP columns
    hold the two halves of D channels, each with its share of the padding.
    """
    if ROTATION != HALF_SPLIT or D == DP:
        return column
    half, place = column // (DP // 2), column % (DP // 2)
    inside = place < D // 2
    padding = D + half * (DP // 2 - D // 2) + place - D // 2
    return tl.where(inside, half * (D // 2) + place, padding)


@triton.jit
def load_channels(ptr, d, position, split, stride, D: tl.constexpr, WEIGHTS: tl.constexpr):
    """float32 [ROWS or 1, DP] of a weight or a bias."""
    found = tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if WEIGHTS == 2:
        second = tl.load(ptr + stride + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        found = tl.where((position >= split)[:, None], second, found)
    return found


@triton.jit
def pairs_of(x, ROWS: tl.constexpr, DP: tl.constexpr, ROTATION: tl.constexpr):
    """Both channels of every pair, [ROWS, DP / 2] each; columns as `channel_of` has them."""
    if ROTATION == INTERLEAVED:
        return tl.split(tl.reshape(x, [ROWS, DP // 2, 2]))
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, DP // 2]), [0, 2, 1]))


@triton.jit
def load_rows(
    x_ptr, stride_n, position, real,
    rstd_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, epsilon, stride_weight, split,
    stride_table, first, length,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr,
    ROTATION: tl.constexpr, WEIGHTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, DP] of the tokens at `position`, zero where not `real`; see `channel_of`."""
    column = tl.arange(0, DP)
    d = channel_of(column, D, DP, ROTATION)
    mask = real[:, None] & (d < D)[None, :]
    at = position[:, None] * stride_n + d[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if NORM == LAYER:
        x = tl.where(mask, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    if (NORM == PER_HEAD) | (NORM == LAYER):
        x *= tl.rsqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]
    if NORM == GIVEN:
        x *= tl.load(rstd_ptr + position, mask=real, other=0.0)[:, None]
    if NORM != NONE and weight_ptr is not None:
        x *= load_channels(weight_ptr, d, position, split, stride_weight, D, WEIGHTS)
    if NORM != NONE and bias_ptr is not None:
        bias = load_channels(bias_ptr, d, position, split, stride_weight, D, WEIGHTS)
        x = tl.where(mask, x + bias, 0.0)
    if ROTATION != NONE:
        row = position - first
        turned = real & (row >= 0) & (row < length)
        if WIDE:
            inside = turned[:, None] & (d < D)[None, :]
            angle = row[:, None] * stride_table + d[None, :]
        else:
            pair = tl.arange(0, DP // 2)
            inside = turned[:, None] & (pair < D // 2)[None, :]
            angle = row[:, None] * stride_table + pair[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        a, b = pairs_of(x, ROWS, DP, ROTATION)
        if WIDE:
            cos_a, cos_b = pairs_of(cos, ROWS, DP, ROTATION)
            sin_a, sin_b = pairs_of(sin, ROWS, DP, ROTATION)
            both = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
        else:
            both = tl.join(a * cos - b * sin, a * sin + b * cos)
        if ROTATION == HALF_SPLIT:
            both = tl.permute(both, [0, 2, 1])
        x = tl.reshape(both, [ROWS, DP])
    return finite_or_nan(x)


@triton.jit
def token_statistics(
    x_ptr, rstd_ptr, x_b, x_h, x_n, epsilon, HEADS, N,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean(x^2) + epsilon) over all channels of all heads, float32 [B, N]."""
    b = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    x_ptr += b.to(tl.int64) * x_b
    at = n.to(tl.int64)[:, None] * x_n + d[None, :]
    mask = (n < N)[:, None] & (d < D)[None, :]
    total = tl.zeros([ROWS], tl.float32)
    for head in range(HEADS):
        x = tl.load(x_ptr + head * x_h + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(rstd_ptr + b * N + n, tl.rsqrt(total / (HEADS * D) + epsilon), mask=n < N)


@triton.jit
def wanted(modes_ptr, first_head, HEADS_EACH, KIND: tl.constexpr):
    """Whether one of some neighbouring heads has this kind of cell."""
    found = 0
    for i in range(HEADS_EACH):
        found |= (tl.load(modes_ptr + (first_head + i) * 3 + 1) == KIND).to(tl.int32)
    return found != 0


@triton.jit
def grouping_of(modes_ptr, first_head, HEADS_EACH):
    """The grouping of some neighbouring heads: the lowest of those with FP8 cells."""
    found = 1 << 30
    for i in range(HEADS_EACH):
        fp8 = tl.load(modes_ptr + (first_head + i) * 3 + 1) == 1
        grouping = tl.load(modes_ptr + (first_head + i) * 3 + 2)
        found = tl.where(fp8, tl.minimum(found, grouping), found)
    return found


@triton.jit
def compact_keys(
    gather_ptr, valid_ptr, mask_ptr, key_gather_ptr, key_count_ptr,
    stride_mask, N, TILES, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys of a tile that a mask leaves in, first and in their order.

    gather [TILES, BLOCK], valid [TILES], mask uint8 [B, N] -> key_gather [B, TILES, BLOCK],
    key_count [B, TILES]. The rest of a list is not written.
    """
    tile, b = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK)
    real = rows < tl.load(valid_ptr + tile)
    position = tl.load(gather_ptr + tile * BLOCK + rows)
    real = real & (position >= 0) & (position < N)
    kept = tl.load(mask_ptr + b.to(tl.int64) * stride_mask + position, mask=real, other=0) != 0
    rank = tl.cumsum(kept.to(tl.int32), 0) - 1
    row = b * TILES + tile
    tl.store(key_gather_ptr + row * BLOCK + rank, position, mask=kept)
    tl.store(key_count_ptr + row, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def compact_lists(
    list_ptr, list_idx, key_count_ptr, visits_ptr, kept_ptr, TILES, ENTRIES, WIDTH: tl.constexpr
):  # fmt: skip
    """The lists of a batch element without key tiles that have no key left.

    list_ptr [PATTERNS, TILES + 1], list_idx [ENTRIES], key_count [B, TILES] -> kept [B, ENTRIES],
    every list where it was, and visits [B, PATTERNS, TILES], how long it is now.
    """
    tile, pattern, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(list_ptr + pattern * (TILES + 1) + tile)
    last = tl.load(list_ptr + pattern * (TILES + 1) + tile + 1)
    kept_ptr += b.to(tl.int64) * ENTRIES + first
    visits = 0
    for start in range(first, last, WIDTH):
        i = start + tl.arange(0, WIDTH)
        w = tl.load(list_idx + i, mask=i < last, other=0)
        keep = tl.load(key_count_ptr + b * TILES + w, mask=i < last, other=0) > 0
        rank = visits + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept_ptr + rank, w, mask=keep)
        visits += tl.sum(keep.to(tl.int32), 0)
    tl.store(visits_ptr + (b * tl.num_programs(1) + pattern) * TILES + tile, visits)


@triton.jit
def statistics(
    k_ptr, v_ptr, mask_ptr, modes_ptr, partial_ptr,
    k_b, k_h, k_n, v_b, v_h, v_n, stride_mask,
    rstd_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, epsilon, stride_weight, split,
    stride_table_b, stride_table_h, stride_table, first, length,
    H, G, N, CHUNK,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, ROTATION: tl.constexpr, NORM_STRIDE: tl.constexpr, WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Of one stretch of CHUNK tokens: sum of the finite rows of K, their number, largest |V|.

    partial: float32 [B, G, chunks, 3, DP].
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    b, g = head // G, head % G
    if wanted(modes_ptr, b * H + g * (H // G), H // G, 1):
        k_ptr += b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
        v_ptr += b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
        if NORM == GIVEN:
            rstd_ptr += b * N
        if weight_ptr is not None:
            weight_ptr += g * NORM_STRIDE
        if bias_ptr is not None:
            bias_ptr += g * NORM_STRIDE
        if ROTATION != NONE:
            table = b.to(tl.int64) * stride_table_b + g.to(tl.int64) * stride_table_h
            cos_ptr += table
            sin_ptr += table
        total = tl.zeros([DP], tl.float32)
        count = tl.zeros([DP], tl.float32)
        largest = tl.zeros([DP], tl.float32)
        for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, N), ROWS):
            n = start + tl.arange(0, ROWS)
            real = (n < N) & (n < (chunk + 1) * CHUNK)
            n = n.to(tl.int64)
            if mask_ptr is not None:
                mask = tl.load(mask_ptr + b.to(tl.int64) * stride_mask + n, mask=real, other=0)
                real = real & (mask != 0)
            k = load_rows(
                k_ptr, k_n, n, real,
                rstd_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, epsilon, stride_weight, split,
                stride_table, first, length,
                ROWS, D, DP, NORM, ROTATION, WEIGHTS, WIDE,
            )  # fmt: skip
            finite = real & (tl.max((k != k).to(tl.int32), 1) == 0)
            total += tl.sum(tl.where(finite[:, None], k, 0.0), 0)
            count += tl.sum(finite.to(tl.float32), 0)
            v = load_rows(
                v_ptr, v_n, n, real, None, None, None, None, None, 0.0, 0, 0, 0, 0, 0,
                ROWS, D, DP, NONE, NONE, 1, False,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(magnitude(v), 0))
        d = channel_of(tl.arange(0, DP), D, DP, ROTATION)
        v_d = tl.arange(0, DP)
        partial_ptr += (head.to(tl.int64) * tl.num_programs(0) + chunk) * 3 * DP
        tl.store(partial_ptr + d, total)
        tl.store(partial_ptr + DP + d, count)
        tl.store(partial_ptr + 2 * DP + v_d, largest)


@triton.jit
def finish_statistics(
    partial_ptr, modes_ptr, mean_ptr, v_scale_ptr, H, G, CHUNKS,
    DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean of K and scale of V, float32 [B, G, DP], from the partial results."""
    head = tl.program_id(0)
    b, g = head // G, head % G
    if wanted(modes_ptr, b * H + g * (H // G), H // G, 1):
        d = tl.arange(0, DP)
        total = tl.zeros([DP], tl.float32)
        count = tl.zeros([DP], tl.float32)
        largest = tl.zeros([DP], tl.float32)
        for start in range(0, CHUNKS, ROWS):
            chunk = start + tl.arange(0, ROWS)
            at = partial_ptr + (head * CHUNKS + chunk).to(tl.int64)[:, None] * (3 * DP) + d[None, :]
            real = (chunk < CHUNKS)[:, None]
            total += tl.sum(tl.load(at, mask=real, other=0.0), 0)
            count += tl.sum(tl.load(at + DP, mask=real, other=0.0), 0)
            largest = tl.maximum(largest, tl.max(tl.load(at + 2 * DP, mask=real, other=0.0), 0))
        tl.store(mean_ptr + head * DP + d, total / tl.maximum(count, 1.0))
        tl.store(v_scale_ptr + head * DP + d, scale_of(largest))


@triton.jit
def group_maxima(
    x_ptr, mean_ptr, modes_ptr, groups_ptr, gather_ptr, count_ptr, largest_ptr,
    x_b, x_h, x_n, stride_gather, stride_count,
    rstd_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, epsilon, stride_weight, split,
    stride_table_b, stride_table_h, stride_table, first, length,
    H, G, N, TILES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr,
    NORM: tl.constexpr, ROTATION: tl.constexpr, NORM_STRIDE: tl.constexpr, WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Largest |q|, or |k - mean|, of every group of tiles that share a scale.

    largest: float32 [B, heads, TILES], zero before; the place of a group is its number. Tiles that
    share with no other are left to `pack_tiles`, which is most often all of them: so there are few
    programs, each of which takes one tile in so many of a head.
    """
    HEADS = H if OPERAND == Q else G
    row = tl.program_id(1)
    b, head = row // HEADS, row % HEADS
    first_head = b * H + head * (H // HEADS)
    grouping = grouping_of(modes_ptr, first_head, H // HEADS)
    if wanted(modes_ptr, first_head, H // HEADS, 1) & (grouping != 0):
        x_ptr += b.to(tl.int64) * x_b + head.to(tl.int64) * x_h
        if NORM == GIVEN:
            rstd_ptr += b * N
        if weight_ptr is not None:
            weight_ptr += head * NORM_STRIDE
        if bias_ptr is not None:
            bias_ptr += head * NORM_STRIDE
        if ROTATION != NONE:
            table = b.to(tl.int64) * stride_table_b + head.to(tl.int64) * stride_table_h
            cos_ptr += table
            sin_ptr += table
        rows = tl.arange(0, BLOCK)
        # What is the same for every tile would spill if it stayed in registers.
        for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), disable_licm=True):
            real = rows < tl.load(count_ptr + b * stride_count + tile)
            at = gather_ptr + b * stride_gather + tile * BLOCK + rows
            position = tl.load(at, mask=real, other=0)
            real = real & (position >= 0) & (position < N)
            x = load_rows(
                x_ptr, x_n, position.to(tl.int64), real,
                rstd_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, epsilon, stride_weight, split,
                stride_table, first, length,
                BLOCK, D, DP, NORM, ROTATION, WEIGHTS, WIDE,
            )  # fmt: skip
            if OPERAND == K:
                d = channel_of(tl.arange(0, DP), D, DP, ROTATION)
                mean = tl.load(mean_ptr + row * DP + d)
                x = tl.where(real[:, None], x - mean[None, :], 0.0)
            largest = tl.max(tl.max(magnitude(x), 1), 0)
            group = tl.load(groups_ptr + grouping * TILES + tile)
            tl.atomic_max(largest_ptr + row * TILES + group, largest)


@triton.jit
def pack_tiles(
    x_ptr, y_ptr, scale_ptr, meta_ptr, mean_ptr, v_scale_ptr, shift_ptr,
    modes_ptr, groups_ptr, largest_ptr, gather_ptr, count_ptr,
    x_b, x_h, x_n, stride_gather, stride_count,
    rstd_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, epsilon, stride_weight, split,
    stride_table_b, stride_table_h, stride_table, first, length,
    softmax_scale, H, G, N, TILES,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr,
    FP8: tl.constexpr, PERMUTED: tl.constexpr,
    NORM: tl.constexpr, ROTATION: tl.constexpr, NORM_STRIDE: tl.constexpr, WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of one head of Q, K or V, for cells of one kind.

    x [B, heads, N, D] with any strides but the last -> y, tile order [B, heads, TILES, BLOCK, DP];
    V of FP8 cells [B, G, DP, TILES * BLOCK]. K also writes its meta (`forward.load_meta`); Q of FP8
    cells its scale [B, H, TILES], and shift [B, H, N], what the mean of K took from its scores. The
    sign of `softmax_scale` goes into Q. gather, count: of queries, or of the keys that take part;
    strides are zero where all batch elements share them.
    """
    HEADS = H if OPERAND == Q else G
    head, tile = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    b = tl.program_id(1)
    first_head = b * H + head * (H // HEADS)
    if wanted(modes_ptr, first_head, H // HEADS, FP8):
        rows = tl.arange(0, BLOCK)
        d = channel_of(tl.arange(0, DP), D, DP, ROTATION)
        source = permuted(rows) if PERMUTED else rows
        count = tl.load(count_ptr + b * stride_count + tile)
        real = source < count
        if OPERAND == K:
            source = tl.where(real, source, 0)
            real = rows < BLOCK * tl.minimum(count, 1)  # no key: zero, and finite
        position = tl.load(
            gather_ptr + b * stride_gather + tile * BLOCK + source, mask=real, other=0
        )
        real = real & (position >= 0) & (position < N)
        position = position.to(tl.int64)
        x_ptr += b.to(tl.int64) * x_b + head.to(tl.int64) * x_h
        if NORM == GIVEN:
            rstd_ptr += b * N
        if weight_ptr is not None:
            weight_ptr += head * NORM_STRIDE
        if bias_ptr is not None:
            bias_ptr += head * NORM_STRIDE
        if ROTATION != NONE:
            table = b.to(tl.int64) * stride_table_b + head.to(tl.int64) * stride_table_h
            cos_ptr += table
            sin_ptr += table
        x = load_rows(
            x_ptr, x_n, position, real,
            rstd_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, epsilon, stride_weight, split,
            stride_table, first, length,
            BLOCK, D, DP, NORM, ROTATION, WEIGHTS, WIDE,
        )  # fmt: skip
        row = b * HEADS + head
        scale = 1.0
        if FP8:
            if OPERAND == V:
                x /= tl.load(v_scale_ptr + row * DP + d)[None, :]
            else:
                mean = tl.load(mean_ptr + (b * G + head // (HEADS // G)) * DP + d)
                if OPERAND == Q:
                    shift = softmax_scale * tl.sum(x * mean[None, :], 1)
                    tl.store(shift_ptr + row.to(tl.int64) * N + position, shift, mask=real)
                else:
                    x = tl.where(real[:, None], x - mean[None, :], 0.0)
                largest = tl.max(tl.max(magnitude(x), 1), 0)
                grouping = grouping_of(modes_ptr, first_head, H // HEADS)
                if grouping != 0:
                    group = tl.load(groups_ptr + grouping * TILES + tile)
                    largest = tl.load(largest_ptr + row * TILES + group)
                scale = scale_of(largest)
                x /= scale
            # NaN stays, and nothing else is beyond 448 but by a rounding of the division.
            x = tl.where(x == x, tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX), x)
        if OPERAND == Q:
            x = tl.where(softmax_scale < 0.0, -x, x)
            if FP8:
                tl.store(scale_ptr + row * TILES + tile, scale)
        if OPERAND == K:
            meta_ptr += (row * TILES + tile) * 2
            tl.store(meta_ptr, scale)
            tl.store(meta_ptr + 1, (count - (BLOCK - 1)).to(tl.float32))
        y = x.to(y_ptr.dtype.element_ty)
        if FP8 and OPERAND == V:
            y_ptr += row.to(tl.int64) * DP * TILES * BLOCK + tile * BLOCK
            tl.store(y_ptr + d.to(tl.int64)[:, None] * (TILES * BLOCK) + rows[None, :], tl.trans(y))
        else:
            y_ptr += (row.to(tl.int64) * TILES + tile) * BLOCK * DP
            tl.store(y_ptr + rows[:, None] * DP + d[None, :], y)
