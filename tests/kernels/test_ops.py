"""The custom ops: schema, fake, autograd, autocast, compile, tables as data, bad arguments."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.optests import aot_autograd_check

from fpsc.kernels import cpu, ops, reference
from fpsc.kernels.checks import check_lengths, check_rows, check_values
from fpsc.kernels.saved import Saved, new_saved
from tests.kernels.cases import (
    DENSE,
    DENSE_FP8,
    NEAR,
    NEAR_FP8,
    NEAR_FP8_BOX,
    WINDOW,
    WINDOW_FP8_HEAD,
    Tables,
    qkv,
    resolved,
    tables,
)
from tests.thresholds import (
    HALF_AGAINST_FP32,
    KERNEL_FP8,
    KERNEL_FP8_GRAD,
    KERNEL_FP32,
    relative_rms,
)

MIXED = [[DENSE, NEAR_FP8], [WINDOW, DENSE_FP8]]


def small(heads: list[list[int]] = MIXED, **text: int) -> Tables:
    return tables((2, 5, 6), (1, 3, 4), heads, **text)


def attend(q: Tensor, k: Tensor, v: Tensor, t: Tables, **others: Any) -> Tensor:
    return ops.attention(q, k, v, **t._asdict(), **others)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, masked):
    t = small(prefix=3)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, dim=16, dtype=dtype, key_heads=1))
    mask = torch.rand(2, t.tokens) > 0.3 if masked else None
    args = (q, k, v, *t, mask, 0.2, 0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    # Not the fourth check of opcheck, which adds all outputs up: e4m3 cannot.
    torch.library.opcheck(torch.ops.fpsc.attention, args, test_utils=checks)
    aot_autograd_check(lambda *a: torch.ops.fpsc.attention(*a)[:2], args, {}, dynamic=True)
    out, *others = torch.ops.fpsc.attention(q, k, v, *t, mask, 0.2, 0)
    args = [x.detach() for x in (out, q, k, v, out, *others)]
    rest = (*t.backward, mask, 0.2, 3, "auto")
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # Nor its first here, which multiplies inputs of e4m3.
    torch.library.opcheck(torch.ops.fpsc.attention_backward, (*args, *rest), test_utils=checks)


@pytest.mark.parametrize("layout", ["BNHD", "BHND", "BHDN"])
def test_any_strides_one_output_layout(layout):
    t = small()
    inputs = [x.detach() for x in qkv(t)]
    expected = attend(*inputs, t)
    order = ["BHND".index(axis) for axis in layout]
    back = [layout.index(axis) for axis in "BHND"]
    strided = [x.permute(order).contiguous().permute(back).requires_grad_() for x in inputs]
    out = attend(*strided, t)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out, strided, torch.ones(()).expand(out.shape))
    assert all(g.isfinite().all() for g in grads)


def test_gradients_against_the_reference():
    t = small(prefix=3)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, key_heads=1))
    mask = torch.rand(2, t.tokens) > 0.3
    out = attend(q, k, v, t, key_mask=mask, scale=0.2)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        expected_out, lse, _ = reference.forward(q, k, v, *t.forward, mask, 0.2)
        given = (dout, q, k, v, expected_out, lse, None)
        expected = reference.backward(*given, *t.backward, mask, 0.2)
    assert relative_rms(out, expected_out) <= KERNEL_FP8
    for x, y in zip(found, expected, strict=True):
        assert relative_rms(x, y) <= KERNEL_FP8_GRAD


def test_dense_cells_are_torchs_attention_with_its_gradients():
    t = small([[DENSE, DENSE]], prefix=2, suffix=2)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t))
    expected = F.scaled_dot_product_attention(q, k, v)
    out = attend(q, k, v, t)
    assert relative_rms(out, expected) <= KERNEL_FP32
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for x, y in zip(found, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        assert relative_rms(x, y) <= KERNEL_FP32


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradient_of_one_input_alone(needed):
    t = small()
    inputs = [x.detach() for x in qkv(t)]
    inputs[needed].requires_grad_()
    attend(*inputs, t).sum().backward()
    assert [x.grad is not None for x in inputs] == [i == needed for i in range(3)]


def test_lse_has_no_gradient():
    t = small()
    q, k, v = (x.detach().requires_grad_() for x in qkv(t))
    out, lse = ops.attention(q, k, v, **t._asdict())
    assert out.requires_grad and not lse.requires_grad


def test_one_row_for_the_whole_batch():
    t = small([[DENSE, NEAR]] * 2)
    q, k, v = qkv(t)
    one = t._replace(rows=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(
        attend(q, k, v, one), attend(q, k, v, t._replace(rows=torch.zeros_like(t.rows)))
    )


def test_site_row_and_head_pick_the_mode():
    t = small([[DENSE, DENSE], [NEAR, DENSE_FP8]])
    q, k, v = qkv(t)
    cells = torch.stack([t.cells[0], t.cells[0].flip(0), t.cells[0].flip(1)])
    t = t._replace(cells=cells)
    alone = {
        m: attend(q, k, v, t._replace(cells=torch.full_like(cells, m)))
        for m in (DENSE, NEAR, DENSE_FP8)
    }
    for site in range(3):
        out = attend(q, k, v, t, site=site)
        for b in range(2):
            for h in range(2):
                assert torch.equal(out[b, h], alone[int(cells[site, b, h])][b, h])


def test_editing_the_tables_after_forward_does_not_change_backward():
    t = small()
    q, k, v = (x.detach().requires_grad_() for x in qkv(t))
    out = attend(q, k, v, t)
    expected = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    t.cells.fill_(NEAR)
    t.modes.zero_()
    t.rows.zero_()
    for x, y in zip(
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), expected, strict=True
    ):
        assert torch.equal(x, y)


def test_editing_the_lists_after_forward_is_an_error_in_backward():
    t = small()
    q, k, v = (x.detach().requires_grad_() for x in qkv(t))
    out = attend(q, k, v, t)
    t.list_idx.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    t = small()
    q, k, v = qkv(t, dtype=dtype)
    out = attend(q, k, v, t)
    assert out.dtype == dtype
    assert relative_rms(out, attend(q.float(), k.float(), v.float(), t)) <= HALF_AGAINST_FP32


def test_autocast_casts_as_torchs_attention_does():
    t = small([[DENSE, NEAR]])
    q, k, v = qkv(t)
    expected = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), t)
    leaf = q.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        found = attend(leaf, k, v.bfloat16(), t)  # as after a norm in float32
        assert torch.equal(found, expected)
        found.sum().backward()  # also when backward runs under autocast
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.compile(attend, fullgraph=True)(q, k, v, t), expected)


def test_compiled_once_for_any_number_in_the_tables():
    t = small()
    q, k, v = (x.detach().requires_grad_() for x in qkv(t))
    counters.clear()
    compiled = torch.compile(attend, fullgraph=True)
    for cells in (t.cells, t.cells.flip(2), torch.full_like(t.cells, NEAR)):
        edited = t._replace(cells=cells, rows=t.rows.flip(0))
        out, expected = compiled(q, k, v, edited), attend(q, k, v, edited)
        assert torch.equal(out, expected)
        dout = torch.randn_like(out)
        for x, y in zip(
            torch.autograd.grad(out, (q, k, v), dout),
            torch.autograd.grad(expected, (q, k, v), dout),
            strict=True,
        ):
            assert torch.equal(x, y)
    assert counters["stats"]["unique_graphs"] == 1


class FakeTriton(ModuleType):
    """Stands for the Triton kernels: records what it is given, answers the right shapes."""

    def __init__(self) -> None:
        super().__init__("fpsc.kernels.triton.attention")
        self.given: list[tuple[Any, ...]] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, before: Any, fp8_backward: bool
    ) -> Any:
        out, lse, _ = cpu.forward(q, k, v, *rest, before=before)
        *_, gather, _, _, _, kinds = rest
        if not kinds & ops.FP8_CELLS:
            return out, lse, None
        saved = new_saved(q, k, *gather.shape, offsets=fp8_backward)
        return (
            out,
            lse,
            Saved(*(torch.ones_like(x, dtype=torch.float32).to(x.dtype) for x in saved)),
        )

    def backward(self, *given: Any, fp8_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.given.append(given)
        out, k8 = given[4], given[6].k8 if given[6] else given[2]
        B, _, N, D = out.shape
        like_k = out.new_ones(B, k8.shape[1], N, D)
        return out.new_ones(out.shape), like_k, like_k.clone()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> FakeTriton:
    fake = FakeTriton()
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return fake


ALL_FP8 = [[DENSE_FP8, NEAR_FP8], [NEAR_FP8_BOX, WINDOW_FP8_HEAD]]


@pytest.mark.parametrize(
    ("kinds", "heads"), [(1, [[DENSE, NEAR]] * 2), (2, ALL_FP8), (3, MIXED)], ids=str
)
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_gets_what_it_needs_and_no_more(kinds, heads, compiled, triton):
    t = small(heads, prefix=3)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, dim=40, key_heads=1))
    function = torch.compile(attend, fullgraph=True) if compiled else attend
    out = function(q, k, v, t, kinds=kinds, kernel="triton")
    if not compiled:
        kept = [x for x in out.grad_fn.saved_tensors if x is not None]
        assert any(x.data_ptr() == k.data_ptr() for x in kept) == (kinds & 1 == 1)
    out.sum().backward()
    ((_, q_, k_, v_, _, _, saved, modes, *rest),) = triton.given
    assert [x is None for x in (q_, k_, v_)] == [kinds & 1 == 0] * 3
    assert torch.equal(modes, resolved(t)) and rest[-1] == kinds
    for found, expected in zip(rest, t[3:], strict=False):
        assert torch.equal(found, expected)
    if kinds == 1:
        assert saved is None
        return
    assert [tuple(x.shape) for x in saved] == [
        (2, 2, 63), (2, 2, 9, 128, 64), (2, 1, 9, 128, 64), (2, 1, 64, 9 * 128), (2, 2, 9),
        (2, 1, 9), (2, 1, 64), (0,),
    ]  # fmt: skip
    assert all((x.float() == 1).all() for x in saved)
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize("kinds", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["cpu", "reference", "triton"])
def test_fakes_answer_the_shapes_of_every_implementation(kernel, kinds, triton):
    t = small({1: [[DENSE, NEAR]] * 2, 2: ALL_FP8, 3: MIXED}[kinds], suffix=2)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, dim=16, key_heads=1))
    args = (q, k, v, *t, None, 0.2, 0, kinds, kernel)
    torch.library.opcheck(torch.ops.fpsc.attention, args, test_utils=("test_faketensor",))
    real = torch.ops.fpsc.attention(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        fake = torch.ops.fpsc.attention(*faked)
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        assert x.requires_grad == (x is real[0])


def test_explicit_kernels_give_the_same_numbers():
    t = small(ALL_FP8, prefix=3)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, key_heads=1))
    by_cpu, by_reference = (attend(q, k, v, t, kernel=name) for name in ("cpu", "reference"))
    assert relative_rms(by_cpu, by_reference) <= KERNEL_FP8
    assert not torch.equal(by_cpu, by_reference), "both ran the same code"
    found = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (by_cpu, by_reference))
    for x, y in zip(*found, strict=True):
        assert relative_rms(x, y) <= KERNEL_FP8_GRAD


def test_values_are_read_on_the_cpu_alone():
    """On another device the checks look at shapes only: meta tensors have no values to read."""
    t = small()
    on_meta = [x.to("meta") for x in t]
    lists = on_meta[3:]
    check_lengths(2, on_meta[0], *lists)
    check_rows(*on_meta[:3])
    check_values(10**6, torch.empty(2, 2, 3, device="meta"), *lists, 3)
    with pytest.raises(ValueError, match="expected q's device cpu, got meta"):
        attend(*qkv(t), t._replace(order=t.order.to("meta")))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def swapped(gather: Tensor) -> Tensor:
    gather = gather.clone()
    gather[0, 0] = gather[0, 1]
    return gather


BAD: dict[str, tuple[Any, str]] = {
    "grid": (lambda a, t: a.update(tables((2, 5, 7), (1, 3, 4), MIXED)._asdict()),
             "expected a layout of the 60 tokens of q, got one of 70; the grid"),
    "gather twice": (lambda a, t: a.update(gather=swapped(t.gather)), "every position once"),
    "gather outside": (lambda a, t: a.update(gather=t.gather + 1), "expected positions 0..59"),
    "valid": (lambda a, t: a.update(valid=t.valid[:-1]), "expected 7 entries for the 7 tiles"),
    "valid range": (lambda a, t: a.update(valid=t.valid + int32(-200, 200, 0, 0, 0, 0, 0, 0)),
                    "expected 0..128 rows a tile, got -188..206"),
    "pointers": (lambda a, t: a.update(list_ptr=t.list_ptr[:, 1:]), "list_ptr: expected 9"),
    "pointers grow": (lambda a, t: a.update(list_ptr=t.list_ptr.flip(1)), "offsets that grow"),
    "pointers end": (lambda a, t: a.update(list_ptr=t.list_ptr + 10**6), "offsets that grow"),
    "list range": (lambda a, t: a.update(list_idx=t.list_idx + 1),
                   "list_idx: expected 0..7 (tiles), got 1..8"),
    "list twice": (lambda a, t: a.update(list_idx=t.list_idx.clamp(min=1)),
                   "list_idx: expected each list to ascend"),
    "back pointers": (lambda a, t: a.update(back_ptr=t.back_ptr[:2]), "the 3 entries of list_ptr"),
    "back length": (lambda a, t: a.update(back_idx=t.back_idx[1:]), "entries of list_idx, got"),
    "back range": (lambda a, t: a.update(back_idx=t.back_idx - 1), "back_idx: expected 0..7"),
    "back grow": (lambda a, t: a.update(back_ptr=t.back_ptr.flip(1)), "back_ptr: expected offsets"),
    "transpose": (lambda a, t: a.update(back_ptr=t.back_ptr[[0, 2, 1]]),
                  "transpose of list_ptr and list_idx, which pattern 1 is not"),
    "order": (lambda a, t: a.update(order=torch.zeros_like(t.order)), "order: expected every tile"),
    "order length": (lambda a, t: a.update(order=t.order[:, 1:]), "order: expected 8 entries"),
    "groups": (lambda a, t: a.update(groups=t.groups + 1), "groups: expected 0..7 (tiles)"),
    "groups length": (lambda a, t: a.update(groups=t.groups[:, 1:]), "groups: expected 8 entries"),
    "groupings": (lambda a, t: a.update(groups=t.groups[:0]), "expected 0..-1 (rows of groups)"),
    "patterns": (lambda a, t: a.update(modes=t.modes + int32(2, 0, 0)), "expected 0..2 (rows of"),
    "dtypes of modes": (lambda a, t: a.update(modes=t.modes + int32(0, 1, 0)), "dtypes: expected"),
    "modes": (lambda a, t: a.update(modes=t.modes[:, :2]), "expected 3 columns"),
    "kinds": (lambda a, t: a.update(kinds=4), "kinds: expected 1"),
    "no fp8": (lambda a, t: a.update(kinds=1), "kinds: 1 leaves out dtype 1, which cells have"),
    "kernel": (lambda a, t: a.update(kernel="tritn"),
               "expected one of auto, cpu, triton, gluon, hopper, reference, found 'tritn'"),
    "no interpreter": (lambda a, t: a.update(kernel="triton"), "set TRITON_INTERPRET=1"),
    "rows": (lambda a, t: a.update(rows=int32(0, 2)), "rows: expected 0..1 (rows of cells)"),
    "batch of rows": (lambda a, t: a.update(rows=int32(0, 1, 0)), "one noise row a batch element"),
    "cells": (lambda a, t: a.update(cells=t.cells + 6), "cells: expected 0..7 (rows of modes)"),
    "heads of cells": (lambda a, t: a.update(cells=t.cells[:, :, :1]), "each of the 2 heads of q"),
    "site": (lambda a, t: a.update(site=1), "expected 0 <= site < 1"),
    "table dtype": (lambda a, t: a.update(rows=t.rows.long()), "rows: expected dtype torch.int32"),
    "mask shape": (lambda a, t: a.update(key_mask=torch.ones(2, 59, dtype=torch.bool)), "[2, 60]"),
    "mask dtype": (lambda a, t: a.update(key_mask=torch.ones(2, 60)), "expected dtype torch.bool"),
    "dimensions": (lambda a, t: a.update(q=a["q"][0]), "q: expected 4 dimensions [B, H, N, D]"),
    "cross": (lambda a, t: a.update(k=a["k"][:, :, :9], v=a["v"][:, :, :9]), "cross-attention"),
    "key heads": (lambda a, t: a.update(k=a["k"].repeat(1, 2, 1, 1), v=a["v"].repeat(1, 2, 1, 1)),
                  "divides q's 2, got 4"),
    "k and v": (lambda a, t: a.update(v=a["v"][:, :1]), "k and v: expected"),
    "dtypes": (lambda a, t: a.update(v=a["v"].bfloat16()), "expected one dtype, got"),
    "float64": (lambda a, t: a.update({n: a[n].double() for n in "qkv"}), "torch.float64 is not"),
    "head_dim": (lambda a, t: a.update({n: a[n][..., :12] for n in "qkv"}), "12 is not within 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    t = small()
    q, k, v = qkv(t)
    arguments = {"q": q, "k": k, "v": v, **t._asdict()}
    ops.attention(**arguments)
    spoil, message = BAD[case]
    spoil(arguments, t)
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.attention(**arguments)


def test_too_wide_heads():
    t = small()
    with pytest.raises(ValueError, match=re.escape("257 is not within 16..256")):
        attend(*qkv(t, dim=257), t)


def test_inference_mode():
    t = small()
    q, k, v = qkv(t)
    expected = attend(q, k, v, t)
    with torch.inference_mode():
        assert torch.equal(attend(q, k, v, t), expected)
