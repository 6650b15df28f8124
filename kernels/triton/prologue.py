"""What happens before the products, on the host: operands of a call from raster to tile order.

The kernels are those of `fpsc.kernels.triton.pack`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpsc.kernels.before import (
    ACROSS,
    LAYER,
    NOTHING_BEFORE,
    RMS,
    Before,
    Norm,
    Rotation,
)
from fpsc.kernels.saved import Saved, padded_head_dim
from fpsc.kernels.triton import configs, pack
from fpsc.kernels.triton.launch import launch

CHUNKS = 128
"""Stretches of the sequence whose statistics are found side by side."""

ROWS = 32
"""Rows at a time in them."""

SHARES = 16
"""Programs for each head that look for the largest value of groups of tiles."""


KINDS = {RMS: pack.PER_HEAD, ACROSS: pack.GIVEN, LAYER: pack.LAYER}


def ready(before: Before, q: Tensor, k: Tensor) -> Before:
    """The same, with all that the kernels want to be given: statistics of norms across heads, and
    tables whose channels lie side by side."""
    rotation = before.rotation
    if rotation is not None:
        cos, sin = rotation.cos, rotation.sin
        if cos.stride(3) != 1 or cos.stride() != sin.stride():
            rotation = replace(rotation, cos=cos.contiguous(), sin=sin.contiguous())
    return Before(_with_statistic(before.norm_q, q), _with_statistic(before.norm_k, k), rotation)


def _with_statistic(norm: Norm | None, x: Tensor) -> Norm | None:
    if norm is None:
        return None
    norm = replace(
        norm,
        weight=None if norm.weight is None else norm.weight.contiguous(),
        bias=None if norm.bias is None else norm.bias.contiguous(),
    )
    if norm.kind != ACROSS:
        return norm
    if norm.rstd is not None:
        return replace(norm, rstd=norm.rstd.contiguous())
    B, heads, N, D = x.shape
    rstd = x.new_empty((B, N), dtype=torch.float32)
    launch(
        pack.token_statistics, (-(-N // ROWS), B),
        x, rstd, *x.stride()[:3], norm.epsilon, heads, N,
        D=D, DP=padded_head_dim(D), ROWS=ROWS, num_warps=8,
    )  # fmt: skip
    return replace(norm, rstd=rstd)


def arguments(
    norm: Norm | None, rotation: Rotation | None, head_dim: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For a kernel: what it is passed of a norm and a rotation, and what is compiled in."""
    rstd = weight = bias = cos = sin = None
    epsilon, row, split = 0.0, 0, 0
    strides: tuple[int, ...] = (0, 0, 0)
    first = length = 0
    compiled_in = {
        "NORM": 0 if norm is None else KINDS[norm.kind].value, "ROTATION": 0, "NORM_STRIDE": 0,
        "WEIGHTS": 1, "WIDE": False,
    }  # fmt: skip
    if norm is not None:
        rstd, weight, bias, epsilon = norm.rstd, norm.weight, norm.bias, norm.epsilon
        channels = bias if weight is None else weight
        if channels is not None:
            row = channels.shape[-1]
            compiled_in["NORM_STRIDE"] = 0 if row == head_dim else head_dim
            if channels.ndim == 2 and len(channels) == 2:
                compiled_in["WEIGHTS"], split = 2, norm.split
    if rotation is not None:
        cos, sin, first = rotation.cos, rotation.sin, rotation.start
        kind = pack.INTERLEAVED if rotation.interleaved else pack.HALF_SPLIT
        compiled_in |= {"ROTATION": kind.value, "WIDE": cos.shape[3] == head_dim}
        length = cos.shape[2]
        strides = tuple(
            0 if n == 1 else step for n, step in zip(cos.shape[:3], cos.stride(), strict=False)
        )
    tensors = (rstd, weight, bias, cos, sin)
    return (*tensors, epsilon, row, split, *strides, first, length), compiled_in


