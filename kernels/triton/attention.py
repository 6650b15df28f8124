"""`fpsc::attention` by Triton kernels: what is allocated, what is launched, in which order.

Forward: what is in a mask, statistics of K and V, Q, K and V in tile order, attention. Cells of the
two kinds are packed and attended by launches of their own, each of which leaves the cells of the
other alone. Backward is in `fpsc.kernels.triton.gradients`.

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
from fpsc.kernels.saved import Saved, new_saved, offset_of
from fpsc.kernels.triton import configs, schedule, tune
from fpsc.kernels.triton import forward as forward_kernels
from fpsc.kernels.triton.configs import Config
from fpsc.kernels.triton.gradients import backward
from fpsc.kernels.triton.launch import launch
from fpsc.kernels.triton.prologue import (
    Call,
    Lists,
    Tiles,
    call_of,
    copy_tiles,
    keys_of,
    lists_of,
    quantise,
)

__all__ = ["backward", "forward"]


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
    fp8_backward: bool = False,
    fp8_kernel: str = "fp8",
) -> tuple[Tensor, Tensor, Saved | None]:
    """As `reference.forward`; the memory of out is [B, N, H, D]-contiguous.

    before: RMSNorm and rotary embedding of q and k, done while they are packed.
    fp8_backward: whether backward will have FP8 products.
    fp8_kernel: which candidates there are for FP8 cells, "fp8" or one of `configs.GLUON`.

    Returns out, lse and, where `kinds` has FP8 cells, what backward needs of them.
    """
    B, H, N, D = q_BHND.shape
    out = q_BHND.new_empty(B, N, H, D).transpose(1, 2)
    lse = q_BHND.new_empty((B, H, N), dtype=torch.float32)
    call = call_of(q_BHND, k_BGND, v_BGND, modes_BH3, gather, valid, key_mask_BN, scale, before)
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
        saved = new_saved(call.q, call.k, *gather.shape, offsets=fp8_backward)
        saved.shift.zero_()
        permuted = tune.permutes_v(q_BHND.device)
        tiles = quantise(call, keys, groups, meta, saved, permuted=permuted)
        _attend(fp8_kernel, call, tiles, saved, meta, heads[1], list_ptr, seen, rest, out, lse)
        saved.k_scale.copy_(meta[..., 0])
    return out, lse, saved


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
            offset_of(saved) if saved else None, call.modes, heads, list_ptr, seen.idx, seen.visits,
            *rest, abs(call.scale), B, H, G, N, TILES, len(list_ptr), seen.idx.shape[-1],
            **call.fixed, FP8=fp8, PERMUTED=fp8 and tune.permutes_v(device),
            **config.arguments(), **config.schedule(),
        )  # fmt: skip

    run(tune.choose(kernel, device, dtype, DP, run))
