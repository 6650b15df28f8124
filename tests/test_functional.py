"""`fpsc.attention`: the attention without a compiler."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fpsc
from fpsc import functional
from tests.thresholds import FP8_AGAINST_EXACT, KERNEL_FP8, KERNEL_FP32, relative_rms

GRID, PREFIX, SUFFIX = (3, 5, 7), 4, 2
TOKENS = 3 * 5 * 7 + PREFIX + SUFFIX


def qkv() -> list[Tensor]:
    return [torch.randn(2, 2, TOKENS, 32) for _ in range(3)]


def attend(*inputs: Tensor, **more) -> Tensor:
    given = {"grid": GRID, "prefix": PREFIX, "suffix": SUFFIX, "tile": (2, 3, 4), **more}
    return fpsc.attention(*inputs, **given)


@pytest.fixture(autouse=True)
def _no_tables_from_other_tests() -> None:
    functional._tables.cache_clear()


def test_dense_is_torchs_attention():
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v)
    assert relative_rms(attend(q, k, v, dtype="bf16"), expected) <= KERNEL_FP32
    assert relative_rms(attend(q, k, v), expected) <= FP8_AGAINST_EXACT


def test_sparse_is_the_reference_with_gradients():
    found, grads = [], []
    inputs = [x.requires_grad_() for x in qkv()]
    for kernel in ("auto", "reference"):
        found.append(attend(*inputs, keep=0.3, kernel=kernel))
        grads.append(torch.autograd.grad(found[-1].square().sum(), inputs))
    assert relative_rms(found[0], found[1]) <= KERNEL_FP8
    for x, y in zip(*grads, strict=True):
        assert relative_rms(x, y) <= KERNEL_FP8


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((3, 5, 8), "expected prefix + T*Y*X + suffix = 111, the tokens of q, got 4 + 3*5*8 + 2"),
        ((3, 5, 0), "got 4 + 3*5*0 + 2 = 6"),
        ((15, 7), "grid: expected three positive integers (T, Y, X), found (15, 7)"),
    ],
)
def test_a_grid_that_is_not_that_of_the_sequence(grid, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(*qkv(), grid=grid)


def test_an_explicit_kernel_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        attend(*qkv(), kernel="triton")
    with pytest.raises(
        ValueError, match="expected one of auto, cpu, triton, gluon, hopper, reference"
    ):
        attend(*qkv(), kernel="fast")


def test_a_device_without_fp8_says_so(monkeypatch):
    monkeypatch.setattr(functional, "fp8_support", lambda device: (False, "it is old"))
    q, k, v = qkv()
    with pytest.warns(UserWarning, match="fp8 is computed in the input's dtype: it is old"):
        found = attend(q, k, v, keep=0.3)
    assert torch.equal(found, attend(q, k, v, keep=0.3, dtype="bf16"))
