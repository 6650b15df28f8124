"""Part 3: forward and backward beside every attention that is here, in one process, in turns.

No time is taken of what is wrong: every contender's output (or gradients) must agree with the
reference in the model's last head first, and be finite in all. The times of fpsc are those of the
whole op, prologue and ways to tile order and back included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from bench.gpu import front
from bench.gpu.contenders import (
    PACKAGES,
    SDPA,
    Contender,
    built,
    flex,
    flex_dividing,
    fpsc_,
    sdpa,
)
from bench.gpu.device import device_state
from bench.gpu.problem import Op, Shape, distance, random_qkv, reordered, rounded
from bench.gpu.run import Case, Record, Setup
from bench.gpu.stopwatch import Stopwatch, ratio, summary, tflops
from tests.thresholds import FP8_AGAINST_EXACT, gpu_threshold

WAN_14B = Shape((21, 45, 80), 40)
OTHERS = (
    Shape((21, 45, 80), 12),
    Shape((21, 30, 52), 12),
    Shape((21, 45, 80), 24, text=256),
    Shape((19, 43, 77), 12),  # primes: tiles at every far edge are ragged
    Shape((21, 45, 80), 24, dim=64),
)
KEEPS = (1.0, 0.5, 0.25, 0.125, 0.1)
HEADLINE = (1.0, 0.25, 0.125, 0.1)
FAST = ("sdpa cudnn", "sdpa flash", "FA3", "FA4")
INT8_AGAINST_EXACT = 0.1
SECONDS = 15.0
"""Of timing for each case, beside compilation and checks."""


def cases(setup: Setup) -> Iterator[Case]:
    def forward(shape: Shape, keeps: tuple[float, ...], **others: Any) -> Callable[[], Record]:
        return partial(measure, setup, shape, keeps, backward=False, **others)

    def backward(shape: Shape, keeps: tuple[float, ...], **others: Any) -> Callable[[], Record]:
        return partial(measure, setup, shape, keeps, backward=True, **others)

    everything = (*SDPA, *PACKAGES)
    in_front = [
        (
            f"norm and rotation in front, keep {keep:g}: {WAN_14B}",
            partial(front.measure, setup, WAN_14B, keep, SECONDS),
        )
        for keep in (1.0, 0.125)
    ]
    yield f"headline forward: {WAN_14B}", forward(WAN_14B, HEADLINE, dense=FAST)
    yield f"headline backward: {WAN_14B}", backward(WAN_14B, HEADLINE, dense=FAST)
    yield from in_front
    yield f"forward: {WAN_14B}", forward(WAN_14B, KEEPS, dense=everything, input_dtype=True)
    for shape in OTHERS:
        yield f"forward: {shape}", forward(shape, KEEPS, dense=everything)
    for shape in OTHERS:
        yield f"backward: {shape}", backward(shape, KEEPS, dense=FAST)
    yield f"backward: {WAN_14B}", backward(WAN_14B, KEEPS, dense=everything)
    for shape in (WAN_14B, *OTHERS):
        yield (
            f"forward beside FlexAttention: {shape}",
            forward(shape, KEEPS, dense=("sdpa cudnn",), flexes=True),
        )
    for shape in OTHERS:
        yield (
            f"backward beside FlexAttention: {shape}",
            backward(shape, (0.5, 0.25, 0.125), dense=("sdpa cudnn",), flexes=True),
        )


def measure(
    setup: Setup,
    shape: Shape,
    keeps: tuple[float, ...],
    *,
    backward: bool,
    dense: tuple[str, ...],
    flexes: bool = False,
    input_dtype: bool = False,
) -> Record:
    """Builds, checks and times; what is wrong or does not run is named and not timed."""
    ops = [Op(shape, keep, "fp8", setup.device) for keep in keeps]
    ours = [fpsc_(op, setup.kernel) for op in ops]
    if backward:
        ours += [fpsc_(op, setup.kernel, fp8_backward=True) for op in ops]
    if input_dtype:
        ours.append(fpsc_(Op(shape, 0.25, "bf16", setup.device), setup.kernel))
        if setup.gluon:  # which of the two the first call chose, and by how much
            for keep in (1.0, 0.125):
                op = Op(shape, keep, "fp8", setup.device)
                ours += [fpsc_(op, name, named=True) for name in ("triton", "gluon")]
        for config in reordered(setup.device, shape.dim):
            for keep in (1.0, 0.125):
                op = Op(shape, keep, "fp8", setup.device)
                ours.append(fpsc_(op, "triton", named=True, config=config))
    makers: dict[str, Callable[[], Contender]] = {
        name: partial(sdpa, name) for name in dense if name in SDPA
    }
    makers |= {name: PACKAGES[name] for name in dense if name in PACKAGES}
    others, not_timed = built(makers)
    if flexes:
        others += flex([Op(shape, keep, "bf16", setup.device) for keep in keeps])
        if not backward:
            dividing = flex_dividing(shape, 0.25, setup.device)
            if dividing is None:
                not_timed["flex, tile that divides the grid"] = "its blocks fit no such tile"
            else:
                others.append(dividing)

    # Backward is timed again and again on one graph; compiled code would free what it reads.
    functorch_config.donated_buffer = False
    trial = Trial(setup, shape, backward)
    runs, errors, problems = {}, {}, []
    for contender in [*ours, *others]:
        if backward and not contender.backward:
            continue
        try:
            run, error = trial.check(contender)
        except Exception as failure:
            reason = f"{type(failure).__name__}: {str(failure)[:300]}"
        else:
            allowed = tolerance(contender, backward)
            errors[contender.name] = rounded(error)
            reason = "" if error <= allowed else f"error {rounded(error)}, allowed is {allowed}"
        if reason:
            not_timed[contender.name] = reason
            if contender in ours:
                problems.append(f"{contender.name}: {reason}")
        else:
            runs[contender.name] = run
    trial.forget()
    before = device_state()
    times = Stopwatch().turns(runs, SECONDS) if runs else {}
    timed = [c for c in (*ours, *others) if c.name in times]
    return {
        "problems": problems,
        **compared(timed, times, shape, errors, backward),
        "not_timed": not_timed,
        "state": {"before": before, "after": device_state()},
    }


def compared(
    timed: list[Contender],
    times: dict[str, list[float]],
    shape: Shape,
    errors: dict[str, float | str],
    backward: bool,
) -> Record:
    """Times, and their ratios to the best baseline and to each."""
    baselines = [c.name for c in timed if c.baseline]
    best = min(baselines, key=lambda name: sorted(times[name])[len(times[name]) // 2], default=None)
    products = 5 if backward else 2
    found = {}
    for contender in timed:
        name = contender.name
        record = summary(times[name], error=errors[name])
        op = contender.op
        dense = 2.0 * products * shape.dim * shape.heads * shape.tokens**2
        work = dense if op is None else op.flops(products)
        record["tflops"] = tflops(work, record["ms"]["median"])
        if op is not None:
            record |= {"operations": work, "keep": op.keep, "visited": round(work / dense, 4)}
        record["baseline"] = contender.baseline
        if best is not None:
            record["to_best"] = ratio(times[best], times[name])
            record["to_each"] = {
                other: ratio(times[other], times[name])["median"] for other in baselines
            }
        found[name] = record
    return {
        "direction": "backward" if backward else "forward",
        "shape": str(shape),
        "best_baseline": best,
        "contenders": found,
    }


def tolerance(contender: Contender, backward: bool) -> float:
    if contender.dtype == "bf16":
        return gpu_threshold(torch.bfloat16, fp8=False)[backward]
    return {"fp8": FP8_AGAINST_EXACT, "int8": INT8_AGAINST_EXACT}[contender.dtype]


class Trial:
    """Runs contenders on one problem, and compares them with the reference in its last head."""

    def __init__(self, setup: Setup, shape: Shape, backward: bool) -> None:
        self.backward = backward
        self.x = random_qkv(shape, torch.bfloat16, setup.device, seed=0)
        self.dout = torch.randn_like(self.x[0])
        self.dense = Op(shape, 1.0, "bf16", setup.device)
        self.prepared: dict[Callable[[Tensor], Tensor], list[Tensor]] = {}
        self.expected: dict[tuple[Any, ...], list[Tensor]] = {}

    def check(self, contender: Contender) -> tuple[Callable[[], object], float]:
        """What is to be timed, and its largest error."""
        inputs = self.inputs(contender)
        if not self.backward:

            def forward() -> Tensor:
                with torch.no_grad():
                    return contender.run(*inputs)

            found = [contender.result(forward())]
            run: Callable[[], object] = forward
        else:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = contender.run(*leaves)
            dout = self.dout_for(contender, out)
            run = partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)
            found = [contender.result(gradient) for gradient in run()]
        if not all(bool(x.isfinite().all()) for x in found):
            return run, float("inf")
        pairs = zip(found, self.reference(contender), strict=True)
        return run, max(distance(x[:, -1:], y) for x, y in pairs)

    def inputs(self, contender: Contender) -> list[Tensor]:
        """q, k, v as the contender takes them; those with one layout share them."""
        key = contender.prepare
        if key not in self.prepared:
            self.prepared[key] = [key(x) for x in self.x]
        return self.prepared[key]

    def dout_for(self, contender: Contender, out: Tensor) -> Tensor:
        """The gradient of the output in the contender's layout, zero in its padding."""
        if out.shape == self.dout.shape and contender.result(out) is out:
            return self.dout
        dout = torch.zeros_like(out, requires_grad=True)
        (gradient,) = torch.autograd.grad(contender.result(dout), dout, self.dout)
        return gradient

    def reference(self, contender: Contender) -> list[Tensor]:
        """out, or dq, dk and dv, of the last head by the specification; dense ones share one."""
        op = contender.op or self.dense
        key = (op.keep, op.dtype, op.layout.tile, contender.fp8_backward)
        if key not in self.expected:
            leaves = [x[:, -1:].detach().requires_grad_(self.backward) for x in self.x]
            last = slice(op.shape.heads - 1, op.shape.heads)
            fp8 = contender.fp8_backward
            out, _ = op(*leaves, kernel="reference", heads=last, fp8_backward=fp8)
            wanted = [out]
            if self.backward:
                wanted = list(torch.autograd.grad(out, leaves, self.dout[:, -1:]))
            self.expected[key] = [x.detach() for x in wanted]
        return self.expected[key]

    def forget(self) -> None:
        """Frees what only the checks need."""
        self.expected.clear()
