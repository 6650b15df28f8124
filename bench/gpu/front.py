"""A norm across heads and a rotation of pairs, as Wan has them: in the op, or left to Inductor.

A part of part 3. Every way gets the same projections, and its time is that of everything from them
to the output. The statistic of the norm is computed by Inductor or by the op's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.device import device_state
from bench.gpu.problem import Op, Shape, distance, random_qkv, rounded
from bench.gpu.run import Record, Setup
from bench.gpu.stopwatch import Stopwatch, ratio, summary
from fpsc.kernels.before import ACROSS, INTERLEAVED
from tests.thresholds import FP8_AGAINST_EXACT

EPSILON = 1e-6
LEFT, GRAPH, KERNEL = (
    "left to Inductor",
    "in the op, statistic by Inductor",
    "in the op, statistic by its kernel",
)


def measure(setup: Setup, shape: Shape, keep: float, seconds: float) -> Record:
    """Times of the three ways, in turns; none of what is wrong."""
    op = Op(shape, keep, "fp8", setup.device)
    projections = [x.transpose(1, 2).flatten(2) for x in _raw(shape, setup.device)]
    weight = torch.rand(2, shape.heads * shape.dim, device=setup.device) + 0.5
    angle = torch.rand(1, 1, shape.tokens, shape.dim // 2, device=setup.device) * 6.3
    tables = angle.cos(), angle.sin()
    runs: dict[str, Callable[[], Tensor]] = {}
    for name, way in ways(op, setup.kernel).items():
        compiled: Any = torch.compile(way, dynamic=False, fullgraph=True)

        def run(compiled: Any = compiled) -> Tensor:
            with torch.no_grad():
                found: Tensor = compiled(*projections, weight, *tables)
            return found

        runs[name] = run
    outputs = {name: run() for name, run in runs.items()}
    errors = {name: distance(out, outputs[LEFT]) for name, out in outputs.items()}
    del outputs
    wrong = [f"{n}: error {rounded(e)}" for n, e in errors.items() if not e <= FP8_AGAINST_EXACT]
    if wrong:
        return {"problems": wrong}
    before = device_state()
    times = Stopwatch().turns(runs, seconds)
    return {
        "problems": [],
        "shape": str(shape),
        "keep": keep,
        "ways": {
            name: {
                **summary(taken, error=rounded(errors[name])),
                "to left": ratio(times[LEFT], taken),
            }
            for name, taken in times.items()
        },
        "state": {"before": before, "after": device_state()},
    }


def ways(op: Op, kernel: str) -> dict[str, Callable[..., Tensor]]:
    """From q, k, v [B, N, H * D], weights of both norms and tables to [B, H, N, D]."""
    heads, dim = op.shape.heads, op.shape.dim

    def split(x: Tensor) -> Tensor:
        return x.unflatten(2, (heads, dim)).transpose(1, 2)

    def left(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        made = []
        for x, w in ((q, weight[0]), (k, weight[1])):
            x = split(F.rms_norm(x, x.shape[-1:], w.to(x.dtype), EPSILON))
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
            made.append(turned.flatten(-2).to(v.dtype))
        return op(*made, split(v), kernel=kernel)[0]

    def inside(statistic: bool) -> Callable[..., Tensor]:
        def way(
            q: Tensor, k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
        ) -> Tensor:
            found: list[Tensor | None] = [None, None]
            if statistic:
                found = [(x.float().square().mean(-1) + EPSILON).rsqrt() for x in (q, k)]
            before = {
                "norm": ACROSS, "epsilon": EPSILON, "rotation": INTERLEAVED, "cos": cos,
                "sin": sin, "q_weight": weight[0], "k_weight": weight[1], "q_rstd": found[0],
                "k_rstd": found[1],
            }  # fmt: skip
            return op(split(q), split(k), split(v), kernel=kernel, **before)[0]

        return way

    return {LEFT: left, GRAPH: inside(statistic=True), KERNEL: inside(statistic=False)}


def _raw(shape: Shape, device: torch.device) -> list[Tensor]:
    return random_qkv(shape, torch.bfloat16, device, seed=0)
