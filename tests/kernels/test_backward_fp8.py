"""FP8 products in backward: the specification against float64, the kernels against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests import aot_autograd_check

from fpsc.kernels import cpu, ops, reference
from fpsc.kernels.kinds import INPUT_CELLS
from fpsc.kernels.triton import interpreter
from tests.kernels.cases import (
    DENSE,
    DENSE_FP8,
    FP8,
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
from tests.thresholds import (
    FP8_BACKWARD_AGAINST_EXACT,
    KERNEL_FP8_BACKWARD,
    TRITON_BF16_GRAD,
    TRITON_FP16_GRAD,
    relative_rms,
)

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

if interpreter.ACTIVE:
    from fpsc.kernels.triton import attention, configs, prologue, tune
    from fpsc.kernels.triton.configs import Config
    from tests.kernels.memory import Launches

interpreted = pytest.mark.skipif(not interpreter.ACTIVE, reason="kernels are compiled here")
LIMITS = {
    torch.float32: KERNEL_FP8_BACKWARD,
    torch.bfloat16: TRITON_BF16_GRAD,
    torch.float16: max(TRITON_FP16_GRAD, KERNEL_FP8_BACKWARD),
}


def kinds_of(t: Tables) -> int:
    fp8 = resolved(t)[..., 1] == FP8
    return int((~fp8).any()) + 2 * int(fp8.any())


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, t: Tables, scale: float) -> list[Tensor]:
    """Gradients in float64, of operands that nothing has rounded."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    share = q.shape[1] // k.shape[1]
    k_all, v_all = (x.repeat_interleave(share, dim=1) for x in leaves[1:])
    s = scale * leaves[0] @ k_all.mT
    p = s.masked_fill(~visible(t), -math.inf).softmax(dim=-1)
    return list(torch.autograd.grad(p @ v_all, leaves, dout.double()))


def specified(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, t: Tables, scale: float, fp8: bool
) -> tuple[Tensor, ...]:
    out, lse, _ = reference.forward(q, k, v, *t.forward, None, scale)
    return reference.backward(
        dout, q, k, v, out, lse, None, *t.backward, None, scale, fp8_backward=fp8
    )


def test_it_costs_little_beside_an_fp8_forward():
    """dO, P and dS in e4m3, against an operand Q, K and V in e4m3: errors of the same size."""
    t = tables((4, 8, 8), (2, 8, 8), [[DENSE_FP8, NEAR_FP8]], prefix=5)
    q, k, v = (x.contiguous() for x in qkv(t, dim=64))
    dout = torch.randn(q.shape) * torch.logspace(-2, 2, q.shape[2])[:, None]  # rows unlike
    expected = exact(q, k, v, dout, t, 0.125)
    plain, low = (specified(q, k, v, dout, t, 0.125, fp8) for fp8 in (False, True))
    for a, b, right in zip(plain, low, expected, strict=True):
        assert relative_rms(b, right.float()) <= FP8_BACKWARD_AGAINST_EXACT
        assert 1e-3 < relative_rms(b, a) <= FP8_BACKWARD_AGAINST_EXACT


def test_rows_of_few_keys_are_not_lost_beside_rows_of_many():
    """One query that looks at one key, in a tile of others that look at all: dq of each row."""
    t = tables((2, 8, 8), (2, 8, 8), [[DENSE_FP8]])
    q, k, v = (x.contiguous() for x in qkv(t, dim=64))
    q *= 0.1
    q[0, 0, 17] = 8 * k[0, 0, 40]
    dout = torch.randn(q.shape)
    plain, low = (specified(q, k, v, dout, t, 0.125, fp8)[0] for fp8 in (False, True))
    errors = (low - plain).norm(dim=3) / plain.norm(dim=3)
    others = torch.arange(t.tokens) != 17
    assert errors[0, 0, others].max() <= 2 * FP8_BACKWARD_AGAINST_EXACT


def test_rows_of_ds_add_up_to_zero():
    """As they do where nothing is rounded: then a mean of K, which forward takes away, does not
    matter."""
    t = tables((2, 8, 8), (2, 8, 8), [[DENSE_FP8]])
    q, k, v = (x.contiguous() for x in qkv(t, dim=32))
    dout = torch.randn(q.shape)
    far = k + 100 * torch.randn(32)
    for a, b in zip(
        specified(q, k, v, dout, t, 0.2, True),
        specified(q, far, v, dout, t, 0.2, True),
        strict=True,
    ):
        assert relative_rms(b, a) <= FP8_BACKWARD_AGAINST_EXACT


