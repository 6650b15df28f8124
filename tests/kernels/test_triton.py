"""The Triton kernels in Triton's interpreter against the reference: out, lse, dq, dk, dv.

Every launch stays within its arguments, and uninitialised memory is NaN. Inputs of float32, which
no GPU is given, have no rounding but that of the FP8 cells: there the thresholds are tight.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests import aot_autograd_check

from fpsc.kernels import ops, reference
from fpsc.kernels.kinds import FP8_CELLS, INPUT_CELLS
from fpsc.kernels.triton import interpreter
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
from tests.thresholds import (
    KERNEL_FP8,
    KERNEL_FP8_GRAD,
    KERNEL_FP32,
    TRITON_BF16,
    TRITON_BF16_GRAD,
    TRITON_FP16,
    TRITON_FP16_GRAD,
    TRITON_FP32,
    relative_rms,
)

if not interpreter.ACTIVE:
    pytest.skip("kernels are compiled here: TRITON_INTERPRET=0", allow_module_level=True)

from fpsc.kernels.triton import attention, configs, gradients, prologue, tune
from fpsc.kernels.triton.configs import Config
from tests.kernels.memory import Last, Launches, run_last_places_alone

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

GRIDS = [((5, 7, 9), (5, 5, 5)), ((1, 13, 17), (1, 11, 11)), ((3, 1, 64), (3, 1, 40))]
MIXED = [[DENSE, NEAR_FP8, WINDOW, WINDOW_FP8]]
"""Modes of one batch element."""

ALLOWED = {
    torch.float32: (TRITON_FP32, KERNEL_FP32),
    torch.bfloat16: (TRITON_BF16, TRITON_BF16_GRAD),
    torch.float16: (TRITON_FP16, TRITON_FP16_GRAD),
}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Statistics in few stretches: each takes milliseconds here, however short it is."""
    monkeypatch.setattr(prologue, "CHUNKS", 3)
    return Launches(monkeypatch)


def allowed(dtype: torch.dtype, fp8: bool) -> tuple[float, float]:
    """For results, and for gradients."""
    out, grad = ALLOWED[dtype]
    return (max(out, KERNEL_FP8), max(grad, KERNEL_FP8_GRAD)) if fp8 else (out, grad)


