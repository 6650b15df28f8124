"""Part 2: a recorded CUDA graph of the bare op follows rows, cells, modes and lists as data.

Every replay must equal, in every bit, the op called eagerly with a copy of the same tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.matrix import forward_backward
from bench.gpu.problem import Shape, attend, on, random_qkv, same_bits, tables_of
from bench.gpu.run import Case, Record, Setup
from fpsc.grid import layout
from fpsc.kernels import ops
from fpsc.kernels.rows import noise_rows
from fpsc.policy import find
from fpsc.policy.resolve import resolve
from tests.kernels.cases import (
    DENSE,
    DENSE_FP8,
    NEAR,
    NEAR_FP8,
    WINDOW_FP8,
    Tables,
    qkv,
    tables,
)

NOISE_ROWS = [[DENSE, DENSE], [NEAR_FP8, DENSE_FP8], [WINDOW_FP8, NEAR]]
BY_PATTERN = ("list_ptr", "back_ptr", "order")
"""Tables whose first axis is the pattern: exchanging two patterns edits all of them."""

Run = Callable[[], list[Tensor]]


def cases(setup: Setup) -> Iterator[Case]:
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        yield f"noise rows and an edited policy, {what}", partial(small, setup, backward)
    yield "all timesteps of a policy, forward", lambda: timesteps(setup)


def recorded(run: Run, setup: Setup) -> Run:
    """A replay of the recorded run; where there are no graphs, the run itself."""
    if not setup.cuda:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and tuned before the recording
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> list[Tensor]:
        for output in outputs:  # what no replay writes must not look right
            output.fill_(float("nan"))
        graph.replay()
        return [output.clone() for output in outputs]

    return replay


def small(setup: Setup, backward: bool) -> Record:
    torch.manual_seed(0)
    grid, dim = ((2, 5, 6), 16) if setup.smoke else ((5, 7, 9), 64)
    here = tables(grid, (1, 3, 4), NOISE_ROWS, prefix=3)
    t = on(here, setup.device)
    x = [one.to(setup.device) for one in qkv(here, dim=dim, dtype=torch.bfloat16)]
    dout = torch.randn(x[0].shape).to(x[0])

    def run_with(t: Tables) -> list[Tensor]:
        if backward:
            return forward_backward(
                x, dout, lambda q, k, v: attend(q, k, v, t, kernel=setup.kernel)
            )
        q, k, v = x
        return list(attend(q, k, v, t, kernel=setup.kernel))

    replay = recorded(lambda: run_with(t), setup)
    problems: list[str] = []
    seen: list[list[Tensor]] = []

    def check(what: str, *, differs: bool = True) -> None:
        found = replay()
        if not same_bits(found, run_with(Tables(*(one.clone() for one in t)))):
            problems.append(f"{what}: the replay is not what the eager call gives")
        if differs and any(same_bits(found, other) for other in seen):
            problems.append(f"{what}: the replay did not follow")
        seen.append(found)

    B = len(NOISE_ROWS)
    check("as recorded")
    for row in range(B):
        t.rows.fill_(row)
        check(f"row {row}")
    t.rows.fill_(0)
    check("row 0 again", differs=False)
    t.rows.copy_(torch.arange(B).flip(0))
    check("a row for each batch element")
    t.cells.copy_(t.cells.flip(2))
    check("cells")
    t.modes.copy_(t.modes.roll(1, 0))
    check("modes")
    for name in BY_PATTERN:
        table = getattr(t, name)
        table.copy_(table.roll(1, 0))
    check("lists")
    for one in x:
        one.mul_(0.5)
    check("inputs")
    return {"problems": problems, "replays": len(seen), "recorded": setup.cuda}


def timesteps(setup: Setup) -> Record:
    """From a timestep to the output in one graph: 50 replays, none of which the host steers."""
    if setup.smoke:
        shape, steps = Shape((3, 8, 10), 2, 16), 5
    else:
        shape, steps = Shape((21, 30, 52), 12), 50
    policy = find("generic")
    q, k, v = random_qkv(shape, torch.bfloat16, setup.device, seed=0)
    tiles = layout(shape.grid, policy.tile_for(shape.grid))
    t: dict[str, Any] = tables_of(policy, tiles, shape.heads, setup.device)
    del t["rows"]
    edges = resolve(policy, layers=1, heads=shape.heads, fp8=True).edges.to(setup.device)
    timestep = torch.full((1,), 999.0, device=setup.device)

    def run() -> list[Tensor]:
        rows = noise_rows(timestep, edges, "flow")
        return list(ops.attention(q, k, v, rows=rows, **t, kernel=setup.kernel))

    replay = recorded(run, setup)
    eager: dict[int, list[Tensor]] = {}
    problems, used = [], set()
    for value in torch.linspace(1000, 0, steps).tolist():
        timestep.fill_(value)
        found = replay()
        row = int(noise_rows(timestep, edges, "flow"))
        used.add(row)
        if row not in eager:
            eager[row] = run()
        if not same_bits(found, eager[row]):
            problems.append(f"timestep {value:.0f}: the replay is not the eager call at row {row}")
    if len(used) < 3:
        problems.append(f"expected all 3 rows of the policy in use, found {sorted(used)}")
    return {"problems": problems, "replays": steps, "rows": sorted(used), "recorded": setup.cuda}