def test_cells_in_the_input_dtype_are_as_without():
    t = tables((2, 5, 7), (2, 5, 4), [[NEAR, WINDOW]])
    q, k, v = qkv(t)
    dout = torch.randn(q.shape)
    for a, b in zip(*(specified(q, k, v, dout, t, 0.2, fp8) for fp8 in (False, True)), strict=True):
        assert torch.equal(a, b)


# ---- the kernels


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tables,
    mask: Tensor | None = None,
    scale: float = 0.2,
    least_grad: float = 0.0,
    implementation: str = "triton",
) -> None:
    """Gradients, cell by cell."""
    kinds = kinds_of(t)
    out, lse, _ = reference.forward(q, k, v, *t.forward, mask, scale)
    dout = torch.randn(q.shape).to(q.dtype)
    rest = (*t.backward, mask, scale, kinds)
    expected = reference.backward(dout, q, k, v, out, lse, None, *rest, fp8_backward=True)
    if implementation == "cpu":
        found = cpu.backward(dout, q, k, v, out, lse, None, *rest, fp8_backward=True)
    else:
        _, _, saved = attention.forward(q, k, v, *t.forward, mask, scale, kinds, fp8_backward=True)
        given = (q, k, v) if kinds & INPUT_CELLS else (None, None, None)
        found = attention.backward(dout, *given, out, lse, saved, *rest, fp8_backward=True)
    assert [(g.dtype, g.shape) for g in found] == [(x.dtype, x.shape) for x in (q, k, v)]
    limit, (B, H), G = LIMITS[q.dtype], q.shape[:2], k.shape[1]
    for b in range(B):
        for h in range(H):
            assert relative_rms(found[0][b, h], expected[0][b, h], least_grad) <= limit, (b, h)
        for g in range(G):
            for x, y in zip(found[1:], expected[1:], strict=True):
                assert relative_rms(x[b, g], y[b, g], least_grad) <= limit, (b, g)


both = pytest.mark.parametrize("implementation", ["cpu", pytest.param("triton", marks=interpreted)])


@pytest.fixture(autouse=True)
def few_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreter.ACTIVE:
        monkeypatch.setattr(prologue, "CHUNKS", 3)


@both
@pytest.mark.parametrize(("key_heads", "masked"), [(1, True), (2, False)])
def test_odd_grids_text_masks_and_shared_keys(key_heads, masked, implementation):
    """Both kinds of cell, in each batch element otherwise; where a key head has both, too."""
    heads = [[DENSE_FP8, NEAR], [WINDOW, NEAR_FP8]]
    t = tables((3, 5, 7), (3, 5, 5), heads, prefix=3, suffix=1)
    mask = torch.rand(2, t.tokens) > 0.3 if masked else None
    check(*qkv(t, key_heads=key_heads), t, mask, implementation=implementation)


@both
@pytest.mark.parametrize("text", [(0, 130)], ids=str)
def test_fp8_cells_alone(text, implementation):
    """Text in two tiles, scales that tiles share."""
    heads = [[NEAR_FP8_BOX, WINDOW_FP8_HEAD]]
    t = tables((3, 5, 9), (3, 5, 5), heads, prefix=text[0], suffix=text[1])
    check(*qkv(t, key_heads=1), t, implementation=implementation)


@both
def test_masks_that_take_tiles_and_all_keys(implementation):
    t = tables((3, 5, 7), (3, 5, 5), [[DENSE_FP8]] * 4)
    mask = torch.rand(4, t.tokens) > 0.5
    mask[1, t.gather[1, : int(t.valid[1])].long()] = False
    mask[2] = torch.arange(t.tokens) == 11
    mask[3] = False
    # Of a query that sees one key alone, the gradient cancels to zero.
    x = qkv(t, key_heads=1)
    check(*x, t, mask, least_grad=32**0.5, implementation=implementation)


@both
@pytest.mark.parametrize("dim", [72, 256])
def test_head_dims(dim, implementation):
    t = tables((2, 5, 7), (2, 5, 4), [[DENSE_FP8]], prefix=1)
    check(*qkv(t, dim=dim), t, scale=dim**-0.5, implementation=implementation)


@both
@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_of_the_softmax(scale, implementation):
    t = tables((2, 5, 7), (2, 5, 4), [[NEAR_FP8]], prefix=3)
    check(*qkv(t), t, scale=scale, implementation=implementation)


