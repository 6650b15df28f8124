"""Part 4: what this very device reaches in matrix products and copies, and our share of it.

Operations are counted on pairs of real rows in the tiles visited: two products in forward, five in
backward (whose kernels compute two of them twice). A share is of the faster FP8 product, with fast
accumulation, whatever the kernel accumulates in. The prologue's share is of a copy's bandwidth, for
the fewest bytes: q, k and v read once, and written once in e4m3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.problem import Op, random_qkv
from bench.gpu.profile import apart
from bench.gpu.run import Case, Record, Setup
from bench.gpu.stopwatch import Stopwatch, summary, tflops
from bench.gpu.timings import HEADLINE, WAN_14B

SIZES = ((8192, 8192, 8192), (16384, 8192, 8192))
COPY_BYTES = 4 * 2**30
SECONDS = 6.0
FP8 = torch.float8_e4m3fn

_ceilings: dict[str, float] = {}
"""TFLOP/s of "bf16" and "fp8" as measured in this process."""

_bandwidth: list[float] = []
"""Bytes per second of a copy, likewise; reads and writes both count."""


def cases(setup: Setup) -> Iterator[Case]:
    yield "matrix products", lambda: products(setup)
    yield "copy", lambda: copy(setup)
    for keep in HEADLINE:
        yield f"share of forward, keep {keep:g}", partial(share, setup, keep, False)
    for keep in (0.25, 1.0):
        yield f"share of backward, keep {keep:g}", partial(share, setup, keep, True)


def products(setup: Setup) -> Record:
    found: dict[str, Any] = {}
    for m, n, k in SIZES:
        a, b = (torch.randn(s, device=setup.device).bfloat16() for s in ((m, k), (k, n)))
        a8, b8 = a.to(FP8), b.t().contiguous().to(FP8).t()  # the second one column-major
        one = torch.ones((), device=setup.device)
        runs: dict[str, Callable[[], object]] = {
            "bf16": partial(torch.mm, a, b),
            **{
                f"fp8, {name} accumulation": partial(
                    torch._scaled_mm,
                    a8,
                    b8,
                    scale_a=one,
                    scale_b=one,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=fast,
                )
                for name, fast in (("fast", True), ("slow", False))
            },
        }
        times = Stopwatch().turns(runs, SECONDS / len(SIZES), least=7)
        for name, values in times.items():
            record = summary(values)
            record["tflops"] = tflops(2.0 * m * n * k, record["ms"]["median"])
            found.setdefault(name, {})[f"{m}x{n}x{k}"] = record
    best = {name: max(r["tflops"] for r in sizes.values()) for name, sizes in found.items()}
    _ceilings["bf16"] = best["bf16"]
    _ceilings["fp8"] = max(x for name, x in best.items() if name.startswith("fp8"))
    return {"products": found, "ceilings": dict(_ceilings)}


def copy(setup: Setup) -> Record:
    source = torch.randint(255, (COPY_BYTES // 2,), dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    times = Stopwatch().turns({"copy": lambda: target.copy_(source)}, SECONDS, least=7)["copy"]
    record = summary(times)
    moved = 2 * source.numel()
    _bandwidth.append(moved / record["ms"]["median"] * 1e3)
    return {**record, "bytes": moved, "bytes_per_second": _bandwidth[-1]}


def share(setup: Setup, keep: float, backward: bool) -> Record:
    """Rates of the main kernels alone and of the whole call, and their shares of the ceilings."""
    if not _ceilings:  # a resumed run kept the record, not the numbers
        products(setup)
    if not _bandwidth:
        copy(setup)
    op = Op(WAN_14B, keep, "fp8", setup.device)
    x = random_qkv(WAN_14B, torch.bfloat16, setup.device, seed=0)
    parts = apart(op, x, setup, backward=backward)
    work = op.flops(5 if backward else 2)
    found: dict[str, dict[str, float]] = {}
    for name in ("main", "all"):
        rate = tflops(work, parts["ms"][name])
        found[name] = {
            "tflops": rate,
            **{f"of {kind}": round(rate / ceiling, 4) for kind, ceiling in _ceilings.items()},
        }
    if not backward and parts["ms"]["prologue"]:
        least = 3 * (2 + 1) * WAN_14B.tokens * WAN_14B.heads * WAN_14B.dim
        rate = least / parts["ms"]["prologue"] * 1e3
        found["prologue"] = {"bytes_per_second": rate, "of copy": round(rate / _bandwidth[-1], 4)}
    return {"operations": work, "rates": found, "ceilings": dict(_ceilings), **parts}
