"""The custom ops: `fpsc::attention` and its backward, for eager, autograd, autocast and compile.

    fpsc::attention(q, k, v, rows, cells, modes, list_ptr, list_idx, back_ptr, back_idx, order,
                    groups, gather, valid, key_mask, scale, site, kinds, implementation,
                    q_weight, q_bias, q_rstd, k_weight, k_bias, k_rstd, cos, sin,
                    norm, epsilon, split, rotation, start, fp8_backward)
        -> (out, lse, shift, q8, k8, v8, q_scale, k_scale, v_scale, offset)

The mathematics is in `fpsc.kernels.reference`. All tables are int32 tensors, data and never
structure: changing a number in one recompiles nothing.

    rows       [B] or [1]              noise row of each batch element, or of all
    cells      [sites, noise rows, H]  mode of each head; `site` picks the first index
    modes      [modes, 3]              (pattern, dtype, grouping); dtype 0: computed in q's dtype,
                                       1: fp8
    list_ptr   [patterns, tiles + 1]   offsets into list_idx
    list_idx   [nnz]                   key tiles that a query tile visits, sorted
    back_ptr   [patterns, tiles + 1]   the transpose, for dk and dv: offsets into back_idx
    back_idx   [nnz]                   query tiles that visit a key tile, sorted
    order      [patterns, tiles]       the tiles of a pattern in the order in which a GPU takes them
                                       up: those with long lists first
    groups     [groupings, tiles]      group (0..tiles - 1) of each tile; in fp8 cells the tiles of
                                       a group share one scale of q and one of k
    gather     [tiles, block]          sequence position of each row of a tile; real rows first
    valid      [tiles]                 real rows of each tile
    key_mask   bool [B, N] or None     True: this key takes part

Head h of batch element b has mode m = cells[site, rows[b], h] and pattern p = modes[m, 0]; its
query tile u visits the key tiles list_idx[list_ptr[p, u] : list_ptr[p, u + 1]].

Three arguments are structure:

    kinds      the dtypes that cells may have: 1 for dtype 0, 2 for fp8, 3 for both
               (`fpsc.kernels.kinds`). Kernels of a kind that is left out are not launched.
    implementation
               "auto" or the name of one, which then serves the call or is an error. `kernel` in
               all other places: Inductor passes an op's defaults by name, and has its own `kernel`
    fp8_backward
               the products of backward are FP8 too, in fp8 cells

What follows is a norm of q and of k and a rotation of both that are done in the op, in front of all
else; by default there is neither. `fpsc.kernels.before` says what they compute, its classes what
each argument is. All but cos and sin are differentiable.

The outputs behind lse are what backward needs of fp8 cells: `fpsc.kernels.saved`. They have no
elements where the implementation or `kinds` has no use for them.

Under autocast the op casts q, k and v as F.scaled_dot_product_attention does.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fpsc.kernels.before import Before, before_of, gradients
from fpsc.kernels.checks import (
    check_before,
    check_lengths,
    check_rows,
    check_shapes,
    check_values,
)
from fpsc.kernels.kinds import ALL_CELLS, FP8_CELLS, INPUT_CELLS
from fpsc.kernels.saved import Saved, empty_saved, new_saved
from fpsc.kernels.select import PACKING, select

IMPLEMENTATIONS = {
    "cpu": "fpsc.kernels.cpu",
    "triton": "fpsc.kernels.triton.attention",
    "gluon": "fpsc.kernels.gluon.attention",
    "hopper": "fpsc.kernels.hopper",
    "reference": "fpsc.kernels.reference",
}
"""By the name of a `Choice`: modules with `forward` and `backward`, imported when they are chosen.

    forward(q, k, v, modes_BH3, list_ptr, list_idx, order, groups, gather, valid, key_mask, scale,
            kinds, before, fp8_backward) -> (out, lse, saved)
    backward(dout, q, k, v, out, lse, saved, modes_BH3, list_ptr, list_idx, back_ptr, back_idx,
             order, groups, gather, valid, key_mask, scale, kinds, fp8_backward) -> (dq, dk, dv)

