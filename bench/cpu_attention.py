"""Sparse attention on CPU against dense: fpsc, compiled FlexAttention, gather + SDPA, and SDPA.

    python bench/cpu_attention.py                    # all keeps, about ten minutes on two cores
    python bench/cpu_attention.py --keep 0.25        # one keep; the others in the file stay
    python bench/cpu_attention.py --check            # fails if a target is missed

One layer of self-attention of a video: grid 13x30x52 (20,280 tokens), 4 heads, head_dim 128,
float32, not quantised. The pattern is `near`. Every contender passes a correctness gate against the
reference before it is timed; then all take turns, round after round, so that a slow phase of the
machine meets them alike. A speedup is SDPA's time over the contender's in one round; the file holds
the median and the quartiles of all rounds.

FlexAttention is timed at its best, twice: on the lists of the planned tile, whose ragged tiles it
needs padded to blocks, and on a tile that divides the grid, without any padding or mask. Its inputs
already are in tile order, and its output stays so; fpsc's times include both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention.flex_attention import BlockMask, flex_attention  # noqa: E402

from fpsc.grid import Layout, layout, plan_tile  # noqa: E402
from fpsc.kernels import ops, reference  # noqa: E402
from fpsc.policy.patterns import Pattern, lists  # noqa: E402
from fpsc.policy.resolve import groups_of, longest_first, transposed  # noqa: E402
from tests.thresholds import KERNEL_FP32, relative_rms  # noqa: E402

GRID, HEADS, HEAD_DIM = (13, 30, 52), 4, 128
SCALE = HEAD_DIM**-0.5
DIVIDING_TILE = (13, 2, 4)  # 104 tokens, 195 tiles, none ragged
ROUNDS = {0.125: 9, 0.25: 7, 0.5: 5, 1.0: 3}
TARGETS = {0.25: 2.3, 0.125: 4.6}
RESULTS = ROOT / "bench" / "results" / "cpu_attention.json"


@dataclass(frozen=True)
class Problem:
    """q, k, v [1, H, N, D] in raster order, and the lists of one tiling at one keep."""

    q: Tensor
    k: Tensor
    v: Tensor
    tiles: Layout
    ptr: Tensor
    idx: Tensor

    @property
    def order(self) -> Tensor:
        """Sequence positions in tile order, without padding."""
        return self.tiles.gather[self.tiles.gather >= 0].long()

    @cached_property
    def lists(self) -> dict[str, Tensor]:
        """What `fpsc::attention` takes of a plan; one pattern, one scale a tile."""
        back_ptr, back_idx = transposed(self.ptr.numpy(), self.idx.numpy())
        return {
            "list_ptr": self.ptr[None],
            "list_idx": self.idx,
            "back_ptr": torch.from_numpy(back_ptr)[None],
            "back_idx": torch.from_numpy(back_idx),
            "order": torch.from_numpy(longest_first(self.ptr.numpy()[None])),
            "groups": torch.from_numpy(groups_of("tile", self.tiles))[None],
            "gather": self.tiles.gather,
            "valid": self.tiles.valid,
        }


@dataclass(frozen=True)
class Contender:
    """run: what is timed; result: its output in raster order, given what run returned."""

    run: Callable[[], Tensor]
    result: Callable[[Tensor], Tensor]


def fpsc_(p: Problem) -> Contender:
    zero = torch.zeros(1, dtype=torch.int32)
    tables = {
        "rows": zero,
        "cells": zero.expand(1, 1, HEADS),
        "modes": zero.expand(1, 3),
        **p.lists,
    }
    return Contender(lambda: ops.attention(p.q, p.k, p.v, **tables)[0], lambda out: out)


def flex(p: Problem) -> Contender:
    """A block a tile: of its exact size where no tile is ragged, else padded and masked."""
    n, counts = p.tiles.n_tiles, p.ptr.diff()
    blocks = torch.zeros(n, n, dtype=torch.int32)
    for u in range(n):
        blocks[u, : counts[u]] = p.idx[p.ptr[u] : p.ptr[u + 1]]
    counts, blocks = counts[None, None], blocks[None, None]
    valid = p.tiles.valid
    if valid.min() == valid.max():
        size = int(valid[0])
        none = torch.zeros_like(counts), torch.zeros_like(blocks)
        mask = BlockMask.from_kv_blocks(*none, counts, blocks, BLOCK_SIZE=size)
        slots = p.order
    else:
        size = p.tiles.gather.shape[1]
        slots = p.tiles.gather.flatten().long()  # -1 in padding
        mask = BlockMask.from_kv_blocks(
            counts,
            blocks,
            BLOCK_SIZE=size,
            mask_mod=lambda b, h, q, k: k % size < valid[k // size],
        )
    q, k, v = (x[:, :, slots.clamp(min=0)].contiguous() for x in (p.q, p.k, p.v))
    compiled = torch.compile(flex_attention, dynamic=False)

    def result(out: Tensor) -> Tensor:
        raster = torch.empty_like(p.q)
        raster[:, :, slots[slots >= 0]] = out[:, :, slots >= 0]
        return raster

    return Contender(lambda: compiled(q, k, v, block_mask=mask, scale=SCALE), result)


def gather_sdpa(p: Problem) -> Contender:
    """One call of SDPA a query tile, on a gathered copy of the keys that it visits."""
    tiles = reference.tile_rows(p.tiles.gather, p.tiles.valid)
    keys = [
        torch.cat([tiles[w] for w in p.idx[a:b].tolist()])
        for a, b in zip(p.ptr[:-1].tolist(), p.ptr[1:].tolist(), strict=True)
    ]

    def run() -> Tensor:
        out = torch.empty_like(p.q)
        for rows, visited in zip(tiles, keys, strict=True):
            out[:, :, rows] = F.scaled_dot_product_attention(
                p.q[:, :, rows], p.k[:, :, visited], p.v[:, :, visited], scale=SCALE
            )
        return out

    return Contender(run, lambda out: out)


def sdpa(p: Problem) -> Contender:
    return Contender(
        lambda: F.scaled_dot_product_attention(p.q, p.k, p.v, scale=SCALE), lambda out: out
    )


# Name in the results: how it is built, and on which tiling.
CONTENDERS: dict[str, tuple[Callable[[Problem], Contender], str]] = {
    "sdpa, dense": (sdpa, "dense"),
    "fpsc": (fpsc_, "planned"),
    "fpsc, tile that divides the grid": (fpsc_, "dividing"),
    "flex, padded": (flex, "planned"),
    "flex, tile that divides the grid": (flex, "dividing"),
    "gather + sdpa": (gather_sdpa, "planned"),
}
BASELINE = "sdpa, dense"


def problems(keep: float) -> dict[str, Problem]:
    torch.manual_seed(0)
    n = GRID[0] * GRID[1] * GRID[2]
    # As a model makes them: [B, N, H, D] in memory.
    q, k, v = (torch.randn(1, n, HEADS, HEAD_DIM).transpose(1, 2) for _ in range(3))
    planned, dividing = layout(GRID, plan_tile(GRID)), layout(GRID, DIVIDING_TILE)
    pattern = Pattern("near", keep=keep) if keep < 1 else Pattern("dense")
    return {
        "dense": Problem(q, k, v, planned, *lists(Pattern("dense"), planned)),
        "planned": Problem(q, k, v, planned, *lists(pattern, planned)),
        "dividing": Problem(q, k, v, dividing, *lists(pattern, dividing)),
    }


def exact(p: Problem) -> Tensor:
    modes = torch.zeros(1, HEADS, 3, dtype=torch.int32)
    lists = {name: x for name, x in p.lists.items() if not name.startswith("back")}
    return reference.forward(p.q, p.k, p.v, modes, *lists.values(), None, SCALE)[0]


def seconds(contender: Contender) -> float:
    start = time.perf_counter()
    contender.run()
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 4), "q1": round(q1, 4), "q3": round(q3, 4)}


def measure(keep: float, rounds: int) -> dict[str, Any]:
    """All contenders at one keep. Ends the run where one is wrong."""
    given = problems(keep)
    expected = {name: exact(problem) for name, problem in given.items()}
    built = {name: (build(given[on]), given[on]) for name, (build, on) in CONTENDERS.items()}
    errors = {}
    for name, (contender, _) in built.items():
        error = relative_rms(contender.result(contender.run()), expected[CONTENDERS[name][1]])
        print(f"keep {keep}: {name}: error {error:.1e}", flush=True)
        if error > KERNEL_FP32:
            sys.exit(f"not timed: {name} has error {error:.1e}, allowed is {KERNEL_FP32:.1e}")
        errors[name] = error
    print("every contender is right; warming up, then timing", flush=True)
    load = os.getloadavg()[0]
    for contender, _ in built.values():
        contender.run()
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds):
        for name, (contender, _) in built.items():
            times[name].append(seconds(contender))
    results = {}
    for name, values in times.items():
        tiles = built[name][1].tiles
        speedups = [a / b for a, b in zip(times[BASELINE], values, strict=True)]
        results[name] = {
            "seconds": summary(values),
            "speedup": summary(speedups),
            "error": float(f"{errors[name]:.1e}"),
        }
        if name != BASELINE:
            results[name]["tile"] = list(tiles.tile)
            results[name]["keep"] = round(visited_keep(built[name][1]), 4)
    return {"rounds": rounds, "load_before": round(load, 2), "contenders": results}


def visited_keep(p: Problem) -> float:
    """The fraction of the key tiles that is visited."""
    return len(p.idx) / p.tiles.n_tiles**2


def environment() -> dict[str, Any]:
    def git(*args: str) -> str:
        found = subprocess.run(("git", *args), cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip()

    measured = ("--", "kernels", "bench/cpu_attention.py")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = [x.split(":")[1].strip() for x in lines if x.startswith(("model name", "vendor_id"))]
    return {
        "cpu": sorted(set(cpu)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onednn": torch.backends.mkldnn.is_available(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git("log", "-1", "--format=%h", *measured) or None,  # that changed these
        "changed": git("status", "--porcelain", *measured) != "",
    }


def missed(results: dict[str, Any]) -> list[str]:
    """What falls short: of the targets, or of FlexAttention on the same lists."""
    problems = []
    for keep, target in TARGETS.items():
        if str(keep) not in results:
            continue
        found = results[str(keep)]["contenders"]
        speedup = found["fpsc"]["speedup"]["median"]
        if speedup < target:
            problems.append(f"keep {keep}: expected {target}x, found {speedup:.2f}x")
        for ours, theirs in (
            ("fpsc", "flex, padded"),
            ("fpsc, tile that divides the grid", "flex, tile that divides the grid"),
        ):
            if found[ours]["seconds"]["median"] > found[theirs]["seconds"]["median"]:
                problems.append(f"keep {keep}: {ours} is slower than {theirs}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="+", default=sorted(ROUNDS), help="all")
    parser.add_argument("--rounds", type=int, help="another number of rounds, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="fail where a target is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    where = environment()
    document: dict[str, Any] = {"environment": where, "keep": {}}
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        if before["environment"] == where:
            document = before
    document["problem"] = {"grid": GRID, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32"}
    for keep in arguments.keep:
        found = measure(keep, arguments.rounds or ROUNDS.get(keep, 5))
        found["date"] = datetime.now(UTC).date().isoformat()
        document["keep"][str(keep)] = found
        for name, result in found["contenders"].items():
            median, speedup = result["seconds"]["median"], result["speedup"]["median"]
            print(f"keep {keep}: {name:34} {median:7.3f} s {speedup:6.2f}x", flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    problems = missed(document["keep"])
    for problem in problems:
        print(f"missed: {problem}", file=sys.stderr)
    sys.exit(1 if problems and arguments.check else 0)


if __name__ == "__main__":
    main()