class Keys(NamedTuple):
    """The keys of each tile that take part; strides are zero where batch elements share them."""

    gather: Tensor
    counts: Tensor
    gather_stride: int
    count_stride: int

    @property
    def last_weights(self) -> Tensor:
        """The weight of each tile's last row: one less the copies (`fpsc.kernels.triton.forward`).

        Float32, of the shape of counts.
        """
        return (self.counts - (self.gather.shape[-1] - 1)).float()


class Tiles(NamedTuple):
    """Operands in tile order, one buffer each: [B, heads, TILES, BLOCK, DP], or for V of FP8 cells
    [B, G, DP, TILES * BLOCK]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Call:
    """Inputs of one call; q [B, H, N, D], k, v [B, G, N, D] with a contiguous last dimension."""

    q: Tensor
    k: Tensor
    v: Tensor
    modes: Tensor
    gather: Tensor
    valid: Tensor
    key_mask: Tensor | None
    scale: float
    before: Before = NOTHING_BEFORE

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """H, G, N, TILES"""
        return self.q.shape[1], self.k.shape[1], self.q.shape[2], self.gather.shape[0]

    @property
    def fixed(self) -> dict[str, int]:
        D = self.q.shape[3]
        return {"D": D, "DP": padded_head_dim(D), "BLOCK": self.gather.shape[1]}

    def sides(self, keys: Keys) -> tuple[tuple[Tensor, Norm | None, Keys], ...]:
        """q and k: what it is, the norm in front of it, and where the rows of its tiles are."""
        queries = Keys(self.gather, self.valid, 0, 0)
        return (self.q, self.before.norm_q, queries), (self.k, self.before.norm_k, keys)

    def tile_shape(self, heads: int) -> tuple[int, ...]:
        return (self.q.shape[0], heads, *self.gather.shape, self.fixed["DP"])


def keys_of(
    gather: Tensor, valid: Tensor, key_mask: Tensor | None, batch: int, tokens: int
) -> Keys:
    """The keys of each tile that take part."""
    if key_mask is None:
        return Keys(gather, valid, 0, 0)
    TILES, BLOCK = gather.shape
    keys = gather.new_empty((batch, TILES, BLOCK))
    count = gather.new_empty((batch, TILES))
    mask = _mask_bytes(key_mask, batch, tokens)
    launch(
        pack.compact_keys, (TILES, batch),
        gather, valid, mask, keys, count, mask.stride(0), tokens, TILES,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return Keys(keys, count, TILES * BLOCK, TILES)


def _mask_bytes(key_mask: Tensor, batch: int, tokens: int) -> Tensor:
    """uint8 [batch, tokens], contiguous; the mask's own memory where it is that."""
    return key_mask.expand(batch, tokens).contiguous().view(torch.uint8)


class Lists(NamedTuple):
    """The key tiles of every query tile; visits: see `forward.list_of`."""

    idx: Tensor
    visits: Tensor | None


def lists_of(list_ptr: Tensor, list_idx: Tensor, keys: Keys) -> Lists:
    """The lists, without key tiles whose keys a mask took."""
    if keys.count_stride == 0:
        return Lists(list_idx, None)
    (PATTERNS, bounds), B, ENTRIES = list_ptr.shape, len(keys.counts), len(list_idx)
    kept = list_idx.new_empty((B, ENTRIES))
    visits = list_idx.new_empty((B, PATTERNS, bounds - 1))
    launch(
        pack.compact_lists, (bounds - 1, PATTERNS, B),
        list_ptr, list_idx, keys.counts, visits, kept, bounds - 1, ENTRIES,
        WIDTH=128, num_warps=1,
    )  # fmt: skip
    return Lists(kept, visits)


def copy_tiles(call: Call, keys: Keys, meta: Tensor, into: Tiles | None = None) -> Tiles:
    """Operands of the cells in the input's dtype. Writes their part of meta [B, G, TILES, 2]."""
    H, G, _, _ = call.sizes
    if into is None:
        into = Tiles(*(call.q.new_empty(call.tile_shape(heads)) for heads in (H, G, G)))
    _pack(call, keys, into, meta)
    return into


