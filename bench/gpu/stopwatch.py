"""Times of several functions on the GPU, taken in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

SAMPLE_MS = 10.0
"""A function that takes less is timed several times in its turn; the turn's time is the median."""

FLUSH_BYTES = 512 * 2**20
AHEAD_CYCLES = 4_000_000
"""About two milliseconds in which the host gets ahead, so that its launches cost nothing."""


class Stopwatch:
    """Times with CUDA events, each behind a write that empties the L2 cache."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        size = max(FLUSH_BYTES, 4 * l2)
        self._flush = torch.empty(size, dtype=torch.int8, device="cuda")

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end)

    def turns(
        self,
        runs: dict[str, Callable[[], object]],
        seconds: float,
        least: int = 3,
        most: int = 21,
    ) -> dict[str, list[float]]:
        """Milliseconds of every function in every turn, all as often as `seconds` allow."""
        first = {}
        for name, run in runs.items():
            self.once(run)
            first[name] = self.once(run)
        samples = {name: max(1, min(5, round(SAMPLE_MS / ms))) for name, ms in first.items()}
        turn = sum(n * (first[name] + 3.0) for name, n in samples.items()) / 1e3
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(max(least, min(most, int(seconds / turn)))):
            for name, run in runs.items():
                times = [self.once(run) for _ in range(samples[name])]
                found[name].append(statistics.median(times))
        return found


def quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {name: rounded(x) for name, x in (("median", median), ("q1", q1), ("q3", q3))}


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Of two lists of one length: quartiles of the ratio in each turn."""
    return quartiles([a / b for a, b in zip(slower, faster, strict=True)])


def rounded(x: float) -> float:
    return float(f"{x:.5g}")


def tflops(operations: float, ms: float) -> float:
    return rounded(operations / ms / 1e9)


def summary(times: list[float], **others: Any) -> dict[str, Any]:
    return {"ms": quartiles(times), "turns": len(times), **others}
