"""The CPU kernel against the reference: out, lse, dq, dk, dv."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from fpsc.kernels import cpu, reference
from tests.kernels.cases import (
    DENSE,
    DENSE_FP8,
    FP8,
    INPUT_DTYPE,
    NEAR,
    NEAR_FP8,
    NEAR_FP8_BOX,
    WINDOW,
    WINDOW_FP8,
    WINDOW_FP8_HEAD,
    Tables,
    qkv,
    resolved,
    tables,
    visible,
)
from tests.thresholds import KERNEL_FP8, KERNEL_FP8_GRAD, KERNEL_FP32, KERNEL_HALF, relative_rms

ALL = [[DENSE, NEAR_FP8, NEAR, WINDOW_FP8], [WINDOW, DENSE_FP8, NEAR_FP8, DENSE]]


pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tables,
    mask: Tensor | None = None,
    scale: float = 0.2,
    least_grad: float = 0.0,
) -> None:
    """least_grad: a norm of gradients below which errors are no longer relative to it."""
    rest, back = (*t.forward, mask, scale), (*t.backward, mask, scale)
    out, lse, _ = cpu.forward(q, k, v, *rest)
    expected_out, expected_lse, _ = reference.forward(q, k, v, *rest)
    dout = torch.randn(q.shape).to(q.dtype)
    grads = cpu.backward(dout, q, k, v, expected_out, expected_lse, None, *back)
    expected_grads = reference.backward(dout, q, k, v, expected_out, expected_lse, None, *back)

    assert out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32
    assert [g.dtype for g in grads] == [q.dtype, k.dtype, v.dtype]
    half = q.dtype != torch.float32
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        fp8 = bool(resolved(t)[b, h, 1] == FP8)
        allowed = KERNEL_FP8 if fp8 else KERNEL_HALF if half else KERNEL_FP32
        allowed_grad = KERNEL_FP8_GRAD if fp8 else KERNEL_HALF if half else KERNEL_FP32
        assert relative_rms(out[b, h], expected_out[b, h]) <= allowed
        some = expected_lse[b, h].isfinite()
        assert torch.equal(lse[b, h][~some], expected_lse[b, h][~some])
        assert relative_rms(lse[b, h][some], expected_lse[b, h][some]) <= KERNEL_FP32
        assert relative_rms(grads[0][b, h], expected_grads[0][b, h], least_grad) <= allowed_grad
    any_fp8 = bool((resolved(t)[..., 1] == FP8).any())
    allowed_grad = KERNEL_FP8_GRAD if any_fp8 else KERNEL_HALF if half else KERNEL_FP32
    assert relative_rms(grads[1], expected_grads[1], least_grad) <= allowed_grad
    assert relative_rms(grads[2], expected_grads[2], least_grad) <= allowed_grad


@pytest.mark.parametrize("text", [(0, 0), (7, 0), (0, 130), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("grid", "tile"),
    [((5, 7, 9), (2, 4, 5)), ((1, 13, 17), (1, 5, 5)), ((3, 1, 64), (2, 1, 24))],
    ids=str,
)
def test_odd_grids_with_text(grid, tile, text):
    t = tables(grid, tile, [[DENSE, NEAR_FP8, WINDOW]], prefix=text[0], suffix=text[1])
    check(*qkv(t), t)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_each_head_of_each_batch_element_has_its_mode(key_heads, masked):
    t = tables((5, 7, 9), (2, 4, 5), ALL, prefix=3)
    mask = torch.rand(2, t.tokens) > 0.3 if masked else None
    check(*qkv(t, key_heads=key_heads), t, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_tiles_that_share_scales(masked):
    """Also where query heads of one key head have different groupings."""
    heads = [NEAR_FP8_BOX, WINDOW_FP8_HEAD, WINDOW_FP8_HEAD, DENSE]
    t = tables((5, 7, 9), (2, 4, 3), [heads, [*heads[1:], NEAR_FP8]], prefix=3, suffix=2)
    for key_heads in (4, 2, 1):
        mask = torch.rand(2, t.tokens) > 0.3 if masked else None
        check(*qkv(t, key_heads=key_heads), t, mask)


@pytest.mark.parametrize("dim", [16, 17, 40, 64, 72, 80, 96, 128, 256])
def test_head_dims(dim):
    t = tables((3, 5, 7), (2, 3, 4), [[NEAR, NEAR_FP8]])
    check(*qkv(t, dim=dim), t, scale=dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    t = tables((5, 7, 9), (2, 4, 5), ALL, suffix=3)
    check(*qkv(t, dtype=dtype), t, torch.rand(2, t.tokens) > 0.3)


def test_tiles_of_one_row():
    t = tables((2, 3, 3), (1, 1, 1), [[NEAR, NEAR_FP8, DENSE_FP8, DENSE]], prefix=1, suffix=1)
    check(*qkv(t), t)


SIZES = st.tuples(*[st.integers(1, 7)] * 3)


@hypothesis.given(
    grid=SIZES,
    tile=SIZES.filter(lambda tile: math.prod(tile) <= 128),
    text=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    modes=st.lists(st.lists(st.integers(0, 7), min_size=4, max_size=4), min_size=1, max_size=2),
    key_heads=st.sampled_from([1, 2, 4]),
    dim=st.integers(16, 48),
    masked=st.floats(0, 1),
)
@hypothesis.settings(max_examples=25)
def test_any_layout(grid, tile, text, modes, key_heads, dim, masked):
    t = tables(grid, tile, modes, prefix=text[0], suffix=text[1])
    mask = torch.rand(len(modes), t.tokens) >= masked
    # Where a query sees one key alone, its gradient cancels to zero.
    check(*qkv(t, dim=dim, key_heads=key_heads), t, mask, least_grad=dim**0.5)


def test_memory_does_not_grow_with_the_square_of_the_tokens(checkout: Path):
    """16,384 tokens, dense: all scores would take 1 GiB."""
    code = """
