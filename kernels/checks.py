"""What `fpsc::attention` asks of its arguments. Every error says what was expected and found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpsc.kernels.before import ACROSS, HALF_SPLIT, INTERLEAVED, LAYER, NORMS, RMS, ROTATIONS
from fpsc.kernels.kinds import ALL_CELLS, FP8_CELLS, INPUT_CELLS
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
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    site: int,
    kinds: int,
    kernel: str,
) -> None:
    """What shapes, dtypes and devices alone can tell; also for fake tensors.

    The lengths of the lists and tiles are compared in `check_lengths`: in a compiled graph they are
    symbols, because graphs are shared between grids, and comparing them would fix them.

    Raises: ValueError.
    """
    tables = {
        "rows": (rows, "B"),
        "cells": (cells, "sites, noise rows, H"),
        "modes": (modes, "modes, 3"),
        "list_ptr": (list_ptr, "patterns, tiles + 1"),
        "list_idx": (list_idx, "key tiles of all lists"),
        "back_ptr": (back_ptr, "patterns, tiles + 1"),
        "back_idx": (back_idx, "query tiles of all lists"),
        "order": (order, "patterns, tiles"),
        "groups": (groups, "groupings, tiles"),
        "gather": (gather, "tiles, block"),
        "valid": (valid, "tiles"),
    }
    heads = {"q": (q_BHND, "B, H, N, D"), "k": (k_BGND, "B, G, N, D"), "v": (v_BGND, "B, G, N, D")}
    for name, (x, dims) in (heads | tables).items():
        expected = dims.count(",") + 1
        if x.ndim != expected:
            raise ValueError(
                f"{name}: expected {expected} dimensions [{dims}], got shape {list(x.shape)}"
            )
    B, H, N, D = q_BHND.shape
    G = k_BGND.shape[1]
    if any(_differ(x.shape, (B, G, N, D)) for x in (k_BGND, v_BGND)):
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
    if kinds not in (INPUT_CELLS, FP8_CELLS, ALL_CELLS):
        raise ValueError(
            f"kinds: expected 1 (cells in the input's dtype), 2 (fp8) or 3 (both), got {kinds}"
        )
    choice = select(q_BHND.device, q_BHND.dtype, D, fp8=bool(kinds & FP8_CELLS), kernel=kernel)
    if choice.name is None:
        hint = "cast or pad them, or leave this attention to F.scaled_dot_product_attention"
        raise ValueError(f"q, k, v: {choice.reason}" + (f"; {hint}" if kernel == "auto" else ""))
    if cells.shape[2] != H:
        raise ValueError(
            f"cells: expected a mode for each of the {H} heads of q, got {cells.shape[2]}; "
            "resolve the policy for this model's number of heads"
        )
    if not 0 <= site < cells.shape[0]:
        raise ValueError(
            f"site: expected 0 <= site < {cells.shape[0]} (the sites of cells), got {site}"
        )
    if modes.shape[1] != 3:
        raise ValueError(
            f"modes: expected 3 columns (pattern, dtype, grouping), got shape {list(modes.shape)}"
        )
    for name, (x, _) in tables.items():
        if x.dtype != torch.int32:
            raise ValueError(f"{name}: expected dtype torch.int32, got {x.dtype}")
        if x.device != q_BHND.device:
            raise ValueError(f"{name}: expected q's device {q_BHND.device}, got {x.device}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise ValueError(
                f"key_mask: expected dtype torch.bool (True takes part), got {key_mask.dtype}"
            )
        if _differ(key_mask.shape, (B, N)):
            raise ValueError(
                f"key_mask: expected [B, N] = {[B, N]}, got shape {list(key_mask.shape)}"
            )


def check_before(
    q_BHND: Tensor,
    k_BGND: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    q_rstd: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    k_rstd: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    epsilon: float,
    split: int,
    rotation: str,
    start: int,
) -> None:
    """What shapes alone tell of the norm and the rotation in front of q and k.

    Raises: ValueError.
    """
    for choice, chosen, known in (("norm", norm, NORMS), ("rotation", rotation, ROTATIONS)):
        if chosen not in known:
            raise ValueError(f"{choice}: expected one of {', '.join(known)}, found {chosen!r}")
    B, _, N, D = q_BHND.shape
    sides = (("q", q_BHND, q_weight, q_bias, q_rstd), ("k", k_BGND, k_weight, k_bias, k_rstd))
    for side, x, weight, bias, rstd in sides:
        given = (("weight", weight, NORMS[1:]), ("bias", bias, (LAYER,)), ("rstd", rstd, (ACROSS,)))
        for name, value, norms in given:
            if value is None:
                continue
            if norm not in norms:
                expected = " or ".join(norms)
                raise ValueError(f"{side}_{name}: expected norm {expected} with it, found {norm!r}")
            if value.device != x.device:
                raise ValueError(
                    f"{side}_{name}: expected q's device {x.device}, got {value.device}"
                )
        for name, value in (("weight", weight), ("bias", bias)):
            widths = (D,) if norm in (RMS, LAYER) else (D, x.shape[1] * D)
            if value is not None and (
                value.ndim not in (1, 2)
                or not _is_one_of(value.shape[-1], widths)
                or (value.ndim == 2 and not _is_one_of(value.shape[0], (1, 2)))
            ):
                expected = " or ".join(map(str, widths))
                raise ValueError(
                    f"{side}_{name}: expected [C] or [2, C] with C = {expected}, got shape "
                    f"{list(value.shape)}"
                )
        if weight is not None and bias is not None and _differ_in_rank_or_size(weight, bias):
            raise ValueError(
                f"{side}_bias: expected the shape of {side}_weight, {list(weight.shape)}, got "
                f"{list(bias.shape)}"
            )
        if rstd is not None and (
            rstd.dtype != torch.float32 or rstd.ndim != 2 or _differ(rstd.shape, (B, N))
        ):
            raise ValueError(
                f"{side}_rstd: expected float32 [B, N] = {[B, N]}, got {rstd.dtype} "
                f"{list(rstd.shape)}"
            )
    if rotation not in (INTERLEAVED, HALF_SPLIT):
        return
    if cos is None or sin is None:
        raise ValueError(f"cos, sin: expected tables for rotation {rotation!r}, got none")
    if _is_known(D % 2 != 0):
        raise ValueError(f"rotation: expected an even head_dim, got {D}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.device != q_BHND.device:
            raise ValueError(f"{name}: expected q's device {q_BHND.device}, got {table.device}")
        if (
            table.ndim != 4
            or not table.is_floating_point()
            or not _is_one_of(table.shape[3], (D, D // 2))
            or not all(_is_one_of(table.shape[1], (1, x.shape[1])) for x in (q_BHND, k_BGND))
            or not _is_one_of(table.shape[0], (1, B))
        ):
            raise ValueError(
                f"{name}: expected floating point [1 or B, 1 or H, tokens, D or D / 2] for q "
                f"{list(q_BHND.shape)} and k {list(k_BGND.shape)}, got {table.dtype} "
                f"{list(table.shape)}"
            )
    if _differ(cos.shape, sin.shape):
        raise ValueError(f"sin: expected cos's shape {list(cos.shape)}, got {list(sin.shape)}")
    if _is_known(start < 0) or _is_known(start + cos.shape[2] > N):
        raise ValueError(
            f"start: expected the {cos.shape[2]} tokens of cos within the {N} of q, got {start}"
        )


def _differ_in_rank_or_size(x: Tensor, y: Tensor) -> bool:
    return x.ndim != y.ndim or _differ(x.shape, y.shape)


def _differ(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether sizes are known to differ. Of those that depend on data nothing is known in advance:
    they are looked at when the op runs."""
    pairs = zip(found, expected, strict=True)
    return any(_is_known(f != e) for f, e in pairs)


