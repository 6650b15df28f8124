"""Backward of `fpsc::attention` by Triton kernels: what is allocated and launched, in which order.

What forward packed comes first: in 16 bits, or for FP8 products of FP8 cells transposed; then what
backward needs of dO; then dq; then dk and dv. Cells whose products are FP8 have launches of their
own, which leave the others alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpsc.kernels.kinds import INPUT_CELLS
from fpsc.kernels.saved import E4M3, Saved, padded_head_dim
from fpsc.kernels.triton import backward as kernels
from fpsc.kernels.triton import backward_fp8 as fp8_kernels
from fpsc.kernels.triton import configs, tune
from fpsc.kernels.triton.configs import Config
from fpsc.kernels.triton.launch import launch
from fpsc.kernels.triton.prologue import (
    Keys,
    Lists,
    Tiles,
    call_of,
    copy_tiles,
    keys_of,
    last_contiguous,
    lists_of,
)


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
    fp8_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`: dq, dk, dv, contiguous. q, k, v: None where all cells are FP8.

    fp8_backward: as in the forward that left `saved`.
    """
    B, H, N, D = out_BHND.shape
    new = out_BHND.new_empty
    keys = keys_of(gather, valid, key_mask_BN, B, N)
    if saved is not None:
        G = key_heads = saved.k8.shape[1]
    else:
        assert k_BGND is not None
        G = key_heads = k_BGND.shape[1]
    if kinds & INPUT_CELLS and saved is not None:
        G = H  # query heads of both kinds may share a key head, whose tiles then differ
    make = new if key_mask_BN is None else out_BHND.new_zeros
    step = Step(
        dout=last_contiguous(dout_BHND), out=last_contiguous(out_BHND), lse=lse_BHN,
        modes=modes_BH3, keys=keys, seen=lists_of(list_ptr, list_idx, keys), list_ptr=list_ptr,
        back_ptr=back_ptr, back_idx=back_idx, order=order, gather=gather, valid=valid, scale=scale,
        dq=new((B, H, N, D)), dk=make((B, G, N, D)), dv=make((B, G, N, D)),
    )  # fmt: skip
    if saved is not None and fp8_backward:
        _with_fp8_products(step, saved)
        saved = None
    if saved is not None or kinds & INPUT_CELLS:
        tiles, meta = step.empty_tiles()
        if kinds & INPUT_CELLS:
            assert q_BHND is not None and k_BGND is not None and v_BGND is not None
            k, v = _for_heads(k_BGND, G), _for_heads(v_BGND, G)
            call = call_of(q_BHND, k, v, modes_BH3, gather, valid, key_mask_BN, scale)
            copy_tiles(call, keys, meta, into=tiles)
        _with_16_bit_products(step, tiles, meta, saved, skip_fp8=fp8_backward)
    dq, dk, dv = step.dq, step.dk, step.dv
    if scale < 0:  # the kernels see it in Q
        dq.neg_()
    if key_heads != G:
        dk, dv = (x.unflatten(1, (key_heads, -1)).float().sum(2).to(x.dtype) for x in (dk, dv))
    return dq, dk, dv


