"""The forward kernel of FP8 cells on Hopper, in Gluon: what `fpsc.kernels.triton.forward` computes.

Operands, lists and results are the same, and so are the formulas; the docstring there says why they
are what they are. Here each warp has its role, and waits for nobody but where this file says so:

*A producer*, one warp, copies Q, K and V of one item after another into shared memory (TMA). It is
ahead of the others by as many key tiles as there are stages, across the ends of items too.

*Two consumers*, warp groups of 64 rows of the query tile each. While one is busy with exponentials,
the other has the tensor cores: they issue products in turns. Inside a consumer the products P V of
one key tile run while the exponentials of the next are computed (`visit_tiles`), or two key tiles
are taken at a time, with fewer instructions and without that overlap (`visit_pairs`).

Barriers, each with the number of arrivals that complete a phase of it:

| barrier | of each | arrivals | completed by | awaited by |
|---|---|---|---|---|
| q_full | buffer of Q | 1, and the bytes | producer, TMA | both consumers |
| q_empty | buffer of Q | 2 | both consumers, after an item's last product with Q | producer |
| full | stage of K and V | 1, and the bytes | producer, TMA | both consumers |
| empty | stage of K and V | 2 | both consumers, after the product with V | producer |
| turns | consumer | 1 | the other consumer, once it has issued its products | that consumer |

Who waits for phase n of a ring of barriers looks at barrier n % size for the parity of n // size;
who waits for a free place, at the phase before. `tests/kernels/test_gluon.py` runs this very source
under random schedules, and takes away one wait or arrival after the other.

*P needs no exchange between lanes.* A lane holds two neighbouring columns of an accumulator, but
four neighbouring keys of an FP8 operand. So the rows of K are copied in another order, by two
copies: first the keys 4 i and 4 i + 1, then 4 i + 2 and 4 i + 3. V lies as it does for all others.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.0e38)
P_OFFSET = gl.constexpr(8.0)  # m is less by it: P is at most 2^8 = 256, and e4m3 holds 448

BLOCK = gl.constexpr(128)  # rows of a tile
ROWS = gl.constexpr(64)  # of them, a consumer's
Q_BUFFERS = gl.constexpr(2)
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)

# P as the operand of a product: [rows, keys / 4, 4], four keys in a register.
QUADS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [8, 0, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
        lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 32, 4],
    )
)


def shared_layout(block: list[int]) -> gl.NVMMASharedLayout:
    """Of a block of e4m3 in shared memory: rows of 64 or 128 bytes, swizzled over all of a row."""
    return gl.NVMMASharedLayout(swizzle_byte_width=block[-1], element_bitwidth=8, rank=len(block))


@gluon.jit
def load_item(work_ptr, item):
    """Head (of all batch elements), tile, start and length of its list: `schedule.list_work`."""
    work_ptr += item * 4
    return gl.load(work_ptr), gl.load(work_ptr + 1), gl.load(work_ptr + 2), gl.load(work_ptr + 3)


@gluon.jit
def copy_tiles(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
    work_ptr, list_idx, items, H, G, TILES, DP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer."""
    taken = 0  # items
    visited = 0  # key tiles, of all items
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head, tile, first, visits = load_item(work_ptr, item)
        key_head = head // H * G + head % H // (H // G)
        row = (head * TILES + tile) * BLOCK
        buffer = taken % Q_BUFFERS
        mbarrier.wait(q_empty.index(buffer), (taken // Q_BUFFERS + 1) & 1)
        mbarrier.expect(q_full.index(buffer), BLOCK * DP)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                q_desc,
                [row + half * ROWS, 0],
                q_full.index(buffer),
                q_smem.index(2 * buffer + half),
            )
        for j in range(visits):
            key_tile = key_head * TILES + gl.load(list_idx + first + j)
            column = (key_tile - key_head * TILES) * BLOCK
            stage = visited % STAGES
            mbarrier.wait(empty.index(stage), (visited // STAGES + 1) & 1)
            mbarrier.expect(full.index(stage), 2 * BLOCK * DP)
            for bit in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    k_desc, [key_tile * (BLOCK // 4), bit, 0, 0], full.index(stage),
                    k_smem.index(2 * stage + bit),
                )  # fmt: skip
            tma.async_copy_global_to_shared(
                v_desc, [key_head * DP, column], full.index(stage), v_smem.index(stage)
            )
            visited += 1
        taken += 1  # noqa: SIM113


@gluon.jit
def quads_of(p):
    """e4m3 of P, four keys in an int32: so it is carried by a loop without being taken apart."""
    p = p.reshape([ROWS, 2, BLOCK // 4, 2]).permute([0, 2, 1, 3])
    even, odd = gl.split(p)
    p0, p2 = gl.split(even)
    p1, p3 = gl.split(odd)
    quads = gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r",
        [p0, p1, p2, p3],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    return gl.convert_layout(quads, gl.SliceLayout(2, QUADS), assert_trivial=True)


@gluon.jit
def operand_of(quads, LAYOUT: gl.constexpr):
    """The operand that `quads_of` packed: four copies of a register become its four keys."""
    copies = quads[:, :, None] + gl.zeros([ROWS, BLOCK // 4, 4], gl.int32, QUADS)
    p = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [copies], dtype=gl.float8e4nv, is_pure=True, pack=4
    )
    return gl.convert_layout(p.reshape([ROWS, BLOCK]), LAYOUT, assert_trivial=True)


@gluon.jit
def lane_sums(p):
    """Sums of P over what a lane holds of a row: [rows, 4]. The lanes are added up at the end."""
    return gl.sum(gl.sum(p.reshape([ROWS, BLOCK // 8, 4, 2]), 3), 1)


@gluon.jit
def scale_of(meta, q_scale):
    """By what scores are multiplied, and the weight of the last column of a tile.

    meta: see `fpsc.kernels.triton.forward.load_meta`.
    """
    c = q_scale * meta.to(gl.uint32).to(gl.float32, bitcast=True)
    return c, (meta >> 32).to(gl.uint32).to(gl.float32, bitcast=True)


@gluon.jit
def weigh(s, c, last, m, LAYOUT: gl.constexpr):
    """P of a key tile, and its sums."""
    p = gl.exp2(s * c - m[:, None])
    is_last = gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT)) == BLOCK - 1
    return p, lane_sums(gl.where(is_last[None, :], p * last, p))


@gluon.jit
def rescaled(total, alpha, sums):
    by_row: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    return total * gl.convert_layout(alpha, by_row)[:, None] + sums


@gluon.jit
def weigh_tile(s, meta, q_scale, m, total, LAYOUT: gl.constexpr):
    """P of a key tile, the new m, by what all before is multiplied, and the new sums."""
    c, last = scale_of(meta, q_scale)
    new_m = gl.maximum(m, gl.ceil(gl.max(s, 1) * c - P_OFFSET))
    alpha = gl.exp2(m - new_m)
    p, sums = weigh(s, c, last, new_m, LAYOUT)
    return p, new_m, alpha, rescaled(total, alpha, sums)


@gluon.jit
def visit_tiles(
    me: gl.constexpr, q, k_smem, v_smem, full, empty, turns, metas, list_ptr, q_scale, visits,
    visited, total, no_s, no_acc, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer's way through a list that is not empty: m, sums, output and `visited`.

    P V of a tile runs beside the exponentials of the next.
    """
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=4)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    other: gl.constexpr = 1 - me
    m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = no_acc
    meta = gl.load(metas + gl.load(list_ptr))
    next_tile = gl.load(list_ptr + gl.minimum(1, visits - 1))
    stage = visited % STAGES
    mbarrier.wait(full.index(stage), (visited // STAGES) & 1)
    mbarrier.wait(turns.index(me), (visited + 1 - me) & 1)
    s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), no_s, use_acc=False, is_async=True)
    mbarrier.arrive(turns.index(other), count=1)
    s = warpgroup_mma_wait(0, deps=(s,))
    next_meta = gl.load(metas + next_tile)
    next_tile = gl.load(list_ptr + gl.minimum(2, visits - 1))
    p, m, alpha, total = weigh_tile(s, meta, q_scale, m, total, S_LAYOUT)
    quads = quads_of(p)
    meta = next_meta
    visited += 1
    mbarrier.wait(full.index(visited % STAGES), (visited // STAGES) & 1, pred=visits > 1)
    for j in range(1, visits):
        stage = visited % STAGES
        before = (visited - 1) % STAGES
        mbarrier.wait(turns.index(me), (visited + 1 - me) & 1)
        s = warpgroup_mma(
            q, k_smem.index(stage).permute((1, 0)), no_s, use_acc=False, is_async=True
        )
        product = warpgroup_mma(
            operand_of(quads, P_LAYOUT), v_smem.index(before).permute((1, 0)), no_acc,
            use_acc=False, is_async=True,
        )  # fmt: skip
        mbarrier.arrive(turns.index(other), count=1)
        s = warpgroup_mma_wait(1, deps=(s,))
        # Of the tile after this one, and the one after that: no load waits for another.
        next_meta = gl.load(metas + next_tile)
        next_tile = gl.load(list_ptr + gl.minimum(j + 2, visits - 1))
        old_alpha = alpha
        p, m, alpha, total = weigh_tile(s, meta, q_scale, m, total, S_LAYOUT)
        meta = next_meta
        visited += 1
        # Here, because the assembler would take the wait for the product over all of the above if
        # nothing that branches stood in between.
        mbarrier.wait(full.index(visited % STAGES), (visited // STAGES) & 1, pred=j + 1 < visits)
        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(before), count=1)
        acc = acc * gl.convert_layout(old_alpha, O_ROWS)[:, None] + product
        quads = quads_of(p)
    before = (visited - 1) % STAGES
    product = warpgroup_mma(
        operand_of(quads, P_LAYOUT), v_smem.index(before).permute((1, 0)), no_acc,
        use_acc=False, is_async=True,
    )  # fmt: skip
    product = warpgroup_mma_wait(0, deps=(product,))
    mbarrier.arrive(empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None] + product
    return m, total, acc, visited


@gluon.jit
def visit_pairs(
    me: gl.constexpr, q, k_smem, v_smem, full, empty, turns, metas, list_ptr, q_scale, visits,
    visited, turn, total, no_s, no_acc, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As `visit_tiles`, two tiles at a time: half the maxima and rescaling, and no overlap but that
    with the other consumer, for there are no registers. A last tile without a second one is taken
    twice, its weights then zero.
    """
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=4)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    other: gl.constexpr = 1 - me
    m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = no_acc
    next_first = gl.load(list_ptr)
    next_second = gl.load(list_ptr + gl.minimum(1, visits - 1))
    for j in range(0, visits, 2):
        both = j + 1 < visits
        meta, second_meta = gl.load(metas + next_first), gl.load(metas + next_second)
        next_first = gl.load(list_ptr + gl.minimum(j + 2, visits - 1))
        next_second = gl.load(list_ptr + gl.minimum(j + 3, visits - 1))
        stage = visited % STAGES
        second = (visited + both.to(gl.int32)) % STAGES
        mbarrier.wait(full.index(stage), (visited // STAGES) & 1)
        mbarrier.wait(full.index(second), ((visited + 1) // STAGES) & 1, pred=both)
        mbarrier.wait(turns.index(me), (turn + 1 - me) & 1)
        s = warpgroup_mma(
            q, k_smem.index(stage).permute((1, 0)), no_s, use_acc=False, is_async=True
        )
        second_s = warpgroup_mma(
            q, k_smem.index(second).permute((1, 0)), no_s, use_acc=False, is_async=True
        )
        mbarrier.arrive(turns.index(other), count=1)
        s, second_s = warpgroup_mma_wait(0, deps=(s, second_s))
        c, last = scale_of(meta, q_scale)
        second_c, second_last = scale_of(second_meta, q_scale)
        largest = gl.maximum(gl.max(s, 1) * c, gl.max(second_s, 1) * second_c)
        new_m = gl.maximum(m, gl.ceil(largest - P_OFFSET))
        alpha = gl.exp2(m - new_m)
        m = new_m
        p, sums = weigh(s, c, last, m, S_LAYOUT)
        quads = quads_of(p)
        second_m = gl.where(both, m, -LOWEST)  # beside a list's end every weight is zero
        p, second_sums = weigh(second_s, second_c, second_last, second_m, S_LAYOUT)
        second_quads = quads_of(p)
        total = rescaled(total, alpha, sums + second_sums)
        product = warpgroup_mma(
            operand_of(quads, P_LAYOUT), v_smem.index(stage).permute((1, 0)), no_acc,
            use_acc=False, is_async=True,
        )  # fmt: skip
        product = warpgroup_mma(
            operand_of(second_quads, P_LAYOUT), v_smem.index(second).permute((1, 0)), product,
            is_async=True,
        )  # fmt: skip
        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(stage), count=1)
        mbarrier.arrive(empty.index(second), count=1, pred=both)
        acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None] + product
        visited += 1 + both.to(gl.int32)
        turn += 1
    return m, total, acc, visited, turn


@gluon.jit
def attend_rows(
    me: gl.constexpr, buffers, tensors, sizes,
    D: gl.constexpr, DP: gl.constexpr, STAGES: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """A consumer, 0 or 1."""
    q_smem, k_smem, v_smem, q_full, q_empty, full, empty, turns = buffers
    (
        q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr, offset_ptr, work_ptr,
        list_idx, gather_ptr, valid_ptr,
    ) = tensors  # fmt: skip
    items, scale, H, G, N, TILES = sizes
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 32]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DP, 32]
    )
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=DP, element_bitwidth=8, rank=2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    k_smem = k_smem._reinterpret(gl.float8e4nv, [STAGES, BLOCK, DP], K_LAYOUT)
    no_s = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    no_acc = gl.zeros([ROWS, DP], gl.float32, O_LAYOUT)

    taken = 0  # items
    visited = 0  # key tiles, of all items
    turn = 0  # pairs of them
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head, tile, first, visits = load_item(work_ptr, item)
        b, h = head // H, head % H
        key_head = b * G + h // (H // G)
        q_scale = scale * LOG2_E * gl.load(q_scale_ptr + head * TILES + tile)
        metas = meta_ptr + key_head * TILES
        buffer = taken % Q_BUFFERS
        q = q_smem.index(2 * buffer + me)
        mbarrier.wait(q_full.index(buffer), (taken // Q_BUFFERS) & 1)
        m = gl.full([ROWS], LOWEST, gl.float32, S_ROWS)
        total = lane_sums(no_s)
        acc = no_acc
        if visits > 0:
            if PAIRS:
                m, total, acc, visited, turn = visit_pairs(
                    me, q, k_smem, v_smem, full, empty, turns, metas, list_idx + first, q_scale,
                    visits, visited, turn, total, no_s, no_acc, S_LAYOUT, O_LAYOUT, STAGES,
                )  # fmt: skip
            else:
                m, total, acc, visited = visit_tiles(
                    me, q, k_smem, v_smem, full, empty, turns, metas, list_idx + first, q_scale,
                    visits, visited, total, no_s, no_acc, S_LAYOUT, O_LAYOUT, STAGES,
                )  # fmt: skip
        mbarrier.arrive(q_empty.index(buffer), count=1)
        taken += 1  # noqa: SIM113

        denominator = gl.convert_layout(gl.sum(total, 1), S_ROWS)
        seen = denominator != 0.0
        denominator = gl.where(seen, denominator, 1.0)
        acc = acc / gl.convert_layout(denominator, O_ROWS)[:, None]
        channel = gl.arange(0, DP, gl.SliceLayout(0, O_LAYOUT))
        acc *= gl.load(v_scale_ptr + key_head * DP + channel)[None, :]
        position, real = positions(me, tile, gather_ptr, valid_ptr, N, S_ROWS)
        lse = gl.where(seen, (m + gl.log2(denominator)) * LN_2, float("-inf"))
        at = head.to(gl.int64) * N + position
        lse += gl.load(shift_ptr + at, mask=real, other=0.0)
        gl.store(lse_ptr + at, lse, mask=real)
        if offset_ptr is not None:
            gl.store(offset_ptr + at, m, mask=real)
        position, real = positions(me, tile, gather_ptr, valid_ptr, N, gl.SliceLayout(1, STORED))
        channel = gl.arange(0, DP, gl.SliceLayout(0, STORED))
        at = ((b.to(gl.int64) * N + position) * H + h) * D
        gl.store(
            out_ptr + at[:, None] + channel[None, :],
            gl.convert_layout(acc.to(out_ptr.dtype.element_ty), STORED),
            mask=real[:, None] & (channel < D)[None, :],
        )


@gluon.jit
def positions(me: gl.constexpr, tile, gather_ptr, valid_ptr, N, LAYOUT: gl.constexpr):
    """Where a consumer's rows stand in the sequence, and which of them do."""
    row = me * ROWS + gl.arange(0, ROWS, LAYOUT)
    position = gl.load(gather_ptr + tile * BLOCK + row).to(gl.int64)
    return position, (row < gl.load(valid_ptr + tile)) & (position >= 0) & (position < N)


@gluon.jit
def ring(SIZE: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers, each of which takes so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def attend(
    q_desc, k_desc, v_desc, q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr,
    offset_ptr, heads_ptr, work_ptr, list_idx, gather_ptr, valid_ptr, scale, H, G, N, TILES,
    D: gl.constexpr, DP: gl.constexpr, STAGES: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """All FP8 cells; arguments as in `fpsc.kernels.triton.forward.attend`, but:

    q_desc: blocks [64, DP] of [B * H * TILES * 128, DP]; k_desc: [32, 1, 2, DP] of [B * G * TILES *
    32, 2, 2, DP]; v_desc: [DP, 128] of [B * G * DP, TILES * 128]. work: int32 [items, 4], see
    `load_item`; heads: its first number says how many heads have FP8 cells. STAGES: at least 3,
    because a consumer holds two key tiles when it asks for a third. PAIRS: `visit_pairs`.
    """
    gl.static_assert(STAGES >= 3)
    items = gl.load(heads_ptr) * TILES
    fp8: gl.constexpr = gl.float8e4nv
    q_smem = gl.allocate_shared_memory(fp8, [2 * Q_BUFFERS, ROWS, DP], q_desc.layout)
    k_smem = gl.allocate_shared_memory(fp8, [2 * STAGES, BLOCK // 4, 1, 2, DP], k_desc.layout)
    v_smem = gl.allocate_shared_memory(fp8, [STAGES, DP, BLOCK], v_desc.layout)
    q_full = ring(Q_BUFFERS, 1)
    q_empty = ring(Q_BUFFERS, 2)
    full = ring(STAGES, 1)
    empty = ring(STAGES, 2)
    turns = ring(2, 1)
    buffers = (q_smem, k_smem, v_smem, q_full, q_empty, full, empty, turns)
    tensors = (
        q_scale_ptr, meta_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr, offset_ptr, work_ptr,
        list_idx, gather_ptr, valid_ptr,
    )  # fmt: skip
    sizes = (items, scale, H, G, N, TILES)
    gl.warp_specialize(
        [
            (attend_rows, (0, buffers, tensors, sizes, D, DP, STAGES, PAIRS)),
            (attend_rows, (1, buffers, tensors, sizes, D, DP, STAGES, PAIRS)),
            (
                copy_tiles,
                (
                    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
                    work_ptr, list_idx, items, H, G, TILES, DP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
