"""What `fpsc::attention` asks of its arguments. Every error says what was expected and found."""

from __future__ import annotations

import torch
from torch import Tensor

from fpsc.kernels.select import select


def check_shapes(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    rows: Tensor,
    cells: Tensor,
    modes: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    site: int,
) -> None:
    """What shapes, dtypes and devices alone can tell; also for fake tensors.

    The lengths of the lists and tiles are compared in `check_values`: in a compiled graph they are
    symbols, because graphs are shared between grids, and comparing them would fix them.

    Raises: ValueError.
    """
    for name, x, dims in (
        ("q", q_BHND, "B, H, N, D"),
        ("k", k_BGND, "B, G, N, D"),
        ("v", v_BGND, "B, G, N, D"),
        ("rows", rows, "B"),
        ("cells", cells, "sites, noise rows, H"),
        ("modes", modes, "modes, 2"),
        ("list_ptr", list_ptr, "patterns, tiles + 1"),
        ("list_idx", list_idx, "key tiles of all lists"),
        ("gather", gather, "tiles, block"),
        ("valid", valid, "tiles"),
    ):
        expected = dims.count(",") + 1
        if x.ndim != expected:
            raise ValueError(
                f"{name}: expected {expected} dimensions [{dims}], got shape {list(x.shape)}"
            )
    B, H, N, D = q_BHND.shape
    G = k_BGND.shape[1]
    if k_BGND.shape != v_BGND.shape or (k_BGND.shape[0], *k_BGND.shape[2:]) != (B, N, D):
        raise ValueError(
            "k and v: expected [B, G, N, D] with the B, N and D of q (self-attention), got "
            f"q {list(q_BHND.shape)}, k {list(k_BGND.shape)}, v {list(v_BGND.shape)}; leave "
            "cross-attention to F.scaled_dot_product_attention"
        )
    if G == 0 or H % G != 0:
        raise ValueError(f"k and v: expected a number of heads that divides q's {H}, got {G}")
    if not q_BHND.dtype == k_BGND.dtype == v_BGND.dtype:
        raise ValueError(
            "q, k, v: expected one dtype, got "
            f"{q_BHND.dtype}, {k_BGND.dtype}, {v_BGND.dtype}; cast them first"
        )
    for name, x in (("k", k_BGND), ("v", v_BGND)):
        if x.device != q_BHND.device:
            raise ValueError(f"{name}: expected q's device {q_BHND.device}, got {x.device}")
    choice = select(q_BHND.device, q_BHND.dtype, D, fp8=False)
    if choice.name is None:
        raise ValueError(
            f"q, k, v: {choice.reason}; cast or pad them, or leave this attention to "
            "F.scaled_dot_product_attention"
        )
    if cells.shape[2] != H:
        raise ValueError(
            f"cells: expected a mode for each of the {H} heads of q, got {cells.shape[2]}; "
            "resolve the policy for this model's number of heads"
        )
    if not 0 <= site < cells.shape[0]:
        raise ValueError(
            f"site: expected 0 <= site < {cells.shape[0]} (the sites of cells), got {site}"
        )
    if modes.shape[1] != 2:
        raise ValueError(
            f"modes: expected 2 columns (pattern, dtype), got shape {list(modes.shape)}"
        )
    tables = {
        "rows": rows, "cells": cells, "modes": modes, "list_ptr": list_ptr,
        "list_idx": list_idx, "gather": gather, "valid": valid,
    }  # fmt: skip
    for name, x in tables.items():
        if x.dtype != torch.int32:
            raise ValueError(f"{name}: expected dtype torch.int32, got {x.dtype}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise ValueError(
                f"key_mask: expected dtype torch.bool (True takes part), got {key_mask.dtype}"
            )
        if key_mask.shape != (B, N):
            raise ValueError(
                f"key_mask: expected [B, N] = {[B, N]}, got shape {list(key_mask.shape)}"
            )


def check_values(
    N: int,
    modes_BH2: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    gather: Tensor,
    valid: Tensor,
) -> None:
    """What only the numbers can tell: the layout is one of N tokens, every index is in its range.

    Reads them on the host, O(N).

    Raises: ValueError.
    """
    if list_ptr.shape[1] != gather.shape[0] + 1 or valid.shape[0] != gather.shape[0]:
        raise ValueError(
            "list_ptr, gather, valid: expected tiles + 1, tiles and tiles entries of one layout, "
            f"got {list_ptr.shape[1]}, {gather.shape[0]} and {valid.shape[0]}"
        )
    counts, tiles = valid.tolist(), len(valid)
    if sum(counts) != N:
        raise ValueError(
            f"gather, valid: expected a layout of the {N} tokens of q, got one of {sum(counts)}; "
            "the grid with its text tokens does not match this sequence: pass the right grid"
        )
    if tiles and not 0 <= min(counts) <= max(counts) <= gather.shape[1]:
        raise ValueError(
            f"valid: expected 0..{gather.shape[1]} rows a tile, got {min(counts)}..{max(counts)}"
        )
    real = torch.arange(gather.shape[1], device=gather.device) < valid[:, None]
    positions = gather[real].long()
    if N and (int(positions.min()) < 0 or int(positions.max()) >= N):
        raise ValueError(
            f"gather: expected positions 0..{N - 1}, got "
            f"{int(positions.min())}..{int(positions.max())} in real rows"
        )
    if N and int(torch.bincount(positions, minlength=N).max()) > 1:
        raise ValueError("gather: expected every position once, got some of them twice")
    patterns = modes_BH2[..., 0]
    if patterns.numel() and not 0 <= int(patterns.min()) <= int(patterns.max()) < len(list_ptr):
        raise ValueError(
            f"modes: expected patterns 0..{len(list_ptr) - 1} (the rows of list_ptr), got "
            f"{int(patterns.min())}..{int(patterns.max())}"
        )
    if bool((list_ptr.diff(dim=1) < 0).any()) or (
        list_ptr.numel() and not 0 <= int(list_ptr.min()) <= int(list_ptr.max()) <= len(list_idx)
    ):
        raise ValueError(
            f"list_ptr: expected offsets that grow within 0..{len(list_idx)} (list_idx's length)"
        )
    if len(list_idx) and not 0 <= int(list_idx.min()) <= int(list_idx.max()) < tiles:
        raise ValueError(
            f"list_idx: expected tiles 0..{tiles - 1}, got "
            f"{int(list_idx.min())}..{int(list_idx.max())}"
        )
    starts = list_ptr[(list_ptr > 0) & (list_ptr < len(list_idx))].long()
    ascends = list_idx.diff() > 0
    ascends[starts - 1] = True
    if not bool(ascends.all()):
        raise ValueError("list_idx: expected each list to ascend, every key tile once; sort it")


def check_rows(batch: int, rows: Tensor, cells: Tensor, modes: Tensor) -> None:
    """One row a batch element, or one for all; rows and cells index the tables they name.

    Reads them on the host.

    Raises: ValueError.
    """
    if len(rows) not in (1, batch):
        raise ValueError(
            f"rows: expected one noise row a batch element ({batch}) or one for all, got "
            f"{len(rows)}; the timestep must hold one value, or one for each batch element"
        )
    for name, index, table, size in (
        ("rows", rows, "cells", cells.shape[1]),
        ("cells", cells, "modes", modes.shape[0]),
    ):
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(
                f"{name}: expected 0..{size - 1} (rows of {table}), got "
                f"{int(index.min())}..{int(index.max())}"
            )