saved is a `Saved`, or None where backward needs none of it. before is a
`fpsc.kernels.before.Before`; q and k of backward are what it has made of them.
"""

Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: Tensor,
    cells: Tensor,
    modes: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    site: int = 0,
    kinds: int = ALL_CELLS,
    kernel: str = "auto",
    fp8_backward: bool = False,
    **before: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of q over the key tiles that the tables name, by keyword.

    q [B, H, N, D], k and v [B, G, N, D] with G dividing H; float32, bfloat16 or float16; D 16..256;
    any strides. Tables, kinds, kernel, fp8_backward and what may be in front of q and k (`before`):
    see the module. scale: D ** -0.5 where None.

    Returns out [B, H, N, D] in q's dtype, whose memory is [B, N, H, D]-contiguous, and lse [B, H,
    N] float32: log of the sum of exp(scale q.k) over the keys seen. A query that sees none gets 0
    and -inf. out is differentiable in q, k and v; lse is not.

    Raises: ValueError, naming the argument, what was expected and what was found. What the numbers
    in the tables alone can tell is checked on the CPU only: nothing is read from another device.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return torch.ops.fpsc.attention(
        q, k, v, rows, cells, modes, list_ptr, list_idx, back_ptr, back_idx, order, groups, gather,
        valid, key_mask, scale, site, kinds, kernel, **before, fp8_backward=fp8_backward,
    )[:2]  # fmt: skip


def resolve_modes(batch: int, rows: Tensor, cells: Tensor, modes: Tensor, site: int) -> Tensor:
    """(pattern, dtype, grouping) of each batch element and head, int32 [B, H, 3]."""
    mode_BH = cells[site].index_select(0, rows).expand(batch, -1)
    return modes.index_select(0, mode_BH.flatten()).unflatten(0, mode_BH.shape)


@torch.library.custom_op("fpsc::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cells: Tensor,
    modes: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
    site: int,
    kinds: int = ALL_CELLS,
    implementation: str = "auto",
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    q_rstd: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    k_rstd: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str = "none",
    epsilon: float = 1e-6,
    split: int = 0,
    rotation: str = "none",
    start: int = 0,
    fp8_backward: bool = False,
) -> Outputs:
    lists = (list_ptr, list_idx, back_ptr, back_idx, order, groups, gather, valid)
    before = (
        q_weight, q_bias, q_rstd, k_weight, k_bias, k_rstd, cos, sin, norm, epsilon, split,
        rotation, start,
    )  # fmt: skip
    check_shapes(q, k, v, rows, cells, modes, *lists, key_mask, site, kinds, implementation)
    check_before(q, k, *before)
    check_lengths(q.shape[0], rows, *lists)
    check_rows(rows, cells, modes)
    modes_BH3 = resolve_modes(q.shape[0], rows, cells, modes, site)
    check_values(q.shape[2], modes_BH3, *lists, kinds)
    with torch.autocast(q.device.type, enabled=False):
        out, lse, saved = _implementation(q, kinds, implementation).forward(
            q, k, v, modes_BH3, list_ptr, list_idx, order, groups, gather, valid, key_mask, scale,
            kinds, before=before_of(*before), fp8_backward=fp8_backward,
        )  # fmt: skip
    return out, lse, *(empty_saved(q.device) if saved is None else saved)


@_attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cells: Tensor,
    modes: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
    site: int,
    kinds: int = ALL_CELLS,
    implementation: str = "auto",
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    q_rstd: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    k_rstd: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str = "none",
    epsilon: float = 1e-6,
    split: int = 0,
    rotation: str = "none",
    start: int = 0,
    fp8_backward: bool = False,
) -> Outputs:
    lists = (list_ptr, list_idx, back_ptr, back_idx, order, groups, gather, valid)
    before = (
        q_weight, q_bias, q_rstd, k_weight, k_bias, k_rstd, cos, sin, norm, epsilon, split,
        rotation, start,
    )  # fmt: skip
    check_shapes(q, k, v, rows, cells, modes, *lists, key_mask, site, kinds, implementation)
    check_before(q, k, *before)
    B, H, N, D = q.shape
    out = q.new_empty(B, N, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    saves = _chosen(q, kinds, implementation) in PACKING and kinds & FP8_CELLS
    if not saves:
        return out, lse, *empty_saved(q.device)
    return out, lse, *new_saved(q, k, *gather.shape, offsets=fp8_backward)


@torch.library.custom_op("fpsc::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    shift: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    offset: Tensor,
    modes_BH3: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
    kinds: int,
    implementation: str,
    fp8_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = (list_ptr, list_idx, back_ptr, back_idx, order, groups, gather, valid)
    check_values(out.shape[2], modes_BH3, *lists, kinds)
    given = Saved(shift, q8, k8, v8, q_scale, k_scale, v_scale, offset)
    saved = given if shift.numel() else None
    with torch.autocast(out.device.type, enabled=False):
        return _implementation(out, kinds, implementation).backward(
            dout, q, k, v, out, lse, saved, modes_BH3, *lists, key_mask, scale, kinds,
            fp8_backward=fp8_backward,
        )  # fmt: skip


@_attention_backward.register_fake
def _attention_backward_fake(
    dout: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    shift: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    offset: Tensor,
    modes_BH3: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
    kinds: int,
    implementation: str,
    fp8_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, N, D = out.shape
    if q is None or k is None or v is None:  # then k8 is there
        dk, dv = (out.new_empty(B, k8.shape[1], N, D) for _ in range(2))
        return out.new_empty(out.shape), dk, dv
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _chosen(q: Tensor, kinds: int, kernel: str) -> str:
    choice = select(q.device, q.dtype, q.shape[-1], fp8=bool(kinds & FP8_CELLS), kernel=kernel)
    assert choice.name is not None, choice.reason  # check_shapes asked before
    return choice.name


def _implementation(q: Tensor, kinds: int, kernel: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[_chosen(q, kinds, kernel)])


TABLES = 16
"""Arguments between v and q_weight."""

TENSORS = 8
"""Arguments from q_weight to sin."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    q, k, v, *tables = inputs[: 3 + TABLES]
    rows, cells, modes, *lists, key_mask, scale, site, kinds, kernel = tables
    *before, fp8_backward = inputs[3 + TABLES :]
    norm = before_of(*before).norm_q
    # The tables may be edited before backward runs; what they said of this call may not change.
    modes_BH3 = resolve_modes(q.shape[0], rows, cells, modes, site)
    if not kinds & INPUT_CELLS and _chosen(q, kinds, kernel) in PACKING:
        v = None  # backward uses the FP8 tensors, and a norm what it was given
        if norm is None:
            q = k = None
    ctx.save_for_backward(q, k, v, *output, modes_BH3, *lists, key_mask, *before[:TENSORS])
    ctx.others, ctx.before = (scale, kinds, kernel, fp8_backward), before[TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    tables, structure = (None,) * TABLES, (None,) * 8  # cos, sin and what is no tensor
    if dout is None:
        return None, None, None, *tables, *(None,) * 6, *structure
    q, k, v, *saved = ctx.saved_tensors
    before = before_of(*saved[-TENSORS:], *ctx.before)
    seen_q, seen_k = q, k
    if before and v is None:
        seen_q = seen_k = None
    elif before:
        seen_q, seen_k = _seen(before, q, k, *ctx.others[1:3])
    dq, dk, dv = torch.ops.fpsc.attention_backward(
        dout, seen_q, seen_k, v, *saved[:-TENSORS], *ctx.others
    )
    if not before:
        return dq, dk, dv, *tables, *(None,) * 6, *structure
    of_q = gradients(dq, q, before.norm_q, before.rotation)
    of_k = gradients(dk, k, before.norm_k, before.rotation)
    x = (g.x if y is None else g.x.to(y.dtype) for g, y in ((of_q, q), (of_k, k)))
    return *x, dv, *tables, *of_q[1:], *of_k[1:], *structure


def _seen(before: Before, q: Tensor, k: Tensor, kinds: int, kernel: str) -> tuple[Tensor, Tensor]:
    """What the products of forward saw in place of q and k."""
    with torch.autocast(q.device.type, enabled=False):
        made = before.apply(q, k)
    if _chosen(q, kinds, kernel) in PACKING:
        return made[0].to(q.dtype), made[1].to(k.dtype)
    return made


_attention.register_autograd(_backward, setup_context=_save)


def _register_autocast(device_type: str, key: str) -> None:
    """Casts q, k and v to autocast's dtype. `register_autocast` would fix that dtype here."""

    def cast(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Outputs:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.fpsc.attention(q.to(dtype), k.to(dtype), v.to(dtype), *others)

    _library.impl("attention", cast, key)


_library = torch.library.Library("fpsc", "FRAGMENT")
_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
