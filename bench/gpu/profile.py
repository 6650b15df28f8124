"""Part 5: the kernels of one call apart, what predicts the time of a call, and the memory that
training holds until backward."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.problem import Op, Shape, random_qkv
from bench.gpu.profiler import NAME, Kernel, executions, profiled
from bench.gpu.run import Case, Record, Setup
from bench.gpu.timings import WAN_14B
from fpsc.bench.measure import Effort
from fpsc.bench.op import Shape as Layer
from fpsc.tune.timing import device_cost

MAIN = ("attend", "query_gradients", "key_gradients")
"""The kernels with the attention's products. What else starts before the last of them is prologue,
what starts after it epilogue. All are listed by name."""

CALLS = 7
SECONDS = 40.0
"""Of timing for the device's cost, beside compilation."""
JOINT = Shape((21, 45, 80), 24, text=256)
SMALL = Shape((21, 30, 52), 12)


def cases(setup: Setup) -> Iterator[Case]:
    for keep in (0.125, 1.0, 0.25):
        yield f"forward apart: {WAN_14B}, keep {keep:g}", partial(case, setup, WAN_14B, keep, False)
    yield f"memory: {WAN_14B}", partial(memory, setup, WAN_14B)
    yield f"cost of the device: {WAN_14B}", partial(cost, setup, WAN_14B)
    yield f"backward apart: {WAN_14B}, keep 0.25", partial(case, setup, WAN_14B, 0.25, True)
    for shape in (JOINT, SMALL):
        for backward in (False, True):
            name = "backward" if backward else "forward"
            yield f"{name} apart: {shape}, keep 0.25", partial(case, setup, shape, 0.25, backward)
    yield f"memory: {SMALL}", partial(memory, setup, SMALL)


def case(setup: Setup, shape: Shape, keep: float, backward: bool) -> Record:
    op = Op(shape, keep, "fp8", setup.device)
    x = random_qkv(shape, torch.bfloat16, setup.device, seed=0)
    return apart(op, x, setup, backward=backward)


def apart(op: Op, x: list[Tensor], setup: Setup, *, backward: bool) -> Record:
    """Milliseconds of prologue, main kernels and epilogue: medians over several calls."""
    leaves = [one.detach().requires_grad_(backward) for one in x]

    def forward() -> Tensor:
        return op(*leaves, kernel=setup.kernel)[0]

    run: Callable[[], object] = forward
    if backward:
        out = forward()
        run = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    stages: dict[str, list[float]] = defaultdict(list)
    lengths: dict[str, list[float]] = defaultdict(list)
    for _ in range(CALLS):
        with profiled(True) as profile:
            run()
        once = executions(profile)
        for stage, ms in staged(once).items():
            stages[stage].append(ms)
        for name, ms in by_name(once).items():
            lengths[name].append(ms)
    medians = {name: round(statistics.median(ms), 4) for name, ms in stages.items()}
    listed = {name: round(statistics.median(ms), 4) for name, ms in lengths.items()}
    return {"ms": medians, "kernels": listed, "calls": CALLS}


def staged(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds before, in and after the main kernels, and of all; gaps are not counted."""
    main = [kernel for kernel in kernels if kernel.name in MAIN]
    if not main:
        names = ", ".join(sorted({kernel.name for kernel in kernels})) or "none"
        raise RuntimeError(f"none of the kernels {', '.join(MAIN)} ran; the profiler saw {names}")
    last = main[-1].start
    found = {
        "prologue": [k for k in kernels if k.name not in MAIN and k.start < last],
        "main": main,
        "epilogue": [k for k in kernels if k.start > last],
        "all": kernels,
    }
    return {name: sum(kernel.length for kernel in some) / 1e3 for name, some in found.items()}


def by_name(kernels: list[Kernel]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        found[kernel.name[:NAME]] += kernel.length / 1e3
    return found


def cost(setup: Setup, shape: Shape) -> Record:
    """The model of `fpsc.cost`, with every time and what is predicted of it; wrong where it does
    not predict what was held out."""
    layer = Layer(shape.grid, shape.heads, shape.dim, suffix=shape.text)
    found = device_cost(
        layer,
        device=setup.device,
        dtype=torch.bfloat16,
        fp8=True,
        effort=Effort(rounds=9, seconds=SECONDS),
    )
    problems = [found.refusal] if found.refusal else []
    return {"problems": problems, "cost": found.model_dump(mode="json"), "says": str(found)}


def memory(setup: Setup, shape: Shape) -> Record:
    """Bytes that autograd holds between forward and backward, beside the output itself."""
    op = Op(shape, 0.25, "fp8", setup.device)
    mixed = Op(shape, 0.25, "bf16", setup.device)
    found = {
        "sdpa, bf16": held(shape, setup, lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
        "fpsc, fp8 cells": held(shape, setup, lambda *x: op(*x, kernel=setup.kernel)[0]),
        "fpsc, input's dtype": held(shape, setup, lambda *x: mixed(*x, kernel=setup.kernel)[0]),
    }
    saved = 1 - found["fpsc, fp8 cells"] / found["sdpa, bf16"]
    problems = [] if saved > 0 else [f"fp8 cells hold more than bf16 does: {found}"]
    return {"problems": problems, "held_bytes": found, "saved": round(saved, 4)}


def held(shape: Shape, setup: Setup, attention: Callable[..., Tensor]) -> int:
    """q, k and v are results of their own, as in a model: what nothing saves of them is freed."""
    leaves = [x.requires_grad_() for x in random_qkv(shape, torch.bfloat16, setup.device, seed=0)]
    attention(*(x.clone() for x in leaves)).sum().backward()  # what is kept for ever is there now
    for x in leaves:
        x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = attention(*(x.clone() for x in leaves))
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    return after - before - out.untyped_storage().nbytes()