@dataclass(frozen=True)
class Step:
    """One backward: what it is given, and where its results go.

    dq [B, H, N, D]; dk, dv [B, G, N, D], where G may be more than the heads of k and v.
    """

    dout: Tensor
    out: Tensor
    lse: Tensor
    modes: Tensor
    keys: Keys
    seen: Lists
    list_ptr: Tensor
    back_ptr: Tensor
    back_idx: Tensor
    order: Tensor
    gather: Tensor
    valid: Tensor
    scale: float
    dq: Tensor
    dk: Tensor
    dv: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, TILES, BLOCK"""
        return (*self.dq.shape[:3], *self.gather.shape)

    @property
    def fixed(self) -> dict[str, int]:
        D = self.dq.shape[3]
        return {"D": D, "DP": padded_head_dim(D), "BLOCK": self.gather.shape[1]}

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.dout.stride()[:3], *self.out.stride()[:3])

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.dq.new_empty(shape, dtype=dtype)

    def empty_tiles(self) -> tuple[Tiles, Tensor]:
        """Uninitialised memory for q, k and v in 16 bits, and for the scales and counts of k."""
        B, H, _, TILES, BLOCK = self.sizes
        G, DP = self.dk.shape[1], self.fixed["DP"]
        tiles = Tiles(*(self.new(B, heads, TILES, BLOCK, DP) for heads in (H, G, G)))
        return tiles, self.new(B, G, TILES, 2, dtype=torch.float32)

    @property
    def queries(self) -> tuple[object, ...]:
        """What a kernel of dq takes between its result and its sizes."""
        return (
            self.modes, self.list_ptr, self.seen.idx, self.seen.visits, self.order, self.gather,
            self.valid,
        )  # fmt: skip

    @property
    def of_keys(self) -> tuple[object, ...]:
        """What a kernel of dk and dv takes between its results and its sizes."""
        return (
            self.modes, self.back_ptr, self.back_idx, self.order, self.keys.gather,
            self.keys.counts, self.keys.gather_stride, self.keys.count_stride,
        )  # fmt: skip

    def programs(self, heads: int, rows: int) -> tuple[int]:
        B, _, _, TILES, BLOCK = self.sizes
        return (B * heads * TILES * (BLOCK // rows),)

    def choose(self, kernel: str, run: tune.Run) -> None:
        """Launch with the best configuration of a kernel."""
        run(tune.choose(kernel, self.out.device, self.out.dtype, self.fixed["DP"], run))


def _with_16_bit_products(
    step: Step, tiles: Tiles, meta: Tensor, saved: Saved | None, *, skip_fp8: bool
) -> None:
    """All cells, or those in the input's dtype alone; `tiles` has these already."""
    B, H, N, TILES, BLOCK = step.sizes
    G, DP = step.dk.shape[1], step.fixed["DP"]
    shift = q_scale = None
    if saved is not None:
        _widen(saved, step.modes, tiles)
        meta[..., 0] = _for_heads(saved.k_scale, G)
        meta[..., 1] = step.keys.last_weights.unsqueeze(-2)
        shift, q_scale = saved.shift, saved.q_scale
    dout_tiles = step.new(B, H, TILES, BLOCK, DP)
    delta, lse2 = (step.new(B, H, TILES, BLOCK, dtype=torch.float32) for _ in range(2))
    launch(
        kernels.gradient_tiles, (H * TILES, B),
        step.dout, step.out, step.lse, shift, dout_tiles, delta, lse2, step.modes, step.gather,
        step.valid, *step.strides, H, N, TILES, **step.fixed, num_warps=configs.pack_warps(DP),
    )  # fmt: skip
    operands = (*tiles, dout_tiles, q_scale, meta.view(torch.int64), delta, lse2)
    sizes = (abs(step.scale), B, H, G, N, TILES)
    fixed = {**step.fixed, "SKIP_FP8": skip_fp8}

    def query_gradients(config: Config) -> None:
        launch(
            kernels.query_gradients, step.programs(H, config.BM),
            *operands, step.dq, *step.queries, *sizes, len(step.list_ptr), step.seen.idx.shape[-1],
            **fixed, **config.arguments(),
        )  # fmt: skip

    def key_gradients(config: Config) -> None:
        launch(
            kernels.key_gradients, step.programs(G, config.BN),
            *operands, step.dk, step.dv, *step.of_keys, *sizes, **fixed, **config.arguments(),
        )  # fmt: skip

    step.choose("query_gradients", query_gradients)
    step.choose("key_gradients", key_gradients)


