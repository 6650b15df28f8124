"""The attention itself, for people without a compiler."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from fpsc.grid import layout
from fpsc.kernels import ops
from fpsc.kernels.select import fp8_support
from fpsc.passes.rewrite import PLAN
from fpsc.policy import Policy
from fpsc.policy.resolve import kinds_of, plan, resolve


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    pattern: str | None = None,
    keep: float | None = None,
    window: Sequence[int] | None = None,
    dtype: str = "fp8",
    tile: Sequence[int] | str = "auto",
    prefix: int = 0,
    suffix: int = 0,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    backward: str = "bf16",
) -> Tensor:
    """Tile-wise block-sparse attention over the tokens of a video.

    Args:
        q: [B, H, N, D]; k, v: [B, G, N, D] with G dividing H; float32, bfloat16 or float16.
        grid: (T, Y, X) of the video tokens, in raster order; N = prefix + T*Y*X + suffix.
        pattern, keep, window, dtype: a mode, as in a policy file. `keep` is the fraction of video
            key tiles that each query tile visits, `window` a box of tiles; give one of them.
        tile: (t, y, x) tokens of a tile, or `auto`.
        prefix, suffix: text tokens before and after the video, which attend and are seen densely.
        key_mask: bool [B, N], True for keys that take part.
        scale: of the scores; 1 / sqrt(D) by default.
        kernel: `auto`, or the name of the only implementation that may run
            (`fpsc.kernels.select.KERNELS`).
        backward: `fp8` for products of backward in FP8 where `dtype` is fp8; else `bf16`.

    Returns:
        [B, H, N, D] in q's dtype. Differentiable.

    Raises:
        PolicyError: the mode is not one that a policy may have.
        ValueError: shapes do not fit each other, or not the grid; `backward` is neither.
    """
    if backward not in ("bf16", "fp8"):
        raise ValueError(f"backward: expected bf16 or fp8, found {backward!r}")
    if keep is None and window is None:
        keep = 1.0
    if pattern is None:
        pattern = "window" if window is not None else "near" if keep != 1.0 else "dense"
    size = ("keep", keep) if window is None else ("window", tuple(window))
    if len(grid) != 3:
        raise ValueError(f"grid: expected three positive integers (T, Y, X), found {tuple(grid)}")
    t, y, x = map(int, grid)
    if prefix + t * y * x + suffix != q.shape[2]:
        raise ValueError(
            f"grid: expected prefix + T*Y*X + suffix = {q.shape[2]}, the tokens of q, got "
            f"{prefix} + {t}*{y}*{x} + {suffix} = {prefix + t * y * x + suffix}"
        )
    tables = _tables(
        (("pattern", pattern), ("dtype", dtype), size),
        tile if isinstance(tile, str) else tuple(tile),
        (t, y, x),
        prefix,
        suffix,
        q.shape[1],
        q.device,
    )
    rows = torch.zeros(1, dtype=torch.int32, device=q.device)
    out, _ = ops.attention(
        q, k, v, rows=rows, key_mask=key_mask, scale=scale, kernel=kernel,
        fp8_backward=backward == "fp8", **tables,
    )  # fmt: skip
    return out


@lru_cache(maxsize=64)
def _tables(
    mode: tuple[tuple[str, Any], ...],
    tile: tuple[int, ...] | str,
    grid: tuple[int, int, int],
    prefix: int,
    suffix: int,
    heads: int,
    device: torch.device,
) -> dict[str, Any]:
    """What `ops.attention` takes of a policy that has this one mode."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in mode}
    policy = Policy.from_dict(
        {
            "fpsc": 1,
            "tile": tile if isinstance(tile, str) else list(tile),
            "modes": {"only": plain},
            "schedule": [{"noise": "1..0", "use": "only"}],
        }
    )
    fp8, reason = fp8_support(device)
    if not fp8 and kinds_of(policy, True) != kinds_of(policy, False):
        warn(f"fpsc.attention: fp8 is computed in the input's dtype: {reason}", stacklevel=3)
    table = resolve(policy, layers=1, heads=heads, fp8=fp8)
    lists = plan(policy, layout(grid, policy.tile_for(grid), prefix, suffix))
    found = {"cells": table.cells, "modes": table.modes}
    found |= {name: getattr(lists, name) for name in PLAN}
    with torch.inference_mode(False):  # they are kept for calls that differentiate, too
        tensors = {name: tensor.to(device) for name, tensor in found.items()}
    return tensors | {"kinds": kinds_of(policy, fp8)}
