"""What a mode costs on this device.

One layer's op is timed dense and at some values of keep, in each dtype, and `overhead + factor *
visited pairs` is fitted to the times. So a mode costs what its pairs take here, not its operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fpsc.bench.measure import Effort, clock_for, take_turns
from fpsc.bench.op import Shape, SparseOp, random_qkv
from fpsc.bench.policies import constant
from fpsc.bench.progress import Tell, quiet
from fpsc.policy import Policy
from fpsc.tune.cost import Cost, of_times

KEEPS = (1.0, 0.5, 0.25, 0.125)
"""At which the op is timed."""


def measured(
    candidates: Policy,
    pairs: Sequence[float],
    shape: Shape,
    *,
    layers: int,
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool,
    forward_seconds: float,
    tell: Tell = quiet,
) -> Cost:
    """The cost of every candidate, by the times of the op on this device.

    Args:
        pairs: fraction of all pairs that each candidate visits.
        shape: of one layer's attention.
        fp8: whether fp8 cells run as such on this device.
        forward_seconds: of one dense forward, of which `layers` dense attentions are a part.
    """
    tell("timing the attention")
    tile = None if candidates.tile == "auto" else candidates.tile
    kinds = ["bf16", "fp8"] if fp8 else ["bf16"]
    ops = {
        (kind, keep): SparseOp(shape, constant(keep, kind, tile), device, fp8=fp8)
        for kind in kinds
        for keep in KEEPS
    }
    q, k, v = random_qkv(shape, dtype, device, seed=0)
    works = {
        f"{kind} {keep}": (lambda op=op: op(q, k, v))  # type: ignore[misc]
        for (kind, keep), op in ops.items()
    }
    with torch.no_grad():
        times = take_turns(works, clock_for(device, ahead=True), Effort(rounds=5, seconds=10.0))
    points = {
        kind: [
            (op.visited, float(np.median(times[f"{kind} {keep}"])))
            for (of, keep), op in ops.items()
            if of == kind
        ]
        for kind in kinds
    }
    return of_times(candidates, pairs, points, shape.heads, layers, forward_seconds)
