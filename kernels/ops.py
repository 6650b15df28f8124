"""The custom ops: `fpsc::attention` and its backward, for eager, autograd, autocast and compile.

    fpsc::attention(q, k, v, rows, cells, modes, list_ptr, list_idx, gather, valid, key_mask,
                    scale, site) -> (out, lse)

The mathematics is in `fpsc.kernels.reference`. All tables are int32 tensors, data and never
structure: changing a number in one recompiles nothing.

    rows       [B] or [1]              noise row of each batch element, or of all
    cells      [sites, noise rows, H]  mode of each head; `site` picks the first index
    modes      [modes, 2]              (pattern, dtype); dtype 0: computed in q's dtype, 1: fp8
    list_ptr   [patterns, tiles + 1]   offsets into list_idx
    list_idx   [nnz]                   key tiles that a query tile visits, sorted
    gather     [tiles, block]          sequence position of each row of a tile; real rows first
    valid      [tiles]                 real rows of each tile
    key_mask   bool [B, N] or None     True: this key takes part

Head h of batch element b has mode m = cells[site, rows[b], h] and pattern p = modes[m, 0]; its
query tile u visits the key tiles list_idx[list_ptr[p, u] : list_ptr[p, u + 1]].

Under autocast the op casts q, k and v as F.scaled_dot_product_attention does.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fpsc.kernels import cpu
from fpsc.kernels.checks import check_rows, check_shapes, check_values
from fpsc.kernels.select import select

IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu}
"""By the name of a `Choice`: modules with `forward` and `backward`."""


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
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of q over the key tiles that the tables name, by keyword.

    q [B, H, N, D], k and v [B, G, N, D] with G dividing H; float32, bfloat16 or float16; D 16..256;
    any strides. Tables: see the module. scale: D ** -0.5 where None.

    Returns out [B, H, N, D] in q's dtype, whose memory is [B, N, H, D]-contiguous, and lse [B, H,
    N] float32: log of the sum of exp(scale q.k) over the keys seen. A query that sees none gets 0
    and -inf. out is differentiable in q, k and v; lse is not.

    Raises: ValueError, naming the argument, what was expected and what was found.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return torch.ops.fpsc.attention(
        q, k, v, rows, cells, modes, list_ptr, list_idx, gather, valid, key_mask, scale, site
    )


def resolve_modes(batch: int, rows: Tensor, cells: Tensor, modes: Tensor, site: int) -> Tensor:
    """(pattern, dtype) of each batch element and head, int32 [B, H, 2]."""
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
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    check_shapes(q, k, v, rows, cells, modes, list_ptr, list_idx, gather, valid, key_mask, site)
    check_rows(q.shape[0], rows, cells, modes)
    modes_BH2 = resolve_modes(q.shape[0], rows, cells, modes, site)
    check_values(q.shape[2], modes_BH2, list_ptr, list_idx, gather, valid)
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(q).forward(
            q, k, v, modes_BH2, list_ptr, list_idx, gather, valid, key_mask, scale
        )


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
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    check_shapes(q, k, v, rows, cells, modes, list_ptr, list_idx, gather, valid, key_mask, site)
    B, H, N, D = q.shape
    return q.new_empty(B, N, H, D).transpose(1, 2), q.new_empty(B, H, N, dtype=torch.float32)


@torch.library.custom_op("fpsc::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    modes_BH2: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_values(q.shape[2], modes_BH2, list_ptr, list_idx, gather, valid)
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(q).backward(
            dout, q, k, v, out, lse, modes_BH2, list_ptr, list_idx, gather, valid, key_mask, scale
        )


def _implementation(q: Tensor) -> ModuleType:
    choice = select(q.device, q.dtype, q.shape[-1], fp8=True)
    assert choice.name is not None, choice.reason  # check_shapes asked before
    return IMPLEMENTATIONS[choice.name]


@_attention_backward.register_fake
def _attention_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    modes_BH2: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rows, cells, modes, list_ptr, list_idx, gather, valid, key_mask, scale, site = inputs
    out, lse = output
    # The tables may be edited before backward runs; what they said of this call may not change.
    modes_BH2 = resolve_modes(q.shape[0], rows, cells, modes, site)
    ctx.save_for_backward(q, k, v, out, lse, modes_BH2, list_ptr, list_idx, gather, valid, key_mask)
    ctx.scale = scale
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    tables = (None,) * 10
    if dout is None:
        return None, None, None, *tables
    grads = torch.ops.fpsc.attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return *grads, *tables


_attention.register_autograd(_backward, setup_context=_save)


def _register_autocast(device_type: str, key: str) -> None:
    """Casts q, k and v to autocast's dtype. `register_autocast` would fix that dtype here."""

    def cast(q: Tensor, k: Tensor, v: Tensor, *tables: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.fpsc.attention(q.to(dtype), k.to(dtype), v.to(dtype), *tables)

    _library.impl("attention", cast, key)


_library = torch.library.Library("fpsc", "FRAGMENT")
_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
