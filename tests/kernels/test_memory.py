"""What autograd holds between forward and backward: counted from shapes, at the size of a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fpsc.grid import TokenGrid, layout, plan_tile
from fpsc.kernels import ops
from fpsc.kernels.kinds import ALL_CELLS, FP8_CELLS, INPUT_CELLS

GRID, HEADS, DIM = TokenGrid(21, 45, 80), 40, 128  # Wan2.1-14B at 720p


def held(attention, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Bytes of all tensors that backward waits for, each storage once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(*(x.requires_grad_() for x in (q, k, v)))
    return sum(kept.values())


@pytest.mark.parametrize(
    ("kinds", "fraction"),
    # out and lse are kept by all; the operands take one byte an element in place of two, with the
    # padding of their tiles, and both where a cell may be either.
    [(FP8_CELLS, 0.64), (INPUT_CELLS, 1.0), (ALL_CELLS, 1.4)],
)
def test_what_training_holds_beside_sdpa(kinds, fraction, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tiles = layout(GRID, plan_tile(GRID))
    T = tiles.n_tiles
    with FakeTensorMode():
        q, k, v = (
            torch.empty(1, GRID.tokens, HEADS, DIM, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        row = torch.zeros(1, dtype=torch.int32)
        tables = {
            "rows": row,
            "cells": row.expand(1, 1, HEADS),
            "modes": row.expand(1, 3),
            "list_ptr": row.expand(1, T + 1),
            "list_idx": row.expand(T * T),
            "back_ptr": row.expand(1, T + 1),
            "back_idx": row.expand(T * T),
            "order": row.expand(1, T),
            "groups": row.expand(1, T),
            "gather": row.expand(*tiles.gather.shape),
            "valid": row.expand(T),
        }

        def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(q, k, v, **tables, kinds=kinds, kernel="triton")[0]

        found = held(sparse, q, k, v)
        dense = 4 * q.numel() * 2 + HEADS * GRID.tokens * 4  # q, k, v, out; lse
        assert found / dense == pytest.approx(fraction, abs=0.02)


def test_sdpa_holds_what_the_comparison_says():
    q, k, v = (torch.randn(1, 2, 64, 32, dtype=torch.bfloat16) for _ in range(3))
    expected = 4 * q.numel() * 2 + 2 * 64 * 4
    assert held(F.scaled_dot_product_attention, q, k, v) == pytest.approx(expected, rel=0.05)
