"""The CPU kernel of `fpsc::attention`, forward and backward: a head a core, a query tile at a time.

q, k and v of a head are copied once in tile order, real rows only, without the keys that the mask
leaves out. The keys of a query tile are then a few contiguous runs of that copy, which are joined
at the speed of memcpy: the products see no padding, and masks and ragged tiles cost nothing.
Memory, on each core: the copies of one head, and the scores of one query tile.

The formulas are those of `fpsc.kernels.reference`, in base two: log2(e) is in q, and exp2 is the
cheaper function. The code uses only torch operators, so it also runs on other devices, correctly,
where no kernel of their own serves them; it reads the lists from the host there.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fpsc.kernels import threads
from fpsc.kernels.before import NOTHING_BEFORE, Before
from fpsc.kernels.kinds import ALL_CELLS
from fpsc.kernels.reference import (
    E4M3_MAX,
    P_OFFSET,
    key_groupings,
    power_for,
    quantisation_scale,
)

Result = TypeVar("Result")

E4M3_SMALLEST_NORMAL = 2.0**-6
LOG2_E = math.log2(math.e)
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

# Neighbouring query tiles that see the same keys are one step of at most so many scores, and of at
# least so many rows, which is a tile.
SCORES_AT_ONCE = 2**18
ROWS_AT_ONCE = 128


class Step(NamedTuple):
    """Queries that see the same keys: most often one tile. Places are in tile order."""

    rows: slice
    runs: list[slice]  # of the keys that take part
    work: int  # scores


class Task(NamedTuple):
    """Some steps of one head of one batch element."""

    b: int
    h: int
    g: int
    fp8: bool
    steps: list[Step]
    rows_N: Tensor  # int64: sequence positions in tile order
    keys_M: Tensor  # int64: those of the keys that take part
    tile_of_row_N: Tensor  # int64
    group_of_row_N: Tensor  # int64: tiles of one group share a scale
    group_of_key_M: Tensor  # int64

    @property
    def work(self) -> int:
        return sum(step.work for step in self.steps)


class Operands(NamedTuple):
    """What the products of a head see: float32, tile order, dequantised."""

    q_ND: Tensor  # times scale * log2(e)
    k_MD: Tensor
    v_MD: Tensor
    shift_N: Tensor  # scale * q . mean of k, where that was taken from k
    c_D: Tensor  # by what v was divided before it was rounded


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
    kinds: int = ALL_CELLS,
    before: Before = NOTHING_BEFORE,
    fp8_backward: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """As `reference.forward`."""
    q_BHND, k_BGND = before.apply(q_BHND, k_BGND)
    B, H, N, D = q_BHND.shape
    # What these hold is the answer of a query that sees no key.
    out_BHND = v_BGND.new_zeros(B, N, H, D).transpose(1, 2)
    lse_BHN = q_BHND.new_full((B, H, N), -math.inf, dtype=torch.float32)

    def attend(task: Task) -> None:
        q, k, v, shift_N, _ = _operands(q_BHND, k_BGND, v_BGND, task, scale)
        for step in task.steps:
            rows, positions = step.rows, task.rows_N[step.rows]
            s = _dot(q[rows], _visited(k, step))
            m = s.amax(dim=1, keepdim=True)
            if task.fp8:
                m = m.ceil_().sub_(P_OFFSET)
            p = s.sub_(m).exp2_()
            total = p.sum(dim=1, keepdim=True)
            if task.fp8:
                round_to_e4m3_(p)
            o = _dot(p, _visited(v, step).T).div_(total)
            lse = total.log2_().add_(m).div_(LOG2_E).squeeze(1).add_(shift_N[rows])
            out_BHND[task.b, task.h].index_copy_(0, positions, o.to(out_BHND.dtype))
            lse_BHN[task.b, task.h].index_copy_(0, positions, lse)

    tasks = _tasks(k_BGND, modes_BH3, list_ptr, list_idx, groups, gather, valid, key_mask_BN)
    for _ in _run(attend, tasks, q_BHND.device):
        pass
    return out_BHND, lse_BHN, None


def backward(
    dout_BHND: Tensor,
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    out_BHND: Tensor,
    lse_BHN: Tensor,
    saved: None,
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
    kinds: int = ALL_CELLS,
    fp8_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`: dq, dk, dv, contiguous, in the dtypes of q, k, v."""
    dq_BHND = q_BHND.new_zeros(q_BHND.shape)
    dk_BGND = k_BGND.new_zeros(k_BGND.shape, dtype=torch.float32)
    dv_BGND = v_BGND.new_zeros(v_BGND.shape, dtype=torch.float32)

    def differentiate(task: Task) -> tuple[Task, Tensor, Tensor]:
        b, h = task.b, task.h
        q, k, v, shift_N, _ = head = _operands(q_BHND, k_BGND, v_BGND, task, scale)
        do_ND, o_ND = (_rows(x[b, h], task.rows_N) for x in (dout_BHND, out_BHND))
        lse_N = lse_BHN[b, h].index_select(0, task.rows_N).sub_(shift_N)
        lse_N1 = lse_N.mul_(LOG2_E).unsqueeze(1)
        if task.fp8 and fp8_backward:
            dq_ND, dk_DM, dv_DM = _fp8_gradients(task, head, do_ND, o_ND, lse_N1, scale)
            for step in task.steps:
                at = task.rows_N[step.rows]
                dq_BHND[b, h].index_copy_(0, at, dq_ND[step.rows].to(dq_BHND.dtype))
            return task, dk_DM, dv_DM
        delta_N1 = (do_ND * o_ND).sum(dim=1, keepdim=True)
        # Transposed, so that each product below has its long side where it streams.
        dk_DM, dv_DM = torch.zeros_like(k.T), torch.zeros_like(v.T)
        for step in task.steps:
            rows, k_step = step.rows, _visited(k, step)
            p = _dot(q[rows], k_step).sub_(lse_N1[rows]).exp2_()
            _add_to_visited(dv_DM, _dot(do_ND[rows].T.contiguous(), p.T), step)
            ds = _dot(do_ND[rows], _visited(v, step)).sub_(delta_N1[rows]).mul_(p)
            _add_to_visited(dk_DM, _dot(q[rows].T.contiguous(), ds.T), step)
            dq = _dot(ds, k_step.T).mul_(scale)
            dq_BHND[b, h].index_copy_(0, task.rows_N[rows], dq.to(dq_BHND.dtype))
        return task, dk_DM.div_(LOG2_E), dv_DM  # q carries scale * log2(e)

    tasks = _tasks(
        k_BGND, modes_BH3, list_ptr, list_idx, groups, gather, valid, key_mask_BN,
        whole_tiles=fp8_backward,
    )  # fmt: skip
    for task, dk_DM, dv_DM in _run(differentiate, tasks, q_BHND.device):
        dk_BGND[task.b, task.g].index_add_(0, task.keys_M, dk_DM.T)
        dv_BGND[task.b, task.g].index_add_(0, task.keys_M, dv_DM.T)
    return dq_BHND, dk_BGND.to(k_BGND.dtype), dv_BGND.to(v_BGND.dtype)