def _with_fp8_products(step: Step, saved: Saved) -> None:
    """FP8 cells alone."""
    B, H, N, TILES, BLOCK = step.sizes
    G, heads, DP = saved.k8.shape[1], step.dk.shape[1], step.fixed["DP"]
    meta = step.new(B, G, TILES, 2, dtype=torch.float32)
    meta[..., 0] = saved.k_scale
    meta[..., 1] = step.keys.last_weights.unsqueeze(-2)
    v_norm = torch.zeros((B, G), dtype=torch.float32, device=meta.device)
    turned = step.new(2, B, H, DP, TILES * BLOCK, dtype=E4M3)
    k_turned = step.new(B, G, DP, TILES * BLOCK, dtype=E4M3)
    v_rows = step.new(B, G, TILES, BLOCK, DP, dtype=E4M3)

    def turn(operand: int, x: Tensor, y: Tensor) -> None:
        launch(
            fp8_kernels.turn_tiles, (x.shape[1] * TILES, B),
            x, y, v_norm, step.keys.counts, step.modes, step.keys.count_stride, H, x.shape[1],
            TILES, DP=DP, BLOCK=BLOCK, OPERAND=operand,
            PERMUTED=tune.permutes_v(step.out.device), num_warps=configs.pack_warps(DP),
        )  # fmt: skip

    turn(0, saved.q8, turned[0])
    turn(1, saved.k8, k_turned)
    turn(2, saved.v8, v_rows)
    y8 = torch.empty_like(saved.q8)
    of_tile = step.new(B, H, TILES, 4, dtype=torch.float32)
    of_rows = step.new(B, H, TILES, 4, BLOCK, dtype=torch.float32)
    launch(
        fp8_kernels.quantise_gradients, (H * TILES, B),
        step.dout, step.out, step.lse, saved.shift, saved.offset, saved.q_scale,
        saved.v_scale, v_norm, y8, of_tile, of_rows, step.modes, step.gather, step.valid,
        *step.strides, H, G, N, TILES, **step.fixed, num_warps=configs.pack_warps(DP, two=True),
    )  # fmt: skip
    turn(0, y8, turned[1])  # as Q
    meta = meta.view(torch.int64)

    def query_gradients(config: Config) -> None:
        launch(
            fp8_kernels.query_gradients_fp8, step.programs(H, config.BM),
            saved.q8, saved.k8, v_rows, y8, k_turned, meta, of_tile, of_rows, step.dq,
            *step.queries, abs(step.scale), B, H, G, N, TILES, len(step.list_ptr),
            step.seen.idx.shape[-1], **step.fixed, **config.arguments(),
        )  # fmt: skip

    def key_gradients(config: Config) -> None:
        launch(
            fp8_kernels.key_gradients_fp8, step.programs(heads, config.BN),
            saved.q8, saved.k8, v_rows, y8, turned, meta, saved.v_scale, of_tile, of_rows,
            step.dk, step.dv, *step.of_keys, abs(step.scale),
            B, H, G, heads, N, TILES, **step.fixed, EACH=H // heads, **config.arguments(),
        )  # fmt: skip

    step.choose("query_gradients_fp8", query_gradients)
    step.choose("key_gradients_fp8", key_gradients)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, G, ...] with a copy for each of so many heads; x itself where it has them."""
    share = heads // x.shape[1]
    return x if share == 1 else x.repeat_interleave(share, dim=1)


def _widen(saved: Saved, modes_BH3: Tensor, into: Tiles) -> None:
    """The FP8 cells' operands in the dtype of `into`."""
    (B, H), (TILES, BLOCK, DP) = modes_BH3.shape[:2], saved.q8.shape[2:]
    permuted = tune.permutes_v(modes_BH3.device)
    for operand, (x, y) in enumerate(zip((saved.q8, saved.k8, saved.v8), into, strict=True)):
        launch(
            kernels.widen_tiles, (y.shape[1] * TILES, B),
            x, y, saved.v_scale, modes_BH3, H, saved.k8.shape[1], y.shape[1], TILES,
            DP=DP, BLOCK=BLOCK, OPERAND=operand, PERMUTED=permuted,
            num_warps=configs.pack_warps(DP),
        )  # fmt: skip