def kinds_of(t: Tables) -> int:
    fp8 = resolved(t)[..., 1] == FP8
    return int((~fp8).any()) + 2 * int(fp8.any())


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tables,
    mask: Tensor | None = None,
    scale: float = 0.2,
    kinds: int | None = None,
) -> tuple[Tensor, Tensor, Any]:
    kinds = kinds_of(t) if kinds is None else kinds
    return attention.forward(q, k, v, *t.forward, mask, scale, kinds)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tables,
    mask: Tensor | None = None,
    scale: float = 0.2,
    kinds: int | None = None,
    least_grad: float = 0.0,
) -> None:
    """Cell by cell. least_grad: a norm of gradients below which errors are not relative to it."""
    kinds = kinds_of(t) if kinds is None else kinds
    out, lse, saved = run(q, k, v, t, mask, scale, kinds)
    expected, expected_lse, _ = reference.forward(q, k, v, *t.forward, mask, scale)
    assert (out.dtype, out.shape, lse.dtype) == (q.dtype, q.shape, torch.float32)
    assert out.transpose(1, 2).is_contiguous()
    assert (saved is None) == (kinds & FP8_CELLS == 0)

    dout = torch.randn(q.shape).to(q.dtype)
    rest = (*t.backward, mask, scale, kinds)
    given = (q, k, v) if kinds & INPUT_CELLS else (None, None, None)
    grads = attention.backward(dout, *given, expected, expected_lse, saved, *rest)
    expected_grads = reference.backward(dout, q, k, v, expected, expected_lse, None, *rest)
    assert [(g.dtype, g.shape) for g in grads] == [(x.dtype, x.shape) for x in (q, k, v)]

    seen = expected_lse.isfinite()
    assert torch.equal(lse[~seen], expected_lse[~seen])
    B, H, G = *q.shape[:2], k.shape[1]
    for b in range(B):
        for h in range(H):
            at, key_at = (b, h), (b, slice(h // (H // G), h // (H // G) + 1))
            fp8 = bool(resolved(t)[b, h, 1] == FP8)
            limit, limit_grad = allowed(q.dtype, fp8)
            some = seen[at]
            assert relative_rms(out[at], expected[at]) <= limit, at
            assert relative_rms(lse[at][some], expected_lse[at][some]) <= TRITON_FP32, at
            assert relative_rms(grads[0][at], expected_grads[0][at], least_grad) <= limit_grad, at
            heads = resolved(t)[b].unflatten(0, (G, -1))[key_at[1]]
            _, limit_grad = allowed(q.dtype, bool((heads[..., 1] == FP8).any()))
            for x, y in zip(grads[1:], expected_grads[1:], strict=True):
                assert relative_rms(x[key_at], y[key_at], least_grad) <= limit_grad, at


@pytest.mark.parametrize("text", [(0, 0), (7, 0), (0, 130), (1, 1)], ids=str)
@pytest.mark.parametrize(("grid", "tile"), GRIDS, ids=str)
def test_odd_grids_with_text(grid, tile, text):
    """Text of no tokens, in part of a tile, in two."""
    t = tables(grid, tile, [[NEAR, NEAR_FP8]], prefix=text[0], suffix=text[1])
    check(*qkv(t), t)


def test_tiny_tiles():
    """Tiles of one row, a sequence shorter than a block."""
    t = tables((1, 2, 2), (1, 1, 1), [[NEAR, NEAR_FP8]], prefix=1)
    check(*qkv(t), t)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_each_head_of_each_batch_element_has_its_mode(key_heads, masked):
    heads = [*MIXED, [NEAR_FP8, WINDOW, DENSE, WINDOW_FP8]]
    t = tables((3, 5, 9), (3, 5, 5), heads, prefix=3)
    mask = torch.rand(2, t.tokens) > 0.3 if masked else None
    check(*qkv(t, key_heads=key_heads), t, mask)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_tiles_that_share_scales(key_heads):
    """Also where query heads of one key head have different groupings, and where keys are gone."""
    heads = [NEAR_FP8_BOX, WINDOW_FP8_HEAD, WINDOW_FP8_HEAD, DENSE]
    t = tables((4, 4, 7), (2, 4, 4), [heads, [*heads[1:], NEAR_FP8]], suffix=2)
    q, k, v = qkv(t, key_heads=key_heads)
    q[:, :, t.gather[1, :9].long()] *= 4  # so that scales of one's own differ
    k[:, :, t.gather[0, :9].long()] *= 4
    mask = torch.rand(2, t.tokens) > 0.3
    mask[1, t.gather[0, : int(t.valid[0])].long()] = False
    check(q, k, v, t, mask, scale=0.02)


@pytest.mark.parametrize("kind", [NEAR, NEAR_FP8])
def test_masks(kind):
    """Keys at random, a whole tile, every key of a batch element but one, every key."""
    t = tables((3, 5, 9), (3, 5, 5), [[kind, DENSE_FP8 if kind == NEAR_FP8 else DENSE]] * 4)
    mask = torch.rand(4, t.tokens) > 0.5
    mask[1, t.gather[1, : int(t.valid[1])].long()] = False
    mask[2] = torch.arange(t.tokens) == 11
    mask[3] = False
    q, k, v = qkv(t, key_heads=1)
    # Of a query that sees one key alone, the gradient cancels to zero.
    check(q, k, v, t, mask, least_grad=32**0.5)
    out, lse, _ = run(q, k, v, t, mask)
    nothing = ~visible(t, mask).any(dim=-1)
    assert nothing[2].any() and nothing[3].all() and not nothing[0].any()
    assert not out[nothing].any() and (lse[nothing] == -math.inf).all()


@pytest.mark.parametrize("heads", [[NEAR, WINDOW], [NEAR_FP8, WINDOW_FP8]], ids=str)
def test_masked_keys_may_hold_anything(heads):
    t = tables((3, 5, 9), (3, 5, 5), [heads])
    mask = torch.rand(1, t.tokens) > 0.3
    q, k, v = qkv(t)
    k[0, :, ~mask[0]] = v[0, :, ~mask[0]] = 0.0
    clean = results(q, k, v, t, mask)
    k[0, :, ~mask[0]], v[0, :, ~mask[0]] = math.nan, math.inf
    for x, y in zip(results(q, k, v, t, mask), clean, strict=True):
        assert torch.equal(x, y)
    for g in clean[3:]:
        assert not g[0, :, ~mask[0]].any()


def results(
    q: Tensor, k: Tensor, v: Tensor, t: Tables, mask: Tensor | None = None, scale: float = 0.2
) -> list[Tensor]:
    """out, lse, dq, dk, dv"""
    out, lse, saved = run(q, k, v, t, mask, scale)
    dout = torch.linspace(-1, 1, q.numel()).view(q.shape).to(q.dtype)
    rest = (*t.backward, mask, scale, kinds_of(t))
    return [out, lse, *attention.backward(dout, q, k, v, out, lse, saved, *rest)]


@pytest.mark.parametrize("dim", [16, 17, 40, 64, 72, 80, 96, 128, 256])
def test_head_dims(dim):
    t = tables((2, 5, 7), (2, 5, 4), [[NEAR, NEAR_FP8]], prefix=1)
    check(*qkv(t, dim=dim), t, scale=dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    heads = [*MIXED, [NEAR_FP8_BOX, NEAR, WINDOW_FP8_HEAD, DENSE]]
    t = tables((3, 5, 9), (3, 5, 5), heads, suffix=3)
    mask = torch.rand(2, t.tokens) > 0.3
    check(*qkv(t, dtype=dtype, dim=64), t, mask, scale=0.125)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.5])
def test_scales_of_the_softmax(scale):
    """Of 0, all keys weigh the same, and no gradient reaches q and k."""
    t = tables((3, 5, 9), (3, 5, 5), [[NEAR, NEAR_FP8]], prefix=3)
    check(*qkv(t), t, scale=scale)


ONLY = {
    1: [[NEAR, WINDOW]],
    2: [[NEAR_FP8_BOX, WINDOW_FP8]],
    3: [[NEAR, WINDOW_FP8]],
}


@pytest.mark.parametrize("kinds", ONLY)
def test_kinds_that_are_left_out_are_not_launched(kinds, launches):
    t = tables((3, 5, 9), (3, 5, 5), ONLY[kinds])
    assert kinds_of(t) == kinds
    check(*qkv(t, dtype=torch.bfloat16), t)
    attended = [options["FP8"] for name, options in launches.seen if name == "attend"]
    assert attended == [bool(fp8) for fp8 in (0, 1) if kinds >> fp8 & 1]
    of_fp8 = {"statistics", "finish_statistics", "group_maxima", "widen_tiles"}
    names = {name for name, _ in launches.seen}
    assert names & of_fp8 == (of_fp8 if kinds & FP8_CELLS else set())


@pytest.mark.parametrize("heads", ONLY.values(), ids=str)
def test_kinds_that_do_not_occur_change_nothing(heads):
    """A policy may offer what no cell of this call has."""
    t = tables((3, 5, 9), (3, 5, 5), heads)
    q, k, v = qkv(t)
    for x, y in zip(run(q, k, v, t, kinds=3)[:2], run(q, k, v, t)[:2], strict=True):
        assert torch.equal(x, y)
    check(q, k, v, t, kinds=3)


@pytest.mark.parametrize(
    "config",
    [
        Config(64, 64, 4, 1),
        Config(128, 32, 4, 1, persistent=True),
        Config(32, 128, 4, 1),
        Config(128, 128, 4, 1, specialise=True, persistent=True),
    ],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize("permuted", [False, True])
def test_configurations(config, permuted, monkeypatch):
    """Of tiles that end in each block of theirs: 75 rows, 60, 3, and fewer by a mask."""
    monkeypatch.setattr(configs, "INTERPRETED", config)
    monkeypatch.setattr(tune, "PERMUTE_V", permuted)
    t = tables((3, 5, 9), (3, 5, 5), [[NEAR, NEAR_FP8]] * 2, prefix=3)
    check(*qkv(t), t)
    mask = torch.rand(2, t.tokens) > torch.tensor([[0.3], [0.6]])
    check(*qkv(t), t, mask)


PAIRS = Config(128, 256, 4, 1, specialise=True, persistent=True)
PAIRS_REORDERED = Config(128, 256, 4, 1, specialise=True, persistent=True, reorder=True)
REORDERED = Config(128, 128, 4, 1, specialise=True, persistent=True, reorder=True)


def use(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 cells are attended with it."""
    monkeypatch.setattr(
        tune, "choose", lambda kernel, *_: config if kernel == "fp8" else configs.INTERPRETED
    )


def check_forward(
    q: Tensor, k: Tensor, v: Tensor, t: Tables, mask: Tensor | None = None, scale: float = 0.2
) -> None:
    """FP8 cells alone."""
    out, lse, _ = run(q, k, v, t, mask, scale)
    expected, expected_lse, _ = reference.forward(q, k, v, *t.forward, mask, scale)
    seen = expected_lse.isfinite()
    assert torch.equal(lse[~seen], expected_lse[~seen])
    assert relative_rms(out, expected) <= KERNEL_FP8
    assert relative_rms(lse[seen], expected_lse[seen]) <= TRITON_FP32


LISTS = [[], [3], [5, 1, 0], [2, 2], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]]
"""Of six tiles: none, one, odd numbers, the same one twice, in any order."""


@pytest.mark.parametrize(
    ("config", "permuted"),
    [(PAIRS, False), (PAIRS, True), (PAIRS_REORDERED, False), (REORDERED, False)],
    ids=["pairs", "pairs, v permuted", "pairs, k reordered", "k reordered"],
)
class TestTwoKeyTilesAtATime:
    """And K copied in the order in which P needs no exchange, of one tile too."""

    @pytest.fixture(autouse=True)
    def chosen(self, config, permuted, monkeypatch):
        monkeypatch.setattr(tune, "PERMUTE_V", permuted)
        use(config, monkeypatch)

    def listed(self, lists: list[list[int]]) -> Tables:
        """Six ragged tiles, each with its list of key tiles."""
        t = tables((3, 5, 9), (1, 5, 5), [[DENSE_FP8]])
        lengths = torch.tensor([[0, *map(len, lists)]])
        assert len(lists) == len(t.valid)
        return t._replace(
            list_ptr=lengths.cumsum(1).int().expand(3, -1).contiguous(),
            list_idx=torch.tensor([w for one in lists for w in one], dtype=torch.int32),
        )

    def test_lists_of_any_length(self):
        t = self.listed(LISTS)
        check_forward(*qkv(t), t)

    def test_other_tiles_do_not_matter(self):
        """Their scales neither, in lists of odd length."""
        t = self.listed([[1], [2], [3], [4], [5], [3, 4, 5]])
        q, k, v = qkv(t)
        k[:, :, t.gather[0, : int(t.valid[0])].long()] *= 100
        check_forward(q, k, v, t)

    def test_ragged_tiles_text_and_masks(self):
        """Tiles of 66 and 55 rows, text in two tiles, and of one batch element few keys."""
        t = tables(*GRIDS[1], [[NEAR_FP8], [DENSE_FP8]], suffix=130)
        mask = torch.rand(2, t.tokens) > torch.tensor([[-1.0], [0.6]])
        mask[1, t.gather[1, : int(t.valid[1])].long()] = False
        check_forward(*qkv(t, dim=40), t, mask)

    def test_numbers_are_those_of_one_tile_at_a_time(self, monkeypatch):
        """P rounds alike: what differs is the order of float32 sums."""
        t = tables((3, 5, 9), (3, 5, 5), [[NEAR_FP8]], prefix=3)
        q, k, v = qkv(t)
        out, lse, _ = run(q, k, v, t)
        use(configs.INTERPRETED, monkeypatch)
        one, one_lse, _ = run(q, k, v, t)
        assert relative_rms(out, one) <= TRITON_FP32
        assert relative_rms(lse, one_lse) <= TRITON_FP32

    def test_what_is_not_finite_stays_with_its_tile(self):
        t = tables((2, 6, 12), (2, 6, 3), [[NEAR_FP8]], prefix=3)
        q, k, v = qkv(t)
        at = int(t.gather[2, 1])
        touched = visible(t)[0, 0, :, at]
        assert 0 < touched.sum() < t.tokens
        v[0, 0, at, 5] = math.nan
        out, _, _ = run(q, k, v, t)
        assert torch.equal(out[0, 0, :, 5].isnan(), touched)
        k[0, 0, at, 5] = math.inf
        out, lse, _ = run(q, k, v, t)
        assert torch.equal(out[0, 0].isnan().all(1), touched)
        assert torch.equal(lse[0, 0].isnan(), touched)
        assert out[0, 0, ~touched].isfinite().all()


@pytest.mark.parametrize("layout", ["BNHD", "BHDN", "DNHB"])
def test_any_strides(layout):
    t = tables((3, 5, 9), (3, 5, 5), [[NEAR, NEAR_FP8]] * 2)
    contiguous = [x.contiguous() for x in qkv(t, key_heads=1)]
    order = ["BHND".index(axis) for axis in layout]
    back = [layout.index(axis) for axis in "BHND"]
    strided = [x.permute(order).contiguous().permute(back) for x in contiguous]
    for x, y in zip(results(*strided, t), results(*contiguous, t), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned_pointers_and_odd_strides(dtype):
    t = tables((3, 5, 9), (3, 5, 5), [[NEAR, NEAR_FP8]])
    q, k, v = qkv(t, dim=40, dtype=dtype)
    odd = []
    for x, offset in zip((q, k, v), (1, 3, 7), strict=True):
        buffer = torch.full((x.numel() * 2 + offset,), math.nan, dtype=dtype)
        B, H, N, D = x.shape
        view = buffer.as_strided((B, H, N, D), (H * N * 41, N * 41, 41, 1), offset)
        odd.append(view.copy_(x))
        assert view.data_ptr() % 16
    for x, y in zip(results(*odd, t), results(q, k, v, t), strict=True):
        assert torch.equal(x, y)


def test_heads_that_share_memory():
    """Key heads and batch elements expanded, not repeated."""
    t = tables((3, 5, 9), (3, 5, 5), [[NEAR, NEAR_FP8]] * 2)
    q, k, v = qkv(t)
    q, k, v = q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1), v[:, :1].expand_as(k)
    copies = (q.contiguous(), k.contiguous(), v.contiguous())
    for x, y in zip(results(q, k, v, t), results(*copies, t), strict=True):
        assert torch.equal(x, y)


def test_gradients_may_have_any_strides():
    t = tables((3, 5, 9), (3, 5, 5), [[NEAR, NEAR_FP8]])
    q, k, v = qkv(t)
    out, lse, saved = run(q, k, v, t)
    rest = (*t.backward, None, 0.2, 3)
    for dout in (torch.ones(()).expand(q.shape), torch.randn(1, 2, 32, t.tokens).transpose(2, 3)):
        found = attention.backward(dout, q, k, v, out, lse, saved, *rest)
        same = attention.backward(dout.contiguous(), q, k, v, out, lse, saved, *rest)
        for x, y in zip(found, same, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("heads", [[NEAR, WINDOW], [NEAR_FP8, WINDOW_FP8]], ids=str)
def test_empty_lists(heads):
    """A tile that sees nothing, and that nobody sees."""
    t = tables((3, 5, 9), (3, 5, 5), [heads])
    nothing = torch.zeros_like(t.list_ptr)
    t = t._replace(list_ptr=nothing, back_ptr=nothing, list_idx=t.list_idx[:1] * 0)
    t = t._replace(back_idx=t.list_idx)
    q, k, v = qkv(t)
    out, lse, *grads = results(q, k, v, t)
    assert not out.any() and (lse == -math.inf).all()
    assert not any(g.any() for g in grads)
    one = t._replace(list_ptr=nothing.clone(), back_ptr=nothing.clone())
    one.list_ptr[:, 1:] = 1  # tile 0 sees tile 0
    one.back_ptr[:, 1:] = 1
    check(q, k, v, one)


@pytest.mark.parametrize("dtype", [INPUT_DTYPE, FP8], ids=["input", "fp8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
class TestNotFinite:
    """NaN and infinities reach exactly the outputs whose tiles they touch."""

    def setup_case(self, dtype: int) -> tuple[Tables, list[Tensor], int]:
        t = tables((2, 6, 12), (2, 6, 3), [[(NEAR, NEAR_FP8)[dtype]]], prefix=3)
        return t, qkv(t), int(t.gather[2, 1])

    def test_in_k(self, value, dtype):
        t, (q, k, v), at = self.setup_case(dtype)
        mask = torch.ones(1, t.tokens, dtype=torch.bool)
        v[0, 0, at] = 0.0  # not the largest of its channel
        mask[0, at] = False  # what the others see is as if the key were not there
        expected, _, _ = run(q, k, v, t, mask)
        k[0, 0, at, 5] = value
        out, lse, _ = run(q, k, v, t)
        touched = visible(t)[0, 0, :, at]
        assert 0 < touched.sum() < t.tokens
        assert out[0, 0, touched].isnan().all() and lse[0, 0, touched].isnan().all()
        assert torch.equal(out[0, 0, ~touched], expected[0, 0, ~touched])

    def test_in_v(self, value, dtype):
        t, (q, k, v), at = self.setup_case(dtype)
        expected, expected_lse, _ = run(q, k, v, t)
        v[0, 0, at, 5] = value
        out, lse, _ = run(q, k, v, t)
        touched = torch.zeros_like(out, dtype=torch.bool)
        touched[0, 0, :, 5] = visible(t)[0, 0, :, at]
        assert torch.equal(out.isnan(), touched)
        assert torch.equal(lse, expected_lse)
        others = torch.arange(32) != 5  # the largest of channel 5 may have been that very value
        assert torch.equal(out[..., others], expected[..., others])

    def test_in_q(self, value, dtype):
        t, (q, k, v), at = self.setup_case(dtype)
        q[0, 0, at, 5] = 0.0
        expected, _, _ = run(q, k, v, t)
        q[0, 0, at, 5] = value
        out, lse, _ = run(q, k, v, t)
        touched = torch.arange(t.tokens) == at
        assert out[0, 0, touched].isnan().all() and lse[0, 0, touched].isnan().all()
        assert torch.equal(out[0, 0, ~touched], expected[0, 0, ~touched])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("heads", [[NEAR], [NEAR_FP8]], ids=str)
def test_not_finite_gradients(heads, value):
    """What is not finite in dout reaches the gradients that it touches, and no other."""
    t = tables((2, 6, 12), (2, 6, 3), [heads])
    q, k, v = qkv(t)
    out, lse, saved = run(q, k, v, t)
    rest = (*t.backward, None, 0.2, kinds_of(t))
    at = int(t.gather[2, 1])
    dout = torch.randn(q.shape)
    clean = attention.backward(dout, q, k, v, out, lse, saved, *rest)
    dout[0, 0, at, 5] = value
    dq, dk, dv = attention.backward(dout, q, k, v, out, lse, saved, *rest)
    row = torch.arange(t.tokens) == at
    seen = visible(t)[0, 0, at]
    assert not dq[0, 0, row].isfinite().any() and torch.equal(dq[0, 0, ~row], clean[0][0, 0, ~row])
    for found, before in ((dk, clean[1]), (dv, clean[2])):
        assert not found[0, 0, seen].isfinite().all(dim=1).any()
        assert torch.equal(found[0, 0, ~seen], before[0, 0, ~seen])


@pytest.mark.parametrize("factor", [1e-20, 30.0])
def test_outliers_and_zero_tiles(factor):
    t = tables((4, 6, 8), (2, 6, 8), [[NEAR_FP8, NEAR]])
    q, k, v = qkv(t)
    for x in (q, k):
        x[:, :, t.gather[1, : int(t.valid[1])].long()] = 0.0
    v[:, :, :, 7] = 0.0
    for x in (q, k, v):
        x[0, :, 17, 3] *= factor
    check(q, k, v, t)


def test_nothing_but_zeros():
    t = tables((3, 5, 9), (3, 5, 5), [[NEAR, NEAR_FP8]])
    q, k, v = (torch.zeros_like(x) for x in qkv(t))
    out, _, *grads = results(q, k, v, t)
    assert not out.any() and not grads[0].any() and not grads[1].any()
    assert grads[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_values_saturate(dtype):
    """Beyond e4m3, the range of exp, and float32's of squares: finite in, finite out."""
    t = tables((4, 6, 8), (2, 6, 8), [[DENSE_FP8, DENSE]])
    q, k, v = qkv(t, dtype=dtype)
    for x in (q, k, v):
        x[0, :, 17, 3] = 1e15
    out, lse, _ = run(q, k, v, t)
    assert out.isfinite().all() and lse.isfinite().all()
    # Query and key 17 agree so much that no other key counts.
    assert relative_rms(out[0, :, 17], v[0, :, 17]) <= allowed(dtype, fp8=True)[0]


def test_packed_values_never_wrap():
    """Where a division by the scale rounds to above 448, it is 448 and no other number."""
    t = tables((2, 6, 8), (2, 2, 4), [[WINDOW_FP8]])
    q, k, v = qkv(t)
    largest = torch.rand(2000) * 100
    above = largest[largest / (largest / 448) > 448]
    assert len(above) >= len(t.valid), "no division rounds up: this shows nothing"
    for u, rows in enumerate(reference.tile_rows(t.gather, t.valid)):
        q[0, 0, rows] = 0.1
        q[0, 0, rows[3], 4] = -above[u]
    _, _, saved = run(q, k, v, t)
    q8 = saved.q8[0, 0].float()
    assert torch.equal(q8.amin(dim=(1, 2)), torch.full((len(t.valid),), -448.0))
    assert (q8.abs() == 448).sum() == len(t.valid)


@pytest.mark.parametrize("cells", [[NEAR, WINDOW], [NEAR_FP8_BOX, WINDOW_FP8]], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wrong", ["longer", "negative", "counts"])
def test_a_layout_of_another_sequence_stays_in_bounds(wrong, masked, cells):
    """On a GPU nobody looks at its numbers before: rows that are not of the sequence are left."""
    t = tables((3, 5, 9), (3, 5, 5), [cells], prefix=3)
    q, k, v = qkv(t)
    if wrong == "longer":
        q, k, v = (x[:, :, : t.tokens // 2] for x in (q, k, v))
    elif wrong == "negative":
        t.gather[:, ::3] = -5
    else:
        t.valid.add_(500)
    mask = torch.rand(1, q.shape[2]) > 0.3 if masked else None
    results(q, k, v, t, mask)


def test_operator(monkeypatch):
    """Schema, autograd, fake and compiled, as `fpsc::attention` with a named kernel."""
    t = tables((2, 3, 5), (2, 3, 3), [[NEAR_FP8, DENSE]], prefix=1)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, dim=16, key_heads=1))
    mask = torch.rand(1, t.tokens) > 0.3
    args = (q, k, v, *t, mask, 0.2, 0, 3, "triton")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    # Not the fourth check of opcheck, which adds all outputs up: e4m3 cannot.
    torch.library.opcheck(torch.ops.fpsc.attention, args, test_utils=checks)
    aot_autograd_check(lambda *a: torch.ops.fpsc.attention(*a)[:2], args, {}, dynamic=True)
    out, *others = torch.ops.fpsc.attention(*args)
    given = [x.detach() for x in (out, q, k, v, out, *others)]
    rest = (resolved(t), *t[3:], mask, 0.2, 3, "triton")
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fpsc.attention_backward, (*given, *rest), test_utils=checks)


@pytest.mark.parametrize("heads", [[NEAR_FP8, WINDOW_FP8], [NEAR, NEAR_FP8]], ids=str)
def test_gradients_through_the_operator(heads):
    """Where all cells are FP8, of what forward packed alone."""
    t = tables((3, 5, 9), (3, 5, 5), [heads], prefix=3)
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, key_heads=1))
    dout = torch.randn(q.shape)
    found = []
    for kernel in ("triton", "reference"):
        given = {**t._asdict(), "scale": 0.2, "kinds": kinds_of(t), "kernel": kernel}
        out, _ = ops.attention(q, k, v, **given)
        found.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
    for x, y in zip(*found, strict=True):
        assert relative_rms(x, y) <= KERNEL_FP8


@pytest.mark.parametrize("fp8", [False, True])
def test_offsets_beyond_32_bits(fp8, launches, monkeypatch):
    """The last program of every launch, of buffers and strides of more than 2^31 elements.

    They take no memory but where that program touches it. It sees what a small call sees.
    """
    torch.use_deterministic_algorithms(False)  # which fills memory
    many, dim = 33_000, 256
    t = tables((1, 2, 8), (1, 2, 4), [[WINDOW_FP8 if fp8 else WINDOW]])
    assert len(t.valid) == 2 and many * 2 * 128 * dim > 2**31
    own = torch.tensor([0, 1], dtype=torch.int32)  # both tiles see themselves alone
    ptr = torch.tensor([[0, 1, 2]] * 3, dtype=torch.int32)
    lists = {"list_ptr": ptr, "back_ptr": ptr, "list_idx": own, "back_idx": own}
    t = t._replace(**lists, order=own.expand(3, 2).contiguous())
    rows = reference.tile_rows(t.gather, t.valid)[1]
    inputs = [torch.randn(1, 1, t.tokens, dim, dtype=torch.bfloat16) for _ in range(3)]
    expected = results(*inputs, t)

    wide = t._replace(cells=t.cells.expand(1, 1, many).contiguous())
    strides = (0, 2**17, 2**31 // (t.tokens - 1) + 8, 1)
    size = (many - 1) * strides[1] + (t.tokens - 1) * strides[2] + dim
    assert size > 2**32
    far = []
    for x in inputs:
        x_far = torch.empty(size, dtype=x.dtype).as_strided((1, many, t.tokens, dim), strides)
        x_far[:, -1] = x[:, 0]
        far.append(x_far)
    monkeypatch.setattr(attention, "_heads_by_kind", lambda *_: every_head(many))
    run_last_places_alone(monkeypatch)
    watched = launches.launch

    def last(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        watched(kernel, tuple(map(Last, grid)), *args, **options)

    monkeypatch.setattr(prologue, "CHUNKS", 1)
    for module in (attention, gradients, prologue):
        monkeypatch.setattr(module, "launch", last)
    for found, of in zip(results_of_last(*far, wide), expected, strict=True):
        assert torch.equal(found[:, -1:, rows], of[:, :, rows])


def every_head(heads: int) -> Tensor:
    """What `attention._heads_by_kind` finds where all heads are alike."""
    return torch.tensor([heads, *range(heads)], dtype=torch.int32).expand(2, -1)


def results_of_last(q: Tensor, k: Tensor, v: Tensor, t: Tables) -> list[Tensor]:
    """As `results`, of gradients dout that are those of its small call."""
    modes = t.modes[t.cells[0, 0].long()][None]
    fp8 = kinds_of(t._replace(cells=t.cells[:, :, :1])) == 2
    forward = (modes, t.list_ptr, t.list_idx, t.order, t.groups, t.gather, t.valid, None, 0.2)
    out, lse, saved = attention.forward(q, k, v, *forward, 2 if fp8 else 1)
    one = torch.linspace(-1, 1, q[:, -1:].numel()).view(q[:, -1:].shape).to(q.dtype)
    given = (None, None, None) if fp8 else (q, k, v)
    rest = (modes, *t[3:], None, 0.2, 2 if fp8 else 1)
    dout = one.expand(q.shape)
    return [out, lse, *attention.backward(dout, *given, out, lse, saved, *rest)]