def _fp8_gradients(
    task: Task, head: Operands, do_ND: Tensor, o_ND: Tensor, lse_N1: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, D], dk and dv [D, M] of a task whose products are FP8 in backward, too.

    The scores are computed twice: the scale of dO wants the largest of each row first.
    """
    q, k, v, _, c_D = head
    m_N1 = torch.zeros_like(lse_N1)
    for step in task.steps:
        s = _dot(q[step.rows], _visited(k, step))
        m_N1[step.rows] = s.amax(dim=1, keepdim=True).ceil_().sub_(P_OFFSET)
    share_N1 = torch.where(lse_N1 == -math.inf, 0.0, torch.exp2(m_N1 - lse_N1))
    y = _infinite_to_nan_(do_ND).mul_(c_D).mul_(share_N1)
    largest = y.abs().nan_to_num_(nan=0.0).amax(dim=1)
    r_N1 = quantisation_scale(_of_tile(largest, task)).unsqueeze(1)
    y8 = round_to_e4m3_(y.div_(r_N1).clamp_(-E4M3_MAX, E4M3_MAX))
    delta_N1 = (y8 * o_ND.div_(c_D)).sum(dim=1, keepdim=True)
    v8 = v.div_(c_D)
    v8_max = v8.norm(dim=1).nan_to_num_(nan=0.0).amax() if len(v8) else v8.new_zeros(())
    bound_N1 = (y8.norm(dim=1, keepdim=True) * v8_max + delta_N1.abs()).mul_(2**P_OFFSET)
    of_rows = power_for(bound_N1)
    of_tile = power_for(_of_tile(bound_N1.squeeze(1).nan_to_num(nan=0.0), task)).unsqueeze(1)

    dq_ND = torch.empty_like(q)
    dk_DM, dv_DM = torch.zeros_like(k.T), torch.zeros_like(v.T)
    of_dv, of_dk = y8 * r_N1, q * (r_N1 * of_tile / LOG2_E)  # q carries scale * log2(e)
    for step in task.steps:
        rows, k_step = step.rows, _visited(k, step)
        p = _dot(q[rows], k_step).sub_(m_N1[rows]).exp2_()
        e = _dot(y8[rows], _visited(v8, step)).sub_(delta_N1[rows]).mul_(p)
        p8 = round_to_e4m3_(p)
        _add_to_visited(dv_DM, _dot(of_dv[rows].T.contiguous(), p8.T), step)
        e8 = round_to_e4m3_(e / of_tile[rows])
        _add_to_visited(dk_DM, _dot(of_dk[rows].T.contiguous(), e8.T), step)
        e8 = round_to_e4m3_(e.div_(of_rows[rows]))
        dq_ND[rows] = _dot(e8, k_step.T).mul_(scale * r_N1[rows] * of_rows[rows])
    return dq_ND, dk_DM, dv_DM.div_(c_D.unsqueeze(1))


def _of_tile(x_N: Tensor, task: Task) -> Tensor:
    """For each row the largest of its tile."""
    return _of_group(x_N, task.tile_of_row_N)


def _of_group(x_N: Tensor, group_N: Tensor) -> Tensor:
    """For each row the largest of its group; x is not negative."""
    largest = x_N.new_zeros(int(group_N.max()) + 1)
    return largest.scatter_reduce_(0, group_N, x_N, "amax")[group_N]


def round_to_e4m3_(x: Tensor) -> Tensor:
    """Rounds float32 of at most 448 to e4m3, in place and exactly, as a cast there and back would.

    Adding and taking away 1.5 * 2**20 times a number's power of two leaves three mantissa bits,
    rounded to nearest even. On CPU that is five times faster than the two casts.
    """
    power = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power.clamp_(min=E4M3_SMALLEST_NORMAL)
    return x.add_(power, alpha=1.5 * 2**20).sub_(power, alpha=1.5 * 2**20)


def _dot(x_RK: Tensor, y_MK: Tensor) -> Tensor:
    """x y^T, float32.

    Through oneDNN where torch has it: on AMD processors that is twice as fast as the MKL behind
    torch.mm. y is contiguous, or the transpose of what is.
    """
    if x_RK.device.type == "cpu" and torch.backends.mkldnn.enabled and ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x_RK, y_MK, None, "none", [], "")
    return torch.mm(x_RK, y_MK.T)


def _visited(x_MD: Tensor, step: Step) -> Tensor:
    """The rows of the keys that a step sees, contiguous."""
    if len(step.runs) == 1:
        return x_MD[step.runs[0]]
    return torch.cat([x_MD[run] for run in step.runs])


def _add_to_visited(total_DM: Tensor, x_DK: Tensor, step: Step) -> None:
    """Adds to the columns of the keys that a step sees."""
    parts = x_DK.split([run.stop - run.start for run in step.runs], dim=1)
    for run, part in zip(step.runs, parts, strict=True):
        total_DM[:, run] += part


def _run(
    function: Callable[[Task], Result], tasks: list[Task], device: torch.device
) -> Iterable[Result]:
    """The results of all tasks, in their order, on all cores."""
    if device.type != "cpu":
        return map(function, tasks)
    # Twice as many tasks as workers, if there are no more heads than that: none waits for long.
    share = sum(task.work for task in tasks) / (2 * threads.workers()) + 1
    parts = [part for task in tasks for part in _parts(task, math.ceil(task.work / share))]
    return threads.run(function, sorted(parts, key=lambda task: -task.work))


def _parts(task: Task, n: int) -> Iterator[Task]:
    """The steps of a task in n parts of about equal work."""
    done, first, part_of = 0, 0, task.work / max(n, 1)
    for last, step in enumerate(task.steps, 1):
        done += step.work
        if done >= part_of or last == len(task.steps):
            yield task._replace(steps=task.steps[first:last])
            done, first = 0, last


def _tasks(
    k_BGND: Tensor,
    modes_BH3: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask_BN: Tensor | None,
    *,
    whole_tiles: bool = False,
) -> list[Task]:
    """Every head of every batch element, with the steps of its list.

    whole_tiles: no query tile is parted between steps.
    """
    device = k_BGND.device
    real = torch.arange(gather.shape[1], device=gather.device) < valid[:, None]
    rows = gather[real].long().to(device)
    tile_of_row = torch.arange(len(valid), device=device).repeat_interleave(valid.to(device))
    row_counts = valid.tolist()
    heads_per_key_head = modes_BH3.shape[1] // k_BGND.shape[1]
    groupings_BG = key_groupings(modes_BH3, k_BGND.shape[1]).tolist()
    groups = groups.long().to(device)
    steps: dict[int, list[Step]] = {}
    tasks = []
    for b, modes in enumerate(modes_BH3.tolist()):
        keys, tile_of_key, key_counts = rows, tile_of_row, row_counts
        if key_mask_BN is not None:
            taking_part = key_mask_BN[b, rows]
            keys, tile_of_key = rows[taking_part], tile_of_row[taking_part]
            key_counts = torch.bincount(tile_of_key, minlength=len(valid)).tolist()
            steps = {}  # these depend on the mask
        for h, (pattern, dtype, grouping) in enumerate(modes):
            if pattern not in steps:
                given = list_ptr[pattern], list_idx, row_counts, key_counts, whole_tiles
                steps[pattern] = list(_steps(*given))
            g = h // heads_per_key_head
            tasks.append(
                Task(
                    b=b,
                    h=h,
                    g=g,
                    fp8=dtype == 1,
                    steps=steps[pattern],
                    rows_N=rows,
                    keys_M=keys,
                    tile_of_row_N=tile_of_row,
                    group_of_row_N=groups[grouping, tile_of_row],
                    group_of_key_M=groups[groupings_BG[b][g], tile_of_key],
                )
            )
    return tasks


def _steps(
    ptr: Tensor,
    list_idx: Tensor,
    row_counts: list[int],
    key_counts: list[int],
    whole_tiles: bool,
) -> Iterator[Step]:
    """The steps of a pattern in the order of their rows; those with no keys are left out."""
    bounds = ptr.tolist()
    visited = list_idx[bounds[0] : bounds[-1]].tolist()
    row_starts, key_starts = _starts(row_counts), _starts(key_counts)
    lists = [visited[a - bounds[0] : b - bounds[0]] for a, b in pairwise(bounds)]
    for key_tiles, same in groupby(range(len(lists)), key=lists.__getitem__):
        runs = _runs(key_tiles, key_starts)
        n_keys = sum(run.stop - run.start for run in runs)
        if n_keys == 0:
            continue
        query_tiles = list(same)
        start, end = row_starts[query_tiles[0]], row_starts[query_tiles[-1] + 1]
        most = max(SCORES_AT_ONCE // n_keys, ROWS_AT_ONCE)
        while start < end:
            stop = min(start + most, end)
            if whole_tiles:  # the last end of a tile up to there, at least that of the first
                first, last = bisect(row_starts, start), bisect(row_starts, stop) - 1
                stop = row_starts[max(first, last)]
            yield Step(slice(start, stop), runs, (stop - start) * n_keys)
            start = stop


def _runs(key_tiles: list[int], key_starts: list[int]) -> list[slice]:
    """The keys of some tiles as contiguous runs."""
    runs: list[slice] = []
    for w in key_tiles:
        start, stop = key_starts[w], key_starts[w + 1]
        if start == stop:
            continue
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(slice(start, stop))
    return runs


def _starts(counts: list[int]) -> list[int]:
    starts = [0]
    for n in counts:
        starts.append(starts[-1] + n)
    return starts


def _operands(q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, task: Task, scale: float) -> Operands:
    q = _infinite_to_nan_(_rows(q_BHND[task.b, task.h], task.rows_N))
    k = _infinite_to_nan_(_rows(k_BGND[task.b, task.g], task.keys_M))
    v = _infinite_to_nan_(_rows(v_BGND[task.b, task.g], task.keys_M))
    if not task.fp8:
        return Operands(q.mul_(scale * LOG2_E), k, v, q.new_zeros(len(q)), v.new_ones(v.shape[1]))
    mean_D = _finite_mean(k)
    shift_N = scale * q @ mean_D
    _round_per_group_(q, task.group_of_row_N)
    _round_per_group_(k.sub_(mean_D), task.group_of_key_M)
    return Operands(q.mul_(scale * LOG2_E), k, v, shift_N, _round_per_channel_(v))


def _rows(x_ND: Tensor, rows_M: Tensor) -> Tensor:
    """A float32 copy of some rows."""
    return x_ND.index_select(0, rows_M).float()


def _infinite_to_nan_(x: Tensor) -> Tensor:
    return x.add_(x - x)


def _finite_mean(k_MD: Tensor) -> Tensor:
    """Mean of the finite rows, [D]; zero where there is none."""
    if len(k_MD) == 0:
        return k_MD.new_zeros(k_MD.shape[1])
    finite = k_MD.amax(dim=1, keepdim=True).isnan().logical_not_()  # infinities are NaN by now
    total = torch.where(finite, k_MD, 0.0).sum(dim=0, dtype=torch.float64)
    return (total / finite.sum().clamp(min=1)).float()


def _round_per_group_(x_ND: Tensor, group_of_row_N: Tensor) -> None:
    if len(x_ND) > 0:
        amax_N = x_ND.abs().nan_to_num_(nan=0.0).amax(dim=1)
        _round_scaled_(x_ND, quantisation_scale(_of_group(amax_N, group_of_row_N))[:, None])


def _round_per_channel_(v_MD: Tensor) -> Tensor:
    """Returns the scale of each channel."""
    if len(v_MD) == 0:
        return v_MD.new_ones(v_MD.shape[1])
    s = quantisation_scale(v_MD.abs().nan_to_num_(nan=0.0).amax(dim=0))
    _round_scaled_(v_MD, s)
    return s


def _round_scaled_(x: Tensor, s: Tensor) -> None:
    round_to_e4m3_(x.div_(s).clamp_(-E4M3_MAX, E4M3_MAX)).mul_(s)