import resource, torch
from fpsc.kernels import cpu
from tests.kernels.cases import DENSE, NEAR, qkv, tables
t = tables((16, 32, 32), (4, 4, 8), [[DENSE, NEAR]])
q, k, v = qkv(t, dim=16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, lse, _ = cpu.forward(q, k, v, *t.forward, None, 0.2)
cpu.backward(q, q, k, v, out, lse, None, *t.backward, None, 0.2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=checkout,
    )
    assert int(found.stdout) < 256 * 1024  # KiB


def test_runs_and_merged_steps(monkeypatch):
    """A step of one tile, of parts of merged tiles, and of many: all the same numbers."""
    t = tables((4, 6, 8), (1, 3, 4), [[DENSE, WINDOW, DENSE_FP8]], prefix=5)
    q, k, v = qkv(t)
    found = []
    for rows, scores in ((5, 0), (64, 0), (1, 2**30)):
        monkeypatch.setattr(cpu, "ROWS_AT_ONCE", rows)
        monkeypatch.setattr(cpu, "SCORES_AT_ONCE", scores)
        found.append(cpu.forward(q, k, v, *t.forward, None, 0.2))
    for out, lse, _ in found[1:]:
        assert relative_rms(out, found[0][0]) <= KERNEL_FP32
        assert relative_rms(lse, found[0][1]) <= KERNEL_FP32


def test_without_onednn(monkeypatch):
    """The products through torch.mm, where torch has no oneDNN."""
    monkeypatch.setattr(cpu, "ONEDNN", False)
    t = tables((5, 7, 9), (2, 4, 5), ALL, prefix=3)
    check(*qkv(t), t)


def test_queries_without_keys():
    t = tables((3, 5, 7), (1, 5, 4), [[WINDOW, NEAR_FP8], [WINDOW_FP8, DENSE]])
    mask = torch.zeros(2, t.tokens, dtype=torch.bool)
    mask[0, :9] = True  # seen by the first frame alone
    q, k, v = qkv(t)
    check(q, k, v, t, mask)
    out, lse, _ = cpu.forward(q, k, v, *t.forward, mask, 0.2)
    nothing = ~visible(t, mask).any(dim=-1)
    assert nothing[0].any() and not nothing[0].all() and nothing[1].all()
    assert torch.equal(out[nothing], torch.zeros_like(out[nothing]))
    assert torch.equal(lse[nothing], torch.full_like(lse[nothing], -math.inf))


def test_masked_keys_may_hold_anything():
    t = tables((3, 5, 7), (2, 3, 4), ALL, prefix=3)
    mask = torch.rand(2, t.tokens) > 0.3
    q, k, v = qkv(t)
    rest, back = (*t.forward, mask, 0.2), (*t.backward, mask, 0.2)
    dout = torch.randn(q.shape)
    out, lse, _ = cpu.forward(q, k, v, *rest)
    grads = cpu.backward(dout, q, k, v, out, lse, None, *back)
    for b in range(2):
        k[b, :, ~mask[b]], v[b, :, ~mask[b]] = math.nan, math.inf
    assert torch.equal(cpu.forward(q, k, v, *rest)[0], out)
    for x, y in zip(cpu.backward(dout, q, k, v, out, lse, None, *back), grads, strict=True):
        assert torch.equal(x, y)
    for b in range(2):
        assert torch.equal(grads[1][b, :, ~mask[b]], torch.zeros_like(k[b, :, ~mask[b]]))


@pytest.mark.parametrize("dtype", [INPUT_DTYPE, FP8], ids=["input", "fp8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", [cpu, reference], ids=["cpu", "reference"])
class TestNotFinite:
    """NaN and infinities reach exactly the outputs whose tiles they touch."""

    def setup_case(self, dtype: int) -> tuple[Tables, list[Tensor], Tensor]:
        t = tables((4, 6, 8), (2, 3, 4), [[(NEAR, NEAR_FP8)[dtype]]], prefix=3)
        return t, qkv(t), torch.ones(1, t.tokens, dtype=torch.bool)

    def test_in_k(self, kernel, value, dtype):
        t, (q, k, v), mask = self.setup_case(dtype)
        at = int(t.gather[2, 1])
        v[0, 0, at] = 0.0  # not the largest of its channel
        mask[0, at] = False  # what the others see is as if the key were not there
        expected, _, _ = kernel.forward(q, k, v, *t.forward, mask, 0.2)
        k[0, 0, at, 5] = value
        out, lse, _ = kernel.forward(q, k, v, *t.forward, None, 0.2)
        touched = visible(t)[0, 0, :, at]
        assert 0 < touched.sum() < t.tokens
        assert out[0, 0, touched].isnan().all() and lse[0, 0, touched].isnan().all()
        assert torch.equal(out[0, 0, ~touched], expected[0, 0, ~touched])

    def test_in_v(self, kernel, value, dtype):
        t, (q, k, v), _ = self.setup_case(dtype)
        at = int(t.gather[2, 1])
        expected, expected_lse, _ = kernel.forward(q, k, v, *t.forward, None, 0.2)
        v[0, 0, at, 5] = value
        out, lse, _ = kernel.forward(q, k, v, *t.forward, None, 0.2)
        touched = torch.zeros_like(out, dtype=torch.bool)
        touched[0, 0, :, 5] = visible(t)[0, 0, :, at]
        assert torch.equal(out.isnan(), touched)
        assert torch.equal(lse, expected_lse)
        others = torch.arange(32) != 5  # the amax of channel 5 may have been that very value
        assert torch.equal(out[..., others], expected[..., others])

    def test_in_q(self, kernel, value, dtype):
        t, (q, k, v), _ = self.setup_case(dtype)
        at = int(t.gather[2, 1])
        q[0, 0, at, 5] = 0.0
        expected, _, _ = kernel.forward(q, k, v, *t.forward, None, 0.2)
        q[0, 0, at, 5] = value
        out, lse, _ = kernel.forward(q, k, v, *t.forward, None, 0.2)
        touched = torch.arange(t.tokens) == at
        assert out[0, 0, touched].isnan().all() and lse[0, 0, touched].isnan().all()
        assert torch.equal(out[0, 0, ~touched], expected[0, 0, ~touched])


@pytest.mark.parametrize("factor", [1e-20, 30.0])
def test_outliers_and_zero_tiles(factor):
    t = tables((4, 6, 8), (2, 3, 4), [[NEAR_FP8, NEAR]])
    q, k, v = qkv(t)
    q[:, :, t.gather[0, :3].long()] = 0.0
    k[:, :, t.gather[1, :24].long()] = 0.0
    v[:, :, :, 7] = 0.0
    for x in (q, k, v):
        x[0, :, 17, 3] *= factor
    check(q, k, v, t)


@pytest.mark.parametrize("kernel", [cpu, reference], ids=["cpu", "reference"])
def test_huge_values_stay_finite(kernel):
    """Beyond e4m3, bfloat16 and the range of exp: finite in, finite out."""
    t = tables((4, 6, 8), (2, 3, 4), [[NEAR_FP8, NEAR]])
    q, k, v = qkv(t)
    for x in (q, k, v):
        x[0, :, 17, 3] = 1e15
    out, lse, _ = kernel.forward(q, k, v, *t.forward, None, 0.2)
    assert out.isfinite().all() and lse.isfinite().all()
    # Query and key 17 agree so much that no other key counts.
    assert relative_rms(out[0, :, 17], v[0, :, 17]) <= KERNEL_FP8


def test_round_to_e4m3_equals_the_casts():
    ties = torch.arange(0, 2**15, dtype=torch.int32) << 16  # every tie, and between
    x = torch.cat(
        [ties.view(torch.float32), torch.randn(10**5) * 2.0 ** torch.randint(-14, 9, (10**5,))]
    )
    x = torch.cat([x, -x, torch.nextafter(x, torch.tensor(math.inf)), torch.tensor([math.nan])])
    x = x[(x.abs() <= 448) | x.isnan()]
    found, expected = cpu.round_to_e4m3_(x.clone()), reference.to_e4m3(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