@both
def test_tiny_tiles_and_gradients(implementation):
    """Tiles of one row; gradients so small that their scale is; a channel of V that is zero."""
    t = tables((1, 2, 2), (1, 1, 1), [[NEAR_FP8]], prefix=1)
    q, k, v = qkv(t)
    v[..., 7] = 0.0
    check(q, k, v * 1e-12, t, implementation=implementation)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    t = tables((3, 5, 7), (3, 5, 5), [[NEAR_FP8_BOX, NEAR]], suffix=3)
    check(*qkv(t, dtype=dtype, dim=64), t, scale=0.125)


@interpreted
@pytest.mark.parametrize(("blocks", "permuted"), [((64, 32), True), ((32, 64), False)], ids=str)
def test_blocks_and_orders_of_v(blocks, permuted, monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED", Config(*blocks, 4, 1))
    monkeypatch.setattr(tune, "PERMUTE_V", permuted)
    t = tables((3, 5, 7), (3, 5, 5), [[NEAR_FP8]], prefix=3)
    mask = torch.rand(1, t.tokens) > 0.5
    check(*qkv(t), t, mask)


@interpreted
@pytest.mark.parametrize("heads", [[NEAR_FP8, WINDOW_FP8], [NEAR, WINDOW_FP8]], ids=str)
def test_launches_stay_in_bounds_and_widen_nothing(heads, monkeypatch):
    launches = Launches(monkeypatch)
    t = tables((3, 5, 9), (3, 5, 5), [heads])
    check(*qkv(t, dtype=torch.bfloat16), t)
    names = [name for name, _ in launches.seen]
    assert "widen_tiles" not in names and names.count("turn_tiles") == 4
    assert ("query_gradients" in names) == (NEAR in heads)


@both
def test_not_finite_gradients(implementation):
    """What is not finite in dout reaches the gradients that it touches, and no other is NaN."""
    t = tables((2, 6, 12), (2, 6, 3), [[NEAR_FP8]])
    q, k, v = qkv(t)
    at = int(t.gather[2, 1])
    dout = torch.randn(q.shape)
    dout[0, 0, at, 5] = math.inf
    module = attention if implementation == "triton" else cpu
    rest = (None, 0.2, 2)
    out, lse, saved = module.forward(q, k, v, *t.forward, *rest, fp8_backward=True)
    given = dout, q, k, v, out, lse, saved, *t.backward, *rest
    dq, dk, dv = module.backward(*given, fp8_backward=True)
    row, seen = torch.arange(t.tokens) == at, visible(t)[0, 0, at]
    assert dq[0, 0, row].isnan().all() and dq[0, 0, ~row].isfinite().all()
    assert dk[0, 0, seen].isnan().all() and dk[0, 0, ~seen].isfinite().all()
    assert dv[0, 0, seen, 5].isnan().all() and dv[0, 0, ~seen].isfinite().all()


# ---- the op


def test_operator():
    """Schema, autograd, fake and compiled."""
    kernel = "triton" if interpreter.ACTIVE else "cpu"
    t = tables((2, 3, 5), (2, 3, 3), [[NEAR_FP8, DENSE]], prefix=1)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, dim=16, key_heads=1))
    args = (q, k, v, *t, None, 0.2, 0, 3, kernel)
    op = torch.ops.fpsc.attention
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, args, {"fp8_backward": True}, test_utils=checks)
    aot_autograd_check(lambda *a: op(*a, fp8_backward=True)[:2], args, {}, dynamic=True)


@both
@pytest.mark.parametrize("heads", [[NEAR_FP8, WINDOW_FP8], [NEAR, NEAR_FP8]], ids=str)
def test_gradients_through_the_operator(heads, implementation):
    t = tables((3, 5, 9), (3, 5, 5), [heads], prefix=3)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, key_heads=1))
    dout = torch.randn(q.shape)
    found = {}
    for kernel, fp8 in ((implementation, True), ("reference", True), ("reference", False)):
        given = {**t._asdict(), "scale": 0.2, "kinds": kinds_of(t), "kernel": kernel}
        out, _ = ops.attention(q, k, v, **given, fp8_backward=fp8)
        found[kernel, fp8] = torch.autograd.grad(out, (q, k, v), dout)
    compared = zip(
        found[implementation, True], found["reference", True], found["reference", False],
        strict=True,
    )  # fmt: skip
    for mine, right, plain in compared:
        # Backward sees the kernel's own output, whose P rounds otherwise here and there.
        assert relative_rms(mine, right) <= 2 * KERNEL_FP8_BACKWARD
        assert relative_rms(mine, plain) > 10 * KERNEL_FP8_BACKWARD
