"""The CPU kernel of `fpsc::attention`, forward and backward: plain torch over tile-ordered copies.

K and V of the heads that share a list are copied once, real and unmasked rows only, in tile order.
A query tile then walks the contiguous runs of its list: each run is a slice of those copies, so
nothing is gathered or padded per query tile, and masks and ragged tiles cost nothing. The scores of
a query tile live in one buffer that all tiles share. Memory: those copies and that buffer.

The formulas are those of `fpsc.kernels.reference`, in base two: log2(e) is in q, and exp2 is the
cheaper function. The code uses only torch operators, so it also runs on other devices, correctly,
where no kernel of their own serves them; it reads the lists from the host there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

E4M3_MAX = 448.0
E4M3_SMALLEST_NORMAL = 2.0**-6
P_OFFSET = 8.0
SMALLEST_SCALE = 2.0**-126
LOG2_E = math.log2(math.e)
HEADS_AT_ONCE = 4


class Step(NamedTuple):
    """The work of one query tile."""

    rows: slice  # in tile order
    runs: list[slice]  # of the keys that take part, in tile order
    n_keys: int


class Group(NamedTuple):
    """Heads of one batch element that share a list and a dtype, at most HEADS_AT_ONCE."""

    b: int
    heads: list[int]
    key_heads: list[int]
    fp8: bool
    steps: list[Step]
    rows_N: Tensor  # int64: sequence positions in tile order
    keys_M: Tensor  # int64: those of the keys that take part
    tile_of_row_N: Tensor  # int64
    tile_of_key_M: Tensor  # int64


class Operands(NamedTuple):
    """What the products of a group see: float32, tile order, dequantised."""

    q_HND: Tensor  # times scale * log2(e)
    k_HMD: Tensor
    v_HMD: Tensor
    shift_HN: Tensor | None  # scale * q . mean of k, in fp8 groups


def forward(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    modes_BH2: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask_BN: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; the memory of out is [B, N, H, D]-contiguous."""
    B, H, N, D = q_BHND.shape
    out_BHND = q_BHND.new_empty(B, N, H, D).transpose(1, 2)
    lse_BHN = q_BHND.new_empty(B, H, N, dtype=torch.float32)
    for group in _groups(k_BGND, modes_BH2, list_ptr, list_idx, gather, valid, key_mask_BN):
        q, k, v, shift = _operands(q_BHND, k_BGND, v_BGND, group, scale)
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        buffer = _buffer(q, group.steps)
        offset = P_OFFSET if group.fp8 else 0.0
        for step in group.steps:
            r = step.rows
            if step.n_keys == 0:
                o[:, r] = 0.0
                lse[:, r] = -math.inf
                continue
            p = _times_columns(q[:, r], k, step, buffer)
            m = p.amax(dim=-1, keepdim=True).sub_(offset)
            total = p.sub_(m).exp2_().sum(dim=-1, keepdim=True)
            if group.fp8:
                round_to_e4m3_(p)
            o[:, r] = _times_rows(p, v, step).div_(total)
            lse[:, r] = total.log2_().add_(m).div_(LOG2_E).squeeze(-1)
        if shift is not None:
            lse += shift
        for i, h in enumerate(group.heads):
            out_BHND[group.b, h].index_copy_(0, group.rows_N, o[i].to(out_BHND.dtype))
            lse_BHN[group.b, h].index_copy_(0, group.rows_N, lse[i])
    return out_BHND, lse_BHN


