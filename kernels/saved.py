"""What forward of `fpsc::attention` leaves for backward of its fp8 cells, and its shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


class Saved(NamedTuple):
    """The operands of the fp8 cells as their products saw them, in tile order.

    DP is `padded_head_dim(D)`. What belongs to no fp8 cell, and padding, is not defined but where
    said so.
    """

    shift: Tensor
    """float32 [B, H, N]: what the mean of K took from every score, scale * q . mu; 0 in cells of
    the input's dtype."""

    q8: Tensor
    """e4m3 [B, H, TILES, BLOCK, DP]"""

    k8: Tensor
    """e4m3 [B, G, TILES, BLOCK, DP], less its mean"""

    v8: Tensor
    """e4m3 [B, G, DP, TILES * BLOCK]: transposed"""

    q_scale: Tensor
    """float32 [B, H, TILES]"""

    k_scale: Tensor
    """float32 [B, G, TILES]"""

    v_scale: Tensor
    """float32 [B, G, DP]"""

    offset: Tensor
    """float32 [B, H, N]: m, what was taken from the scores of a query; not of those that see no
    key. No elements where backward has its products in 16 bits, which do without."""


def offset_of(saved: Saved) -> Tensor | None:
    """`Saved.offset`, or None where it is not wanted."""
    return saved.offset if saved.offset.numel() else None


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least 32."""
    return max(32, 1 << (head_dim - 1).bit_length())


def empty_saved(device: torch.device) -> Saved:
    """For kernels that save nothing: no elements."""
    return Saved(*(torch.empty(0, dtype=dtype, device=device) for dtype in _DTYPES))


def new_saved(
    q_BHND: Tensor, k_BGND: Tensor, tiles: int, block: int, *, offsets: bool = False
) -> Saved:
    """Uninitialised memory for all of it, `offset` where it is wanted."""
    B, H, N, D = q_BHND.shape
    G, DP = k_BGND.shape[1], padded_head_dim(D)
    shapes = (
        (B, H, N),
        (B, H, tiles, block, DP),
        (B, G, tiles, block, DP),
        (B, G, DP, tiles * block),
        (B, H, tiles),
        (B, G, tiles),
        (B, G, DP),
        (B, H, N) if offsets else (0,),
    )
    return Saved(
        *(
            q_BHND.new_empty(shape, dtype=dtype)
            for shape, dtype in zip(shapes, _DTYPES, strict=True)
        )
    )


_DTYPES = (torch.float32, E4M3, E4M3, E4M3, *(torch.float32,) * 4)