def _is_one_of(found: int, expected: Sequence[int]) -> bool:
    """Whether a size is not known to differ from all of these."""
    return not all(_is_known(found != e) for e in expected)


def _is_known(condition: bool | torch.SymBool) -> bool:
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # only where graphs are made

    return guard_or_false(condition)


def check_lengths(
    batch: int,
    rows: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
) -> None:
    """Whether the lengths of the tables fit each other. Reads shapes only, on any device.

    Raises: ValueError.
    """
    if len(rows) not in (1, batch):
        raise ValueError(
            f"rows: expected one noise row a batch element ({batch}) or one for all, got "
            f"{len(rows)}; the timestep must hold one value, or one for each batch element"
        )
    tiles = len(valid)
    for name, found, expected in (
        ("gather", len(gather), tiles),
        ("list_ptr", list_ptr.shape[1], tiles + 1),
        ("back_ptr", back_ptr.shape[1], tiles + 1),
        ("order", order.shape[1], tiles),
        ("groups", groups.shape[1], tiles),
    ):
        if found != expected:
            raise ValueError(
                f"{name}: expected {expected} entries for the {tiles} tiles of valid, got {found}; "
                "take all tables from one layout"
            )
    for name, found, expected in (
        ("back_ptr", len(back_ptr), len(list_ptr)),
        ("order", len(order), len(list_ptr)),
        ("back_idx", len(back_idx), len(list_idx)),
    ):
        if found != expected:
            other = "list_idx" if name == "back_idx" else "list_ptr"
            raise ValueError(f"{name}: expected the {expected} entries of {other}, got {found}")