def backward(
    dout_BHND: Tensor,
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    out_BHND: Tensor,
    lse_BHN: Tensor,
    modes_BH2: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask_BN: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`: dq, dk, dv, contiguous, in the dtypes of q, k, v."""
    dq_BHND = torch.empty(q_BHND.shape, dtype=q_BHND.dtype, device=q_BHND.device)
    dk_BGND = torch.zeros(k_BGND.shape, device=k_BGND.device)
    dv_BGND = torch.zeros(v_BGND.shape, device=v_BGND.device)
    for group in _groups(k_BGND, modes_BH2, list_ptr, list_idx, gather, valid, key_mask_BN):
        b = group.b
        q, k, v, shift = _operands(q_BHND, k_BGND, v_BGND, group, scale)
        do = _gathered(dout_BHND[b], group.heads, group.rows_N)
        delta = (do * _gathered(out_BHND[b], group.heads, group.rows_N)).sum(dim=-1, keepdim=True)
        lse = lse_BHN[b, group.heads][:, group.rows_N]
        if shift is not None:
            lse -= shift
        lse = lse.mul_(LOG2_E).unsqueeze(-1)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        p_buffer, ds_buffer = _buffer(q, group.steps), _buffer(q, group.steps)
        for step in group.steps:
            r = step.rows
            if step.n_keys == 0:
                continue
            p = _times_columns(q[:, r], k, step, p_buffer).sub_(lse[:, r]).exp2_()
            _add_transposed_times(dv, p, do[:, r], step)
            ds = _times_columns(do[:, r], v, step, ds_buffer).sub_(delta[:, r]).mul_(p)
            _add_transposed_times(dk, ds, q[:, r], step)
            dq[:, r] = _times_rows(ds, k, step)
        dq *= scale
        dk /= LOG2_E  # its q carries scale * log2(e)
        for i, (h, g) in enumerate(zip(group.heads, group.key_heads, strict=True)):
            dq_BHND[b, h].index_copy_(0, group.rows_N, dq[i].to(dq_BHND.dtype))
            dk_BGND[b, g].index_add_(0, group.keys_M, dk[i])
            dv_BGND[b, g].index_add_(0, group.keys_M, dv[i])
    return dq_BHND, dk_BGND.to(k_BGND.dtype), dv_BGND.to(v_BGND.dtype)


def round_to_e4m3_(x: Tensor) -> Tensor:
    """Rounds float32 of at most 448 to e4m3, in place and exactly, as a cast there and back would.

    Adding and taking away 1.5 * 2**20 times a number's power of two leaves three mantissa bits,
    rounded to nearest even. On CPU that is five times faster than the two casts.
    """
    power = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power.clamp_(min=E4M3_SMALLEST_NORMAL)
    return x.add_(power, alpha=1.5 * 2**20).sub_(power, alpha=1.5 * 2**20)


def _groups(
    k_BGND: Tensor,
    modes_BH2: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask_BN: Tensor | None,
) -> Iterator[Group]:
    """The heads by batch element, pattern and dtype."""
    device = k_BGND.device
    real = torch.arange(gather.shape[1], device=gather.device) < valid[:, None]
    rows = gather[real].long().to(device)
    tile_of_row = torch.arange(len(valid), device=device).repeat_interleave(valid.to(device))
    row_counts = valid.tolist()
    heads_per_key_head = modes_BH2.shape[1] // k_BGND.shape[1]
    steps: dict[int, list[Step]] = {}
    for b, modes in enumerate(modes_BH2.tolist()):
        keys, tile_of_key, key_counts = rows, tile_of_row, row_counts
        if key_mask_BN is not None:
            taking_part = key_mask_BN[b, rows]
            keys, tile_of_key = rows[taking_part], tile_of_row[taking_part]
            key_counts = torch.bincount(tile_of_key, minlength=len(valid)).tolist()
            steps = {}  # these depend on the mask
        shared: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for h, (pattern, dtype) in enumerate(modes):
            shared[pattern, dtype == 1].append(h)
        for (pattern, fp8), heads in shared.items():
            if pattern not in steps:
                steps[pattern] = _steps(list_ptr[pattern], list_idx, row_counts, key_counts)
            for first in range(0, len(heads), HEADS_AT_ONCE):
                some = heads[first : first + HEADS_AT_ONCE]
                yield Group(
                    b=b,
                    heads=some,
                    key_heads=[h // heads_per_key_head for h in some],
                    fp8=fp8,
                    steps=steps[pattern],
                    rows_N=rows,
                    keys_M=keys,
                    tile_of_row_N=tile_of_row,
                    tile_of_key_M=tile_of_key,
                )


def _steps(
    ptr: Tensor, list_idx: Tensor, row_counts: list[int], key_counts: list[int]
) -> list[Step]:
    """One step a query tile: its rows, and the contiguous runs of its key tiles."""
    bounds = ptr.tolist()
    visited = list_idx[bounds[0] : bounds[-1]].tolist()
    row_starts, key_starts = _starts(row_counts), _starts(key_counts)
    steps = []
    for u, (first, last) in enumerate(pairwise(bounds)):
        runs: list[slice] = []
        for w in visited[first - bounds[0] : last - bounds[0]]:
            start, stop = key_starts[w], key_starts[w + 1]
            if start == stop:
                continue
            if runs and runs[-1].stop == start:
                start = runs.pop().start
            runs.append(slice(start, stop))
        n_keys = sum(run.stop - run.start for run in runs)
        steps.append(Step(slice(row_starts[u], row_starts[u + 1]), runs, n_keys))
    return steps


def _starts(counts: list[int]) -> list[int]:
    starts = [0]
    for n in counts:
        starts.append(starts[-1] + n)
    return starts


def _operands(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, group: Group, scale: float
) -> Operands:
    q = _infinite_to_nan_(_gathered(q_BHND[group.b], group.heads, group.rows_N))
    k = _infinite_to_nan_(_gathered(k_BGND[group.b], group.key_heads, group.keys_M))
    v = _infinite_to_nan_(_gathered(v_BGND[group.b], group.key_heads, group.keys_M))
    shift = None
    if group.fp8:
        mean_H1D = _finite_mean(k)
        shift = scale * (q @ mean_H1D.transpose(1, 2)).squeeze(-1)
        _round_per_tile_(q, group.tile_of_row_N, len(group.steps))
        _round_per_tile_(k.sub_(mean_H1D), group.tile_of_key_M, len(group.steps))
        _round_per_channel_(v)
    return Operands(q.mul_(scale * LOG2_E), k, v, shift)


def _gathered(x_HND: Tensor, heads: list[int], rows_M: Tensor) -> Tensor:
    """Rows of some heads, float32 [len(heads), M, D]. Head by head: that is memcpy's speed."""
    M, D = len(rows_M), x_HND.shape[-1]
    gathered = torch.empty(len(heads), M, D, device=x_HND.device)
    for i, h in enumerate(heads):
        if x_HND.dtype == torch.float32:
            torch.index_select(x_HND[h], 0, rows_M, out=gathered[i])
        else:
            gathered[i] = x_HND[h].index_select(0, rows_M)
    return gathered


def _infinite_to_nan_(x: Tensor) -> Tensor:
    return x.add_(x - x)


def _finite_mean(k_HMD: Tensor) -> Tensor:
    """Mean of the finite rows, [H, 1, D]; zero where there is none."""
    finite = k_HMD.isfinite().all(dim=-1, keepdim=True)
    total = torch.where(finite, k_HMD, 0.0).sum(dim=1, keepdim=True)
    mean = total / finite.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mean.isfinite(), mean, 0.0)


def _round_per_tile_(x_HND: Tensor, tile_of_row_N: Tensor, n_tiles: int) -> None:
    amax_HN = x_HND.abs().nan_to_num_(nan=0.0, posinf=0.0).amax(dim=-1)
    amax_HT = amax_HN.new_zeros(len(x_HND), n_tiles)
    amax_HT.scatter_reduce_(1, tile_of_row_N.expand_as(amax_HN), amax_HN, "amax")
    _round_scaled_(x_HND, _scale(amax_HT)[:, tile_of_row_N, None])


def _round_per_channel_(v_HMD: Tensor) -> None:
    if v_HMD.shape[1] > 0:
        amax_H1D = v_HMD.abs().nan_to_num_(nan=0.0, posinf=0.0).amax(dim=1, keepdim=True)
        _round_scaled_(v_HMD, _scale(amax_H1D))


def _scale(amax: Tensor) -> Tensor:
    s = amax / E4M3_MAX
    return torch.where(s >= SMALLEST_SCALE, s, 1.0)


def _round_scaled_(x: Tensor, s: Tensor) -> None:
    round_to_e4m3_(x.div_(s).clamp_(-E4M3_MAX, E4M3_MAX)).mul_(s)


def _buffer(q_HND: Tensor, steps: list[Step]) -> Tensor:
    """Room for the scores of any one query tile."""
    most = max(((s.rows.stop - s.rows.start) * s.n_keys for s in steps), default=0)
    return q_HND.new_empty(len(q_HND) * most)


def _times_columns(x_HRD: Tensor, y_HMD: Tensor, step: Step, buffer: Tensor) -> Tensor:
    """x y^T over the keys of the step, [H, R, n_keys], written to the buffer."""
    H, R, _ = x_HRD.shape
    products = buffer[: H * R * step.n_keys].view(H, R, step.n_keys)
    for run, columns in _columns(step):
        torch.bmm(x_HRD, y_HMD[:, run].transpose(1, 2), out=products[:, :, columns])
    return products


def _times_rows(p_HRK: Tensor, y_HMD: Tensor, step: Step) -> Tensor:
    """p y over the keys of the step, [H, R, D]."""
    total = p_HRK.new_zeros(*p_HRK.shape[:2], y_HMD.shape[-1])
    for run, columns in _columns(step):
        torch.baddbmm(total, p_HRK[:, :, columns], y_HMD[:, run], out=total)
    return total


def _add_transposed_times(total_HMD: Tensor, p_HRK: Tensor, x_HRD: Tensor, step: Step) -> None:
    """Adds p^T x to the rows of the step's keys."""
    for run, columns in _columns(step):
        some = total_HMD[:, run]
        torch.baddbmm(some, p_HRK[:, :, columns].transpose(1, 2), x_HRD, out=some)


def _columns(step: Step) -> Iterator[tuple[slice, slice]]:
    """Each run, with its place among the keys of the step."""
    first = 0
    for run in step.runs:
        last = first + run.stop - run.start
        yield run, slice(first, last)
        first = last
