"""The specification against torch's own attention, against autograd, and against its own words."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fpsc.kernels import reference
from tests.kernels.cases import (
    DENSE,
    DENSE_FP8,
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
    FP8_AGAINST_EXACT,
    FP8_LSE_AGAINST_EXACT,
    KERNEL_FP8,
    KERNEL_FP32,
    relative_rms,
)

SCALE = 0.2


def run(q: Tensor, k: Tensor, v: Tensor, t: Tables, mask: Tensor | None = None, scale=SCALE):
    return reference.forward(q, k, v, *t.forward, mask, scale)[:2]


def sdpa(q: Tensor, k: Tensor, v: Tensor, t: Tables, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, visible(t, mask), scale=SCALE, enable_gqa=k.shape[1] != q.shape[1]
    )


def log_sum_exp(q: Tensor, k: Tensor, t: Tables, mask: Tensor | None = None) -> Tensor:
    s = SCALE * q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)
    return s.masked_fill(~visible(t, mask), -math.inf).logsumexp(dim=-1)


@pytest.mark.parametrize("text", [(0, 0), (7, 0), (0, 130), (1, 5)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_input_dtype_cells_are_masked_attention(text, masked):
    t = tables(
        (5, 7, 9), (2, 4, 5), [[DENSE, NEAR], [WINDOW, NEAR]], prefix=text[0], suffix=text[1]
    )
    q, k, v = qkv(t, key_heads=1)
    mask = torch.rand(2, t.tokens) > 0.3 if masked else None
    out, lse = run(q, k, v, t, mask)
    assert relative_rms(out, sdpa(q, k, v, t, mask)) <= KERNEL_FP32
    assert relative_rms(lse, log_sum_exp(q, k, t, mask)) <= KERNEL_FP32


def test_fp8_cells_are_near_exact_attention():
    t = tables((5, 7, 9), (2, 4, 5), [[DENSE_FP8, NEAR_FP8]], prefix=3)
    q, k, v = qkv(t, dim=64)
    out, lse = run(q, k, v, t)
    assert relative_rms(out, sdpa(q, k, v, t)) <= FP8_AGAINST_EXACT
    assert relative_rms(lse, log_sum_exp(q, k, t)) <= FP8_LSE_AGAINST_EXACT


def test_fp8_by_hand():
    """One head, tiles of two tokens, every step written out with padded blocks and no helper."""
    t = tables((1, 1, 6), (1, 1, 2), [[NEAR_FP8]])  # 0.4 of 3 tiles: each sees one, itself
    assert t.list_idx[t.list_ptr[1, 0] : t.list_ptr[1, 3]].tolist() == [0, 1, 2]
    q, k, v = (x[0, 0] for x in qkv(t, dim=16))
    out, lse = run(q[None, None], k[None, None], v[None, None], t)

    def e4m3(x):
        return x.to(torch.float8_e4m3fn).float()

    k_less = k - k.sum(0) / 6
    c = v.abs().amax(0) / 448
    for u in range(3):
        q_u, k_u, v_u = q[2 * u : 2 * u + 2], k_less[2 * u : 2 * u + 2], v[2 * u : 2 * u + 2]
        a, b = q_u.abs().max() / 448, k_u.abs().max() / 448
        s = SCALE * a * b * (e4m3(q_u / a) @ e4m3(k_u / b).T)
        m = torch.ceil(s.amax(1, keepdim=True) / math.log(2))
        p = 256 * torch.exp2(s / math.log(2) - m)
        total = p.sum(1, keepdim=True)
        o = c * (e4m3(p) @ e4m3(v_u / c)) / total
        assert relative_rms(out[0, 0, 2 * u : 2 * u + 2], o) <= KERNEL_FP32
        true_lse = m * math.log(2) + torch.log(total / 256) + SCALE * q_u @ (k.sum(0) / 6)[:, None]
        assert relative_rms(lse[0, 0, 2 * u : 2 * u + 2], true_lse.squeeze(1)) <= KERNEL_FP32


def test_a_constant_added_to_all_keys_changes_only_the_lse():
    t = tables((2, 5, 7), (1, 4, 4), [[DENSE_FP8]])
    q, k, v = qkv(t)
    shift = 8.0 * torch.ones(32)  # of which float32 sums are exact to a few bits
    out, lse = run(q, k, v, t)
    shifted, shifted_lse = run(q, k + shift, v, t)
    assert relative_rms(shifted, out) <= KERNEL_FP8
    assert relative_rms(shifted_lse, lse + SCALE * q @ shift) <= KERNEL_FP32


def test_each_channel_of_v_has_its_own_scale():
    t = tables((2, 5, 7), (1, 4, 4), [[DENSE_FP8]])
    q, k, v = qkv(t)
    out, _ = run(q, k, v, t)
    size = torch.ones(32)
    size[3], size[4] = 2.0**14, 2.0**-40
    out_of_scaled, _ = run(q, k, v * size, t)
    assert torch.equal(out_of_scaled, out * size)


def test_each_tile_of_q_and_k_has_its_own_scale():
    """A loud tile leaves the resolution of the others alone."""
    t = tables((1, 8, 8), (1, 4, 4), [[NEAR_FP8]])  # 0.4 of 4 tiles: two
    q, k, v = qkv(t)
    k -= k.mean(dim=2, keepdim=True)
    loud = t.gather[3, :2].long()
    seen = visible(t)[0, 0][:, loud[0]]
    assert 0 < seen.sum() < t.tokens
    louder = k.clone()
    louder[0, 0, loud[0], 5] += 1e4
    louder[0, 0, loud[1], 5] -= 1e4  # the mean of all keys stays
    out, _ = run(q, k, v, t)
    out_loud, _ = run(q, louder, v, t)
    assert relative_rms(out_loud[0, 0, ~seen], out[0, 0, ~seen]) <= KERNEL_FP8
    assert relative_rms(out_loud[0, 0, seen], out[0, 0, seen]) > 0.5


def test_tiles_of_a_group_share_one_scale():
    """The operands against e4m3 with scales taken group by group, written out."""
    t = tables((3, 4, 6), (1, 2, 2), [[NEAR_FP8_BOX, WINDOW_FP8_HEAD]], prefix=5, suffix=2)
    q, k, v = qkv(t)
    mask = torch.rand(1, t.tokens) > 0.3
    tiles = reference.tile_rows(t.gather, t.valid)
    # 3 x 2 x 3 tiles of video after one of text; boxes of 2 x 1 x 2 tiles.
    boxes = [
        [0],
        [1, 2, 7, 8],
        [3, 9],
        [4, 5, 10, 11],
        [6, 12],
        [13, 14],
        [15],
        [16, 17],
        [18],
        [19],
    ]
    whole = [[0], list(range(1, 19)), [19]]
    for cell, groups in zip(
        reference.cells(q, k, resolved(t), t.groups, mask), (boxes, whole), strict=True
    ):
        assert sorted(u for group in groups for u in group) == list(range(len(tiles)))
        x, y = q[0, cell.h], k[0, cell.g]
        found = reference.operands(x, y, v[0, cell.g], tiles, cell, SCALE)
        y = y - y[mask[0]].mean(0)
        for group in groups:
            rows = torch.cat([tiles[u] for u in group])
            for real, rounded, counts in (
                (x, found.q_ND, rows),
                (y, found.k_ND, rows[mask[0, rows]]),
            ):
                s = real[counts].abs().max() / 448 if len(counts) else torch.ones(())
                expected = (real[rows] / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
                assert relative_rms(rounded[rows], expected) <= KERNEL_FP8


def test_k_has_the_finest_grouping_of_the_fp8_cells_that_read_it():
    heads = [[NEAR_FP8_BOX, WINDOW_FP8_HEAD, NEAR, WINDOW_FP8_HEAD], [DENSE, NEAR, NEAR_FP8, DENSE]]
    t = tables((3, 4, 6), (1, 2, 2), heads)
    assert reference.key_groupings(resolved(t), 2).tolist() == [[1, 2], [0, 0]]
    assert reference.key_groupings(resolved(t), 4).tolist() == [[1, 2, 0, 2], [0, 0, 0, 0]]
    assert reference.key_groupings(resolved(t), 1).tolist() == [[1], [0]]


def test_p_stays_within_e4m3():
    """A row that sees one key has p above 2**7, at most 2**8, and gets that key's value times the
    rounding of p: a sixteenth of it at most."""
    t = tables((1, 1, 3), (1, 1, 1), [[NEAR_FP8]])
    q, k, v = qkv(t)
    v = v.sign() * 448.0  # representable with scale one
    out, _ = run(100 * q, 100 * k, v, t)
    assert 2.0**reference.P_OFFSET <= reference.E4M3_MAX
    assert ((out / v - 1).abs() <= 2.0**-4).all()


def test_zero_and_tiny_tiles():
    t = tables((1, 1, 8), (1, 1, 4), [[DENSE_FP8]])
    q, k, v = qkv(t)
    q[:, :, :4] = 0.0
    k[:] = 0.0
    v[:, :, :, 0] = 0.0
    v[:, :, :, 1] = 1e-44
    out, lse = run(q, k, v, t)
    assert torch.equal(out[..., 0], torch.zeros(1, 1, 8))
    assert torch.equal(out[..., 1], torch.zeros(1, 1, 8))
    assert relative_rms(out[..., 2:], v[..., 2:].mean(2, keepdim=True).expand(1, 1, 8, 30)) < 0.1
    assert relative_rms(lse, torch.full((1, 1, 8), math.log(8))) <= KERNEL_FP32


@pytest.mark.parametrize("mode", [DENSE, DENSE_FP8])
def test_queries_without_keys(mode):
    t = tables((2, 4, 4), (1, 4, 4), [[mode], [mode]], suffix=2)
    mask = torch.ones(2, t.tokens, dtype=torch.bool)
    mask[1] = False
    q, k, v = qkv(t)
    out, lse = run(q, k, v, t, mask)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(lse[1], torch.full_like(lse[1], -math.inf))
    assert out[0].isfinite().all() and lse[0].isfinite().all()


def test_to_e4m3_rounds_to_even_and_saturates():
    x = torch.tensor([1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 449.0, -1e30, 0.0, math.nan])
    expected = torch.tensor([1.0, 1.25, 0.0, 2.0**-8, 448.0, -448.0, 0.0, math.nan])
    torch.testing.assert_close(reference.to_e4m3(x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "modes", [[DENSE, NEAR], [DENSE_FP8, WINDOW_FP8], [NEAR_FP8_BOX, WINDOW_FP8_HEAD]], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_backward_is_the_gradient_of_a_straight_through_forward(modes, masked):
    t = tables((3, 5, 7), (2, 3, 4), [modes], prefix=3)
    leaves = [x.detach().requires_grad_() for x in qkv(t, key_heads=1)]
    mask = torch.rand(1, t.tokens) > 0.3 if masked else None
    tiles = reference.tile_rows(t.gather, t.valid)
    q, k, v = (x.detach() for x in leaves)
    seen = [
        (real, reference.operands(*(x.detach() for x in real), tiles, cell, SCALE))
        for cell in reference.cells(q, k, resolved(t), t.groups, mask)
        for real in [(leaves[0][0, cell.h], leaves[1][0, 0], leaves[2][0, 0])]
    ]
    s, values = [], []
    for real, rounded in seen:
        # Rounding, and taking the mean from k, have gradient one.
        q_h, k_h, v_h = (x + (y - x).detach() for x, y in zip(real, rounded[:3], strict=True))
        s.append(SCALE * q_h @ k_h.T)
        values.append(v_h)
    scores = torch.stack(s)[None].masked_fill(~visible(t, mask), -math.inf)
    out = scores.softmax(dim=-1) @ torch.stack(values)[None]
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, dout)

    shift = torch.stack([rounded.shift_N for _, rounded in seen])
    lse = scores.detach().logsumexp(dim=-1) + shift
    given = (dout, q, k, v, out.detach(), lse, None)
    for x, y in zip(reference.backward(*given, *t.backward, mask, SCALE), expected, strict=True):
        assert relative_rms(x, y) <= KERNEL_FP32