def check_rows(rows: Tensor, cells: Tensor, modes: Tensor) -> None:
    """Whether rows and cells index the tables they name.

    On the CPU only: from another device nothing may be read, because that would wait for it, and a
    recording of a CUDA graph does not allow it.

    Raises: ValueError.
    """
    if rows.device.type != "cpu":
        return
    _check_range("rows", rows, cells.shape[1], "rows of cells")
    _check_range("cells", cells, modes.shape[0], "rows of modes")


def check_values(
    N: int,
    modes_BH3: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    back_ptr: Tensor,
    back_idx: Tensor,
    order: Tensor,
    groups: Tensor,
    gather: Tensor,
    valid: Tensor,
    kinds: int,
) -> None:
    """What only the numbers can tell: the layout is one of N tokens, every index is in its range.

    On the CPU only, as `check_rows`: elsewhere the tables are taken at their word. O(N + list_idx),
    and O(tiles ** 2) for each pattern in use.

    Raises: ValueError.
    """
    if modes_BH3.device.type != "cpu":
        return
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
    real = torch.arange(gather.shape[1]) < valid[:, None]
    positions = gather[real].long()
    if N and (int(positions.min()) < 0 or int(positions.max()) >= N):
        raise ValueError(
            f"gather: expected positions 0..{N - 1}, got "
            f"{int(positions.min())}..{int(positions.max())} in real rows"
        )
    if N and int(torch.bincount(positions, minlength=N).max()) > 1:
        raise ValueError("gather: expected every position once, got some of them twice")
    patterns, dtypes, groupings = modes_BH3.flatten(0, 1).unbind(1)
    _check_range("modes: patterns", patterns, len(list_ptr), "rows of list_ptr")
    _check_range("modes: dtypes", dtypes, 2, "0 is q's dtype, 1 is fp8")
    _check_range("modes: groupings", groupings, len(groups), "rows of groups")
    left_out = set(dtypes.tolist()) - {dtype for dtype in (0, 1) if kinds >> dtype & 1}
    if left_out:
        raise ValueError(f"kinds: {kinds} leaves out dtype {left_out.pop()}, which cells have")
    _check_range("groups", groups, tiles, "tiles")
    _check_lists("list", list_ptr, list_idx, tiles)
    _check_lists("back", back_ptr, back_idx, tiles)
    for pattern in patterns.unique().tolist():
        seen = _pairs(list_ptr[pattern], list_idx)
        if not torch.equal(seen.T, _pairs(back_ptr[pattern], back_idx)):
            raise ValueError(
                f"back_ptr, back_idx: expected the transpose of list_ptr and list_idx, which "
                f"pattern {pattern} is not"
            )
    if not torch.equal(order.sort(dim=1).values, torch.arange(tiles).int().expand_as(order)):
        raise ValueError(f"order: expected every tile 0..{tiles - 1} once for each pattern")


def _check_range(name: str, x: Tensor, size: int, what: str) -> None:
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < size:
        raise ValueError(
            f"{name}: expected 0..{size - 1} ({what}), got {int(x.min())}..{int(x.max())}"
        )


def _check_lists(name: str, ptr: Tensor, idx: Tensor, tiles: int) -> None:
    """Offsets grow within idx; every list ascends, within the tiles."""
    if bool((ptr.diff(dim=1) < 0).any()) or (
        ptr.numel() and not 0 <= int(ptr.min()) <= int(ptr.max()) <= len(idx)
    ):
        raise ValueError(
            f"{name}_ptr: expected offsets that grow within 0..{len(idx)} ({name}_idx's length)"
        )
    _check_range(f"{name}_idx", idx, tiles, "tiles")
    starts = ptr[(ptr > 0) & (ptr < len(idx))].long()
    ascends = idx.diff() > 0
    ascends[starts - 1] = True
    if not bool(ascends.all()):
        raise ValueError(f"{name}_idx: expected each list to ascend, every tile once; sort it")


def _pairs(ptr: Tensor, idx: Tensor) -> Tensor:
    """bool [TILES, TILES]: what is in the list of each tile. ptr [TILES + 1]."""
    tiles = len(ptr) - 1
    pairs = torch.zeros(tiles, tiles, dtype=torch.bool)
    owners = torch.arange(tiles).repeat_interleave(ptr.diff())
    pairs[owners, idx[int(ptr[0]) : int(ptr[-1])].long()] = True
    return pairs
