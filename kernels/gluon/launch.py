"""How the Gluon kernel is launched: its work list, its tensor descriptors, one program an SM."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fpsc.kernels.gluon import forward
from fpsc.kernels.saved import Saved, offset_of
from fpsc.kernels.triton import schedule, tune
from fpsc.kernels.triton.configs import BLOCK, Config
from fpsc.kernels.triton.launch import launch
from fpsc.kernels.triton.prologue import Call, Lists, Tiles


def attend(
    call: Call,
    tiles: Tiles,
    saved: Saved,
    meta: Tensor,
    heads: Tensor,
    list_ptr: Tensor,
    seen: Lists,
    rest: tuple[Tensor, ...],
    out: Tensor,
    lse: Tensor,
    config: Config,
) -> None:
    """The FP8 cells of a call, as `triton.attention` has them: writes their out and lse.

    rest: order, gather and valid.

    Raises: ValueError where V lies permuted, or a tile has not 128 rows.
    """
    B, (H, G, N, TILES), DP = call.q.shape[0], call.sizes, call.fixed["DP"]
    order, gather, valid = rest
    rows = call.fixed["BLOCK"]
    if tune.permutes_v(call.q.device):
        raise ValueError(
            "v: expected in order for the Gluon kernel, found permuted: unset tune.PERMUTE_V"
        )
    if rows != BLOCK:
        raise ValueError(f"gather: expected {BLOCK} rows a tile for the Gluon kernel, found {rows}")
    items = B * H * TILES
    heads_in_all = B * H
    counts = heads.new_empty((schedule.WORK["CLASSES"], heads_in_all))
    work = heads.new_empty((items, 4))
    launch(
        schedule.count_classes, (heads_in_all,),
        heads, call.modes, list_ptr, counts, heads_in_all, TILES,
        **schedule.WORK, num_warps=4,
    )  # fmt: skip
    launch(
        schedule.list_work, (heads_in_all, -(-TILES // schedule.WORK["WIDTH"])),
        heads, call.modes, list_ptr, seen.visits, order, counts, work, H, heads_in_all, TILES,
        len(list_ptr), seen.idx.shape[-1],
        **schedule.WORK, COLUMNS=schedule.COLUMNS, num_warps=4,
    )  # fmt: skip
    launch(
        forward.attend, (min(items, tune.multiprocessors(call.q.device)),),
        *descriptors(tiles), saved.q_scale, meta.view(torch.int64), saved.v_scale, saved.shift, out,
        lse, offset_of(saved), heads, work, seen.idx, gather, valid, abs(call.scale), H, G, N,
        TILES, D=call.fixed["D"], DP=DP, STAGES=config.stages, PAIRS=config.BN > BLOCK,
        **config.launch(),
    )  # fmt: skip


def descriptors(tiles: Tiles) -> tuple[TensorDescriptor, ...]:
    """Of Q, K and V: what one copy takes of each, see `forward.attend`."""
    DP = tiles.q.shape[-1]
    k = tiles.k.view(-1, 2, 2, DP)  # rows with the same second bit are every other pair
    blocks = (
        (tiles.q.view(-1, DP), [BLOCK // 2, DP]),
        (k, [BLOCK // 4, 1, 2, DP]),
        (tiles.v.view(-1, tiles.v.shape[-1]), [DP, BLOCK]),
    )
    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), block, forward.shared_layout(block))
        for x, block in blocks
    )
