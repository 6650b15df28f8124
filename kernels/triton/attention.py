"""`fpsc::attention` by Triton kernels: what is allocated, what is launched, in which order.

Forward: what is in a mask, statistics of K and V, Q, K and V in tile order, attention. Cells of the
two kinds are packed and attended by launches of their own, each of which leaves the cells of the
other alone. Backward: what forward packed, in 16 bits; then dq; then dk and dv.

Sizes of launches and buffers depend on shapes alone, never on a number in a table, and nothing is
read from the device: a recorded CUDA graph replays at any noise level. Every tile that a list names
has a key, unless a mask took them; values of the tables are not checked here.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from fpsc.kernels.before import NOTHING_BEFORE, Before
from fpsc.kernels.kinds import FP8_CELLS, INPUT_CELLS
from fpsc.kernels.saved import Saved, new_saved, padded_head_dim
from fpsc.kernels.triton import backward as backward_kernels
from fpsc.kernels.triton import configs, schedule, tune
from fpsc.kernels.triton import forward as forward_kernels
from fpsc.kernels.triton.configs import Config
from fpsc.kernels.triton.launch import launch
from fpsc.kernels.triton.prologue import (
    Call,
    Lists,
    Tiles,
    copy_tiles,
    keys_of,
    lists_of,
    quantise,
    ready,
)


def forward(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    modes_BH3: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask_BN: Tensor | None,
    scale: float,
    kinds: int,
    before: Before = NOTHING_BEFORE,
    fp8_kernel: str = "fp8",
) -> tuple[Tensor, Tensor, Saved | None]:
    """As `reference.forward`; the memory of out is [B, N, H, D]-contiguous.

    before: RMSNorm and rotary embedding of q and k, done while they are packed.
    fp8_kernel: which candidates there are for FP8 cells, "fp8" or one of `configs.GLUON`.

    Returns out, lse and, where `kinds` has FP8 cells, what backward needs of them.
    """
    B, H, N, D = q_BHND.shape
    out = q_BHND.new_empty(B, N, H, D).transpose(1, 2)
    lse = q_BHND.new_empty((B, H, N), dtype=torch.float32)
    call = _call(q_BHND, k_BGND, v_BGND, modes_BH3, gather, valid, key_mask_BN, scale, before)
    keys = keys_of(gather, valid, key_mask_BN, B, N)
    G = call.k.shape[1]
    meta = q_BHND.new_empty((B, G, len(gather), 2), dtype=torch.float32)
    heads = _heads_by_kind(modes_BH3, list_ptr)
    seen, rest = lists_of(list_ptr, list_idx, keys), (order, gather, valid)
    saved = None
    if kinds & INPUT_CELLS:
        tiles = copy_tiles(call, keys, meta)
        _attend("input", call, tiles, None, meta, heads[0], list_ptr, seen, rest, out, lse)
    if kinds & FP8_CELLS:
        saved = new_saved(call.q, call.k, *gather.shape)
        saved.shift.zero_()
        permuted = tune.permutes_v(q_BHND.device)
        tiles = quantise(call, keys, groups, meta, saved, permuted=permuted)
        _attend(fp8_kernel, call, tiles, saved, meta, heads[1], list_ptr, seen, rest, out, lse)
        saved.k_scale.copy_(meta[..., 0])
    return out, lse, saved


def backward(
    dout_BHND: Tensor,
    q_BHND: Tensor | None,
    k_BGND: Tensor | None,
    v_BGND: Tensor | None,
    out_BHND: Tensor,
    lse_BHN: Tensor,
    saved: Saved | None,
    modes_BH3: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask_BN: Tensor | None,
    scale: float,
    kinds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`: dq, dk, dv, contiguous. q, k, v: None where all cells are FP8."""
    B, H, N, D = out_BHND.shape
    DP, (TILES, BLOCK) = padded_head_dim(D), gather.shape
    new = out_BHND.new_empty
    keys = keys_of(gather, valid, key_mask_BN, B, N)
    if saved is not None:
        G = key_heads = saved.k8.shape[1]
    else:
        assert k_BGND is not None
        G = key_heads = k_BGND.shape[1]
    if kinds & INPUT_CELLS and saved is not None:
        G = H  # query heads of both kinds may share a key head, whose tiles then differ
    tiles = Tiles(*(new((B, heads, TILES, BLOCK, DP)) for heads in (H, G, G)))
    meta = new((B, G, TILES, 2), dtype=torch.float32)
    if kinds & INPUT_CELLS:
        assert q_BHND is not None and k_BGND is not None and v_BGND is not None
        k, v = _for_heads(k_BGND, G), _for_heads(v_BGND, G)
        call = _call(q_BHND, k, v, modes_BH3, gather, valid, key_mask_BN, scale)
        copy_tiles(call, keys, meta, into=tiles)
    shift = q_scale = None
    if saved is not None:
        _widen(saved, modes_BH3, tiles)
        meta[..., 0] = _for_heads(saved.k_scale, G)
        meta[..., 1] = keys.counts.unsqueeze(-2)
        shift, q_scale = saved.shift, saved.q_scale

    dout, out = _last_contiguous(dout_BHND), _last_contiguous(out_BHND)
    dout_tiles = new((B, H, TILES, BLOCK, DP))
    delta, lse2 = (new((B, H, TILES, BLOCK), dtype=torch.float32) for _ in range(2))
    launch(
        backward_kernels.gradient_tiles, (H * TILES, B),
        dout, out, lse_BHN, shift, dout_tiles, delta, lse2, modes_BH3, gather, valid,
        *dout.stride()[:3], *out.stride()[:3], H, N, TILES,
        D=D, DP=DP, BLOCK=BLOCK, num_warps=configs.pack_warps(DP),
    )  # fmt: skip

    dq = new((B, H, N, D))
    make = new if key_mask_BN is None else out_BHND.new_zeros
    dk, dv = make((B, G, N, D)), make((B, G, N, D))
    seen = lists_of(list_ptr, list_idx, keys)
    operands = (*tiles, dout_tiles, q_scale, meta.view(torch.int64), delta, lse2)
    sizes = (abs(scale), B, H, G, N, TILES)
    fixed = {"D": D, "DP": DP, "BLOCK": BLOCK}

    def query_gradients(config: Config) -> None:
        launch(
            backward_kernels.query_gradients, (B * H * TILES * (BLOCK // config.BM),),
            *operands, dq, modes_BH3, list_ptr, seen.idx, seen.visits, order, gather, valid, *sizes,
            len(list_ptr), seen.idx.shape[-1],
            **fixed, **config.arguments(),
        )  # fmt: skip

    def key_gradients(config: Config) -> None:
        launch(
            backward_kernels.key_gradients, (B * G * TILES * (BLOCK // config.BN),),
            *operands, dk, dv, modes_BH3, back_ptr, back_idx, order, keys.gather, keys.counts,
            keys.gather_stride, keys.count_stride, *sizes,
            **fixed, **config.arguments(),
        )  # fmt: skip

    for run in (query_gradients, key_gradients):
        run(tune.choose(run.__name__, out.device, out.dtype, DP, run))
    if scale < 0:  # the kernels see it in Q
        dq.neg_()
    if key_heads != G:
        dk, dv = (x.unflatten(1, (key_heads, -1)).float().sum(2).to(x.dtype) for x in (dk, dv))
    return dq, dk, dv


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modes: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
    before: Before = NOTHING_BEFORE,
) -> Call:
    """The inputs as the kernels want them."""
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    before = ready(before, q, k)
    return Call(q, k, v, modes.contiguous(), gather, valid, key_mask, scale, before)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, G, ...] with a copy for each of so many heads; x itself where it has them."""
    share = heads // x.shape[1]
    return x if share == 1 else x.repeat_interleave(share, dim=1)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_by_kind(modes_BH3: Tensor, list_ptr: Tensor) -> Tensor:
    """int32 [2, 1 + B * H]: see `schedule.order_heads`."""
    heads = modes_BH3.shape[0] * modes_BH3.shape[1]
    found = modes_BH3.new_zeros((2, 1 + heads))
    launch(
        schedule.order_heads, (heads,),
        modes_BH3, list_ptr, found, heads, list_ptr.shape[1] - 1, WIDTH=64, num_warps=1,
    )  # fmt: skip
    return found


def _attend(
    kernel: str,
    call: Call,
    tiles: Tiles,
    saved: Saved | None,
    meta: Tensor,
    heads: Tensor,
    list_ptr: Tensor,
    seen: Lists,
    rest: tuple[Tensor, ...],
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attention of all cells of one kind: FP8 where `saved` is given."""
    B, (H, G, N, TILES) = call.q.shape[0], call.sizes
    fp8, DP, BLOCK = saved is not None, call.fixed["DP"], call.fixed["BLOCK"]
    device, dtype = call.q.device, call.q.dtype

    def run(config: Config) -> None:
        if config.gluon:
            assert saved is not None
            gluon = import_module("fpsc.kernels.gluon.launch")  # not every Triton has Gluon
            gluon.attend(call, tiles, saved, meta, heads, list_ptr, seen, rest, out, lse, config)
            return
        items = B * H * TILES * (BLOCK // config.BM)
        if config.persistent:
            of_head = TILES * (BLOCK // config.BM)
            items = min(items, configs.programs(tune.multiprocessors(device), of_head))
        launch(
            forward_kernels.attend, (items,),
            *tiles, saved.q_scale if saved else None, meta.view(torch.int64),
            saved.v_scale if saved else None, saved.shift if saved else None, out, lse,
            call.modes, heads, list_ptr, seen.idx, seen.visits, *rest, abs(call.scale),
            B, H, G, N, TILES, len(list_ptr), seen.idx.shape[-1],
            **call.fixed, FP8=fp8, PERMUTED=fp8 and tune.permutes_v(device),
            **config.arguments(), **config.schedule(),
        )  # fmt: skip

    run(tune.choose(kernel, device, dtype, DP, run))


def _widen(saved: Saved, modes_BH3: Tensor, into: Tiles) -> None:
    """The FP8 cells' operands in the dtype of `into`."""
    (B, H), (TILES, BLOCK, DP) = modes_BH3.shape[:2], saved.q8.shape[2:]
    permuted = tune.permutes_v(modes_BH3.device)
    for operand, (x, y) in enumerate(zip((saved.q8, saved.k8, saved.v8), into, strict=True)):
        launch(
            backward_kernels.widen_tiles, (y.shape[1] * TILES, B),
            x, y, saved.v_scale, modes_BH3, H, saved.k8.shape[1], y.shape[1], TILES,
            DP=DP, BLOCK=BLOCK, OPERAND=operand, PERMUTED=permuted,
            num_warps=configs.pack_warps(DP),
        )  # fmt: skip
