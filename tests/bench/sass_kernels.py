"""Small kernels that compile to something known: what bench/sass.py is tested on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from fpsc.kernels.triton.variants import FP8_CAPABILITIES, Product, Variant

HEAD_DIM = KEYS = 128


@triton.jit
def attend(q, k, v, out, n, D: tl.constexpr, KEYS: tl.constexpr, SPECIALISED: tl.constexpr):
    """Softmax attention of one head; v is transposed, [D, n]."""
    q_desc = tl.make_tensor_descriptor(q, [n, D], [D, 1], [128, D])
    k_desc = tl.make_tensor_descriptor(k, [n, D], [D, 1], [KEYS, D])
    v_desc = tl.make_tensor_descriptor(v, [D, n], [n, 1], [D, KEYS])
    first = tl.program_id(0) * 128
    queries = q_desc.load([first, 0])
    top = tl.full([128], -1e30, tl.float32)
    total = tl.zeros([128], tl.float32)
    acc = tl.zeros([128, D], tl.float32)
    for key in tl.range(0, n, KEYS, num_stages=2, warp_specialize=SPECIALISED):
        s = tl.dot(queries, k_desc.load([key, 0]).T)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, 1)
        values = v_desc.load([0, key]).T
        acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values)
        top = higher
    rows = first + tl.arange(0, 128)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * D + tl.arange(0, D)[None, :], result)


@triton.jit
def multiply(a, b, out, n, SIZE: tl.constexpr, STEP: tl.constexpr):
    """[SIZE, n] times [n, SIZE], its second operand stored transposed."""
    rows, steps = tl.arange(0, SIZE), tl.arange(0, STEP)
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for at in tl.range(0, n, STEP, num_stages=3):
        x = tl.load(a + rows[:, None] * n + at + steps[None, :])
        y = tl.load(b + rows[None, :] * n + at + steps[:, None])
        acc = tl.dot(x, y, acc)
    tl.store(out + rows[:, None] * SIZE + rows[None, :], acc)


@triton.jit
def double(x, out, n, SIZE: tl.constexpr):
    """No matrix product, and no loop."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def mismatched(x, out):
    """Does not compile: the shapes do not fit."""
    tl.store(out + tl.arange(0, 32), tl.load(x + tl.arange(0, 64)))


def attention(
    name: str,
    product: Product,
    capabilities: tuple[int, ...],
    specialised: bool = False,
    **options: int,
) -> Variant:
    kind = {"fp8": "fp8e4nv", "bf16": "bf16", "fp16": "fp16"}[product]
    signature: dict[str, Any] = dict.fromkeys("qkv", f"*{kind}:16")
    signature |= {"out": "*bf16:16", "n": "i32:16"}
    signature |= {"D": HEAD_DIM, "KEYS": KEYS, "SPECIALISED": specialised}
    return Variant(
        name=name,
        kernel=attend,
        signature=signature,
        options={"num_stages": 2, **options},
        role="forward",
        head_dim=HEAD_DIM,
        product=product,
        keys=KEYS,
        specialised=specialised,
        capabilities=capabilities,
    )


def other(name: str, kernel: Any, product: Product | None = None, **signature: Any) -> Variant:
    """On Hopper, in too few registers for a large product."""
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        options={"num_warps": 4, "maxnreg": 128},
        role="backward" if product else "prologue",
        head_dim=HEAD_DIM,
        product=product,
        capabilities=(90,),
    )


def variants() -> Iterator[Variant]:
    yield attention("fp8", "fp8", FP8_CAPABILITIES, num_warps=8)
    yield attention("fp8 specialised", "fp8", (90, 100), specialised=True, num_warps=4)
    yield attention("bf16", "bf16", (80, 90, 100, 120), num_warps=8)
    yield attention("spills", "fp8", (90,), num_warps=4)
    operands = {"a": "*bf16:16", "b": "*bf16:16", "out": "*fp32:16", "n": "i32:16"}
    yield other("serialised", multiply, "bf16", **operands, SIZE=128, STEP=64)
    yield other("no product", double, x="*fp32:16", out="*fp32:16", n="i32", SIZE=1024)
    yield other("does not compile", mismatched, x="*fp32:16", out="*fp32:16")
