"""What the Triton kernels do before their products: operands in tile order, norm, rotation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fpsc.kernels import reference
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
from fpsc.kernels.triton import interpreter
from tests.kernels.cases import (
    DENSE,
    NEAR,
    NEAR_FP8,
    NEAR_FP8_BOX,
    WINDOW_FP8,
    WINDOW_FP8_HEAD,
    Tables,
    qkv,
    resolved,
    tables,
)
from tests.thresholds import (
    BEFORE_FP8,
    E4M3_OTHERWISE,
    KERNEL_FP8,
    KERNEL_FP32,
    TRITON_FP32,
    relative_rms,
)

if not interpreter.ACTIVE:
    pytest.skip("kernels are compiled here: TRITON_INTERPRET=0", allow_module_level=True)

from fpsc.kernels.triton import attention, prologue, tune
from tests.kernels.memory import Launches

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    monkeypatch.setattr(prologue, "CHUNKS", 3)
    return Launches(monkeypatch)


def unpermuted(v8: Tensor) -> Tensor:
    """V as it would be stored otherwise: bits k0 k1 k2 k3 of a column hold key k0 k2 k3 k1."""
    column = torch.arange(v8.shape[-1])
    bit = [(column >> i) & 1 for i in range(4)]
    key = column // 16 * 16 + bit[0] + 2 * bit[2] + 4 * bit[3] + 8 * bit[1]
    return v8[..., key.argsort()]


def raster(x_TBD: Tensor, t: Tables, keys: Tensor | None = None) -> Tensor:
    """Tile order [TILES, BLOCK, DP] -> [N, DP], NaN where keys [N] does not take part."""
    found = torch.full((t.tokens, x_TBD.shape[-1]), math.nan)
    for rows, of in zip(reference.tile_rows(t.gather, t.valid), x_TBD, strict=True):
        kept = rows if keys is None else rows[keys[rows]]
        found[kept] = of[: len(kept)]
    return found


def check_operands(
    q: Tensor, k: Tensor, v: Tensor, t: Tables, saved: Saved, mask: Tensor | None, scale: float
) -> None:
    """Dequantised, in raster order, they are the reference's."""
    D, DP = q.shape[-1], padded_head_dim(q.shape[-1])
    for cell in reference.cells(q, k, resolved(t), t.groups, mask):
        if not cell.fp8:
            assert not saved.shift[cell.b, cell.h].any()
            continue
        b, h, g = cell[:3]
        of = reference.operands(q[b, h], k[b, g], v[b, g], _rows(t), cell, scale)
        seen = cell.taking_part
        q8 = saved.q8[b, h].float() * saved.q_scale[b, h, :, None, None] * math.copysign(1, scale)
        k8 = saved.k8[b, g].float() * saved.k_scale[b, g, :, None, None]
        stored = saved.v8[b, g].float()
        stored = unpermuted(stored) if tune.permutes_v(q.device) else stored
        v8 = (stored * saved.v_scale[b, g, :, None]).T.unflatten(0, (len(t.valid), -1))
        for name, found, expected, rows in (
            ("q", raster(q8, t), of.q_ND, torch.ones_like(seen)),
            ("k", raster(k8, t, seen), of.k_ND, seen),
            ("v", raster(v8, t, seen), of.v_ND, seen),
        ):
            assert not found[rows][:, D:].any(), f"{name}: channels of padding"
            differ = (found[rows, :D] - expected[rows]).abs() > 1e-5 * expected[rows].abs()
            assert differ.double().mean() <= E4M3_OTHERWISE, name
            assert relative_rms(found[rows, :D], expected[rows]) <= KERNEL_FP8, name
        assert relative_rms(saved.shift[b, h], of.shift_N) <= KERNEL_FP32
        assert saved.q8.shape[-1] == saved.k8.shape[-1] == saved.v8.shape[-2] == DP
        # Beyond the rows of a tile: zero in Q and V, in K the first key again.
        for u, rows in enumerate(_rows(t)):
            keys = int(seen[rows].sum())
            assert not saved.q8[b, h, u, len(rows) :].float().any()
            assert not stored.unflatten(1, (len(t.valid), -1))[:, u, keys:].any()
            first = saved.k8[b, g, u, :1].float()
            assert (saved.k8[b, g, u, keys:].float() == (first if keys else 0)).all()


def _rows(t: Tables) -> list[Tensor]:
    return reference.tile_rows(t.gather, t.valid)