def quantise(
    call: Call, keys: Keys, groups: Tensor, meta: Tensor, saved: Saved, *, permuted: bool
) -> Tiles:
    """Operands of the FP8 cells, in the buffers of `saved`, and their part of meta.

    groups: [groupings, TILES]. permuted: whether V is stored as `pack.permuted` says.
    """
    H, G, N, TILES = call.sizes
    B, DP = call.q.shape[0], call.fixed["DP"]
    chunk = -(-N // CHUNKS)
    partial = call.q.new_empty((B, G, CHUNKS, 3, DP), dtype=torch.float32)
    mean = call.q.new_empty((B, G, DP), dtype=torch.float32)
    turn, head_dim = call.before.rotation, call.q.shape[3]
    before, compiled_in = arguments(call.before.norm_k, turn, head_dim)
    mask = None if call.key_mask is None else _mask_bytes(call.key_mask, B, N)
    launch(
        pack.statistics, (CHUNKS, B * G),
        call.k, call.v, mask, call.modes, partial, *call.k.stride()[:3], *call.v.stride()[:3],
        N, *before, H, G, N, chunk,
        D=call.fixed["D"], DP=DP, ROWS=ROWS, **compiled_in, num_warps=8,
    )  # fmt: skip
    launch(
        pack.finish_statistics, (B * G,),
        partial, call.modes, mean, saved.v_scale, H, G, CHUNKS, DP=DP, ROWS=ROWS, num_warps=8,
    )  # fmt: skip
    largest = tuple(call.q.new_zeros((B, n, TILES), dtype=torch.float32) for n in (H, G))
    for operand, (x, norm, where) in enumerate(call.sides(keys)):
        before, compiled_in = arguments(norm, turn, head_dim)
        launch(
            pack.group_maxima, (SHARES, B * x.shape[1]),
            x, mean, call.modes, groups, where.gather, where.counts, largest[operand],
            *x.stride()[:3], where.gather_stride, where.count_stride, *before, *call.sizes,
            **call.fixed, OPERAND=operand, **compiled_in,
            num_warps=configs.pack_warps(DP, two=turn is not None),
        )  # fmt: skip
    tiles = Tiles(saved.q8, saved.k8, saved.v8)
    _pack(call, keys, tiles, meta, saved, mean, groups, largest, permuted=permuted)
    return tiles


def _pack(
    call: Call,
    keys: Keys,
    into: Tiles,
    meta: Tensor,
    saved: Saved | None = None,
    mean: Tensor | None = None,
    groups: Tensor | None = None,
    largest: tuple[Tensor | None, ...] = (None, None),
    *,
    permuted: bool = False,
) -> None:
    """Q, K and V of the cells of one kind: FP8 where `saved` is given."""
    q_scale, v_scale, shift = (
        (None, None, None) if saved is None else (saved.q_scale, saved.v_scale, saved.shift)
    )
    query, key = call.sides(keys)
    sides = (
        (*query, call.before.rotation, largest[0]),
        (*key, call.before.rotation, largest[1]),
        (call.v, None, keys, None, None),
    )
    for operand, (x, norm, where, rotation, shared) in enumerate(sides):
        inputs, compiled_in = arguments(norm, rotation, call.q.shape[3])
        launch(
            pack.pack_tiles, (x.shape[1] * call.gather.shape[0], call.q.shape[0]),
            x, into[operand], q_scale, meta, mean, v_scale, shift, call.modes, groups, shared,
            where.gather, where.counts, *x.stride()[:3], where.gather_stride, where.count_stride,
            *inputs, call.scale, *call.sizes,
            **call.fixed, OPERAND=operand, FP8=saved is not None,
            PERMUTED=permuted and operand == 2, **compiled_in,
            num_warps=configs.pack_warps(call.fixed["DP"], two=rotation is not None),
        )  # fmt: skip


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modes: Tensor,
    gather: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    scale: float,
    before: Before = NOTHING_BEFORE,
) -> Call:
    """The inputs as the kernels want them."""
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    before = ready(before, q, k)
    return Call(q, k, v, modes.contiguous(), gather, valid, key_mask, scale, before)


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied where the channels of a row are not side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
