"""A norm and a rotation of q and k as a part of the op: formulas, gradients, arguments."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.optests import aot_autograd_check

from fpsc.kernels import before, ops, reference
from fpsc.kernels.before import Before, Norm, Rotation, before_of
from tests.kernels.cases import (
    DENSE,
    DENSE_FP8,
    NEAR_FP8,
    NEAR_FP8_BOX,
    WINDOW,
    Tables,
    qkv,
    tables,
)
from tests.thresholds import KERNEL_FP8, KERNEL_FP8_GRAD, KERNEL_FP32, relative_rms

B, N, D = 2, 63, 16
MIXED = [[DENSE, NEAR_FP8], [WINDOW, DENSE_FP8]]
FP8 = [[DENSE_FP8, NEAR_FP8], [NEAR_FP8_BOX, NEAR_FP8]]


def small(heads: list[list[int]] = MIXED) -> Tables:
    return tables((2, 5, 6), (1, 3, 4), heads, prefix=3)


def parameters(norm: str, heads: int, rows: int, own: bool) -> dict[str, Tensor]:
    """Weight, bias and statistic of one side."""
    shape = (D * heads if own else D,)
    shape = (rows, *shape) if rows else shape
    found = {"weight": torch.rand(shape) + 0.5}
    if norm == "layer":
        found["bias"] = torch.randn(shape)
    return found


def arguments(
    norm: str = "rms",
    rotation: str = "interleaved",
    *,
    rows: int = 0,
    own: bool = False,
    wide: bool = False,
    per_head: bool = False,
    start: int = 0,
    length: int = N,
    heads: tuple[int, int] = (2, 2),
    given: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of the op. given: with the statistic of a norm across heads."""
    found: dict[str, Any] = {"norm": norm, "rotation": rotation, "epsilon": 0.1}
    for side, count in zip("qk", heads, strict=True):
        if norm != "none":
            of = parameters(norm, count, rows, own)
            found |= {f"{side}_{name}": value for name, value in of.items()}
        if given:
            found[f"{side}_rstd"] = torch.rand(B, N) + 0.5
    if rotation != "none":
        angle = torch.randn(1, heads[0] if per_head else 1, length, D if wide else D // 2)
        found |= {"cos": angle.cos(), "sin": angle.sin(), "start": start}
    return found | {"split": 7} if rows == 2 else found


CASES = {
    "rms": arguments(),
    "rms, two weights": arguments(rows=2, start=7, length=N - 7),
    "rms, one row": arguments(rows=1, rotation="half-split"),
    "across": arguments("rms-across", own=True),
    "across, given": arguments("rms-across", own=True, given=True, wide=True, per_head=True),
    "across, shared weight": arguments("rms-across", rotation="none"),
    "layer": arguments("layer", "none"),
    "layer, two weights, wide": arguments("layer", rows=2, wide=True, start=3, length=50),
    "rotation": arguments("none", "half-split", wide=True),
    "rotation of some": arguments("none", start=0, length=60),
}


def naive(x: Tensor, side: str, given: dict[str, Any]) -> Tensor:
    """As models write it: one token at a time, complex numbers, torch's own norms."""
    heads, out = x.shape[1], torch.empty_like(x)
    flat = x.transpose(1, 2).flatten(2)
    for n in range(x.shape[2]):
        weight, bias = (given.get(f"{side}_{name}") for name in ("weight", "bias"))
        if weight is not None and weight.ndim == 2:
            row = min(n // given.get("split", N + 1), len(weight) - 1)
            weight, bias = weight[row], None if bias is None else bias[row]
        of = x[:, :, n]
        if given["norm"] == "rms":
            of = F.rms_norm(of, (D,), weight, 0.1)
        elif given["norm"] == "layer":
            of = F.layer_norm(of, (D,), weight, bias, 0.1)
        elif given["norm"] == "rms-across":
            token = flat[:, n]
            rstd = given.get(f"{side}_rstd")
            r = (token.square().mean(1) + 0.1).rsqrt() if rstd is None else rstd[:, n]
            of = (token * r[:, None]).view(-1, heads, D)
            of = of * (weight.view(-1, D) if weight.numel() > D else weight)
        at = n - given.get("start", 0)
        if given["rotation"] != "none" and 0 <= at < given["cos"].shape[2]:
            cos, sin = (given[t][:, :, at] for t in ("cos", "sin"))
            pairs = [(2 * i, 2 * i + 1) for i in range(D // 2)]
            if given["rotation"] == "half-split":
                pairs = [(i, i + D // 2) for i in range(D // 2)]
            turned = torch.empty_like(of)
            for i, (a, b) in enumerate(pairs):
                at_a, at_b = (a, b) if cos.shape[-1] == D else (i, i)
                turned[..., a] = of[..., a] * cos[..., at_a] - of[..., b] * sin[..., at_a]
                turned[..., b] = of[..., b] * cos[..., at_b] + of[..., a] * sin[..., at_b]
            of = turned
        out[:, :, n] = of
    return out


def sides(given: dict[str, Any]) -> Before:
    return before_of(**given)


@pytest.mark.parametrize("case", CASES)
def test_formulas(case: str) -> None:
    given = CASES[case]
    q, k, _ = qkv(small(), dim=D)
    for found, x, side in zip(sides(given).apply(q, k), (q, k), "qk", strict=True):
        assert relative_rms(found, naive(x, side, given)) <= 1e-6


def test_rotation_is_a_product_of_complex_numbers() -> None:
    x, angle = torch.randn(1, 2, 9, D), torch.randn(9, D // 2)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(angle), angle
    )
    rotation = Rotation(angle.cos()[None, None], angle.sin()[None, None])
    found = before.prepared(x, None, rotation)
    assert relative_rms(found, torch.view_as_real(turned).flatten(-2)) <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_autograds(case: str) -> None:
    """Against autograd through the formulas of forward, in all that is differentiable."""
    given = CASES[case]
    q, _, _ = qkv(small(), dim=D)
    x = q.detach().clone().requires_grad_()
    names = [n for n in ("weight", "bias", "rstd") if f"q_{n}" in given]
    leaves = {f"q_{n}": given[f"q_{n}"].clone().requires_grad_() for n in names}
    of = sides(given | leaves)
    z = before.prepared(x, of.norm_q, of.rotation)
    dz = torch.randn_like(z)
    expected = torch.autograd.grad(z, (x, *leaves.values()), dz)
    found = before.gradients(dz, x.detach(), of.norm_q, of.rotation)
    for name, value in zip(("x", *names), expected, strict=True):
        assert relative_rms(getattr(found, name), value) <= KERNEL_FP32, name
    assert sum(g is not None for g in found) == 1 + len(names)


@pytest.mark.parametrize(
    ("case", "kernel"), [*((c, "cpu") for c in CASES), ("rms, two weights", "reference")]
)
def test_op_with_what_is_in_front(case: str, kernel: str) -> None:
    """As the op on what torch made of q and k before, with all gradients."""
    t, given = small(), CASES[case]
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv(t, dim=D))
    names = [n for n in given if n[:2] in ("q_", "k_")]
    leaves = {n: given[n].clone().requires_grad_() for n in names}
    given = given | leaves
    out, lse = ops.attention(q, k, v, **t._asdict(), **given, kernel=kernel)
    made = sides(given).apply(q, k)
    expected, expected_lse = ops.attention(*made, v, **t._asdict(), kernel=kernel)
    assert relative_rms(out, expected) <= KERNEL_FP8
    assert relative_rms(lse, expected_lse) <= KERNEL_FP32
    dout = torch.randn_like(out)
    inputs = (q, k, v, *leaves.values())
    grads = zip(
        torch.autograd.grad(out, inputs, dout),
        torch.autograd.grad(expected, inputs, dout),
        strict=True,
    )
    for name, (x, y) in zip(("q", "k", "v", *names), grads, strict=True):
        assert relative_rms(x, y) <= KERNEL_FP8_GRAD, name


def test_half_precision_is_not_rounded_in_front() -> None:
    t, given = small(), CASES["rms, two weights"]
    q, k, v = qkv(t, dim=D, dtype=torch.bfloat16)
    out, _ = ops.attention(q, k, v, **t._asdict(), **given)
    made = sides(given).apply(q.float(), k.float())
    expected, _, _ = reference.forward(*made, v.float(), *t.forward, None, D**-0.5)
    assert out.dtype == torch.bfloat16
    assert relative_rms(out, expected.bfloat16()) <= KERNEL_FP8


@pytest.mark.parametrize("case", ["across, given", "layer, two weights, wide"])
def test_opcheck_with_what_is_in_front(case: str) -> None:
    t, given = small(), dict(CASES[case])
    q, k, v = (x.detach().requires_grad_() for x in qkv(t, dim=D))
    for name in given:
        if name[:2] in ("q_", "k_"):
            given[name] = given[name].clone().requires_grad_()
    args = (q, k, v, *t, None, 0.2, 0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fpsc.attention, args, given, test_utils=checks)
    aot_autograd_check(
        lambda *a, **g: torch.ops.fpsc.attention(*a, **g)[:2], args, given, dynamic=True
    )


@torch.no_grad()
def test_compiled() -> None:
    """By Inductor."""
    t, given = small(), CASES["rms, two weights"]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, **t._asdict(), **given)[0]

    inputs = qkv(t, dim=D)
    assert relative_rms(torch.compile(run, fullgraph=True)(*inputs), run(*inputs)) <= KERNEL_FP8


def test_autocast_casts_q_k_and_v_alone() -> None:
    t, given = small(), CASES["rms, two weights"]
    q, k, v = qkv(t, dim=D)
    expected, _ = ops.attention(*(x.bfloat16() for x in (q, k, v)), **t._asdict(), **given)
    leaf = q.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = ops.attention(leaf, k, v, **t._asdict(), **given)
        assert torch.equal(found, expected)
        found.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "norm": ({"norm": "batch"}, "norm: expected one of none, rms"),
    "rotation": ({"rotation": "spiral"}, "rotation: expected one of none, interleaved"),
    "weight without a norm": ({"norm": "none"}, "q_weight: expected norm rms or rms-across or"),
    "weight": ({"q_weight": torch.ones(9)}, "q_weight: expected [C] or [2, C] with C = 16, got"),
    "rows": ({"k_weight": torch.ones(3, D)}, "k_weight: expected [C] or [2, C]"),
    "bias": ({"q_bias": torch.ones(D)}, "q_bias: expected norm layer with it, found 'rms'"),
    "rstd": ({"k_rstd": torch.ones(B, N)}, "k_rstd: expected norm rms-across with it"),
    "shape of rstd": ({"norm": "rms-across", "q_rstd": torch.ones(B, 9)}, "q_rstd: expected float"),
    "no table": ({"cos": None}, "cos, sin: expected tables"),
    "table": ({"sin": torch.ones(1, 1, N, 5)}, "sin: expected floating point [1 or B, 1 or H"),
    "tables": ({"sin": torch.ones(1, 1, N, D)}, "sin: expected cos's shape [1, 1, 63, 8], got"),
    "start": ({"start": 1}, "start: expected the 63 tokens of cos within the 63 of q, got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_in_front(case: str) -> None:
    t = small()
    spoilt, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.attention(*qkv(t, dim=D), **t._asdict(), **(CASES["rms"] | spoilt))


def test_a_norm_of_nothing() -> None:
    assert not before_of()
    assert before_of(norm="rms").norm_q == Norm()