def before_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tables,
    kinds: int,
    before: Before = NOTHING_BEFORE,
    mask: Tensor | None = None,
    scale: float = 0.2,
) -> tuple[Tensor, Tensor, Saved | None]:
    return attention.forward(q, k, v, *t.forward, mask, scale, kinds, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_packed_operands(dtype, permuted, monkeypatch):
    monkeypatch.setattr(tune, "PERMUTE_V", permuted)
    t = tables((3, 5, 9), (3, 5, 5), [[WINDOW_FP8, DENSE], [NEAR_FP8, WINDOW_FP8]], prefix=3)
    q, k, v = qkv(t, dim=40, dtype=dtype)
    _, _, saved = before_kernel(q, k, v, t, 3)
    check_operands(q, k, v, t, saved, None, 0.2)


@pytest.mark.parametrize("scale", [0.2, -0.2])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_packed_operands_of_groups_and_masks(key_heads, scale):
    heads = [NEAR_FP8_BOX, WINDOW_FP8_HEAD, NEAR_FP8, DENSE]
    t = tables((4, 4, 7), (2, 4, 4), [heads, heads[::-1]], suffix=2)
    q, k, v = qkv(t, key_heads=key_heads)
    q[:, :, t.gather[1, :9].long()] *= 4
    k[:, :, t.gather[0, :9].long()] *= 4
    mask = torch.rand(2, t.tokens) > 0.3
    mask[1, _rows(t)[2]] = False
    _, _, saved = before_kernel(q, k, v, t, 7, mask=mask, scale=scale)
    check_operands(q, k, v, t, saved, mask, scale)


def test_statistics_of_any_number_of_stretches(monkeypatch):
    """Also more of them than tokens."""
    t = tables((2, 5, 7), (2, 5, 7), [[WINDOW_FP8]])
    q, k, v = qkv(t)
    found = []
    for chunks in (1, 2, 7, 128):
        monkeypatch.setattr(prologue, "CHUNKS", chunks)
        _, _, saved = before_kernel(q, k, v, t, 2)
        check_operands(q, k, v, t, saved, None, 0.2)
        found.append(saved)
    for saved in found[1:]:
        assert torch.equal(saved.v_scale, found[0].v_scale)


def befores(B: int, N: int, H: int, G: int, D: int, turn: str, norm: str) -> Before:
    """Statistics, weights and angles of every sort, between NaN where memory is strided."""
    rotation = None
    if turn != "no rotation":
        some = "some" in turn
        L, start = (N - 9, 4) if some else (N, 0)
        tables = 1 if H != G else H
        angle = torch.full((1, L, tables, 2 * D), math.nan)
        used = D if "wide" in turn else D // 2
        angle[..., :used] = torch.rand(1, L, tables, used) * 6.3
        cos, sin = (f(angle)[..., :used].transpose(1, 2) for f in (torch.cos, torch.sin))
        rotation = Rotation(cos, sin, "interleaved" in turn, start)
    norms: list[Norm | None] = []
    for heads in (H, G):
        shared, each = torch.rand(D) + 0.5, torch.rand(heads * D) + 0.5
        two, bias, rstd = torch.rand(2, D) + 0.5, torch.randn(2, D), torch.rand(B, N) + 0.5
        norms.append(
            {
                "no norm": None,
                "per head": Norm(RMS, shared, epsilon=0.1),
                "per head, no weight": Norm(RMS, epsilon=0.1),
                "per head, two weights": Norm(RMS, two, epsilon=0.1, split=13),
                "over heads": Norm(ACROSS, each, rstd=rstd),
                "over heads, no weight": Norm(ACROSS, rstd=rstd),
                "over heads, no statistic": Norm(ACROSS, each, epsilon=0.1),
                "over heads, bfloat16": Norm(ACROSS, each.bfloat16(), rstd=rstd),
                "layer": Norm(LAYER, shared, bias[0], epsilon=0.1),
                "layer, two weights": Norm(LAYER, two, bias, epsilon=0.1, split=13),
                "layer, bias alone": Norm(LAYER, None, bias, epsilon=0.1, split=13),
            }[norm]
        )
    return Before(norms[0], norms[1], rotation)


CASES = [
    ("interleaved", "no norm", 32),
    ("interleaved", "over heads", 40),
    ("half-split", "over heads, bfloat16", 40),
    ("half-split", "per head", 72),
    ("half-split", "no norm", 32),
    ("interleaved", "per head, no weight", 18),
    ("no rotation", "per head", 17),
    ("no rotation", "over heads, no weight", 40),
    ("half-split", "per head, no weight", 18),
    ("wide interleaved of some", "layer", 40),
    ("interleaved of some", "per head, two weights", 32),
    ("wide half-split of some", "layer, two weights", 72),
    ("wide half-split", "over heads, no statistic", 40),
    ("half-split of some", "layer, bias alone", 18),
]


@pytest.mark.parametrize(
    ("turn", "norm", "dim", "key_heads"),
    [(*case, 1 + i % 2) for i, case in enumerate(CASES)],
    ids=str,
)
@pytest.mark.parametrize("heads", [[NEAR_FP8, WINDOW_FP8_HEAD], [NEAR, DENSE]], ids=str)
def test_norm_and_rotation_in_the_same_pass(turn, norm, dim, key_heads, heads):
    """As if they had been done before, in float32."""
    t = tables((3, 5, 5), (3, 5, 3), [heads, heads], prefix=2)
    kinds = 1 if DENSE in heads else 2
    q, k, v = qkv(t, dim=dim, key_heads=key_heads)
    before = befores(2, t.tokens, 2, key_heads, dim, turn, norm)
    out, lse, saved = before_kernel(q, k, v, t, kinds, before)
    made = before.apply(q, k)
    expected, expected_lse, _ = reference.forward(*made, v, *t.forward, None, 0.2)
    if saved is not None:
        check_operands(*made, v, t, saved, None, 0.2)
    limit = TRITON_FP32 if kinds == 1 else BEFORE_FP8
    assert relative_rms(out, expected) <= limit
    assert relative_rms(lse, expected_lse) <= KERNEL_FP32


def test_norm_and_rotation_of_half_precision():
    """Their results are not rounded to bfloat16 before they are quantised."""
    t = tables((3, 5, 5), (3, 5, 3), [[NEAR_FP8, NEAR]], prefix=2)
    q, k, v = qkv(t, dim=40, dtype=torch.bfloat16)
    before = befores(1, t.tokens, 2, 2, 40, "half-split", "over heads")
    _, _, saved = before_kernel(q, k, v, t, 3, before)
    made = before.apply(q, k)
    check_operands(*made, v, t, saved, None, 0.2)
