"""How times are taken: warm-up, turns, and a clock that fits the device.

All contenders take turns, round after round, so that a slow phase of the machine (a neighbour, a
clock that drops) meets them alike, and a speedup is a ratio within one round. Nothing is timed that
has not passed its gate.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fpsc.bench.record import Gate

Work = Callable[[], object]
OnRound = Callable[[int, int], None]
"""Called with (rounds done, rounds in all)."""

FLUSH_BYTES = 512 * 2**20


class Clock(Protocol):
    def __call__(self, work: Work) -> float:
        """Seconds of one call."""


class WallClock:
    """Of the host: for the CPU, whose work is done when a call returns."""

    def __call__(self, work: Work) -> float:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        del result
        return seconds


class DeviceClock:
    """Events of the device, behind a write that empties its L2 cache.

    ahead: whether the host may get ahead before the clock starts, so that its launches cost
        nothing. For single ops; a model's launches are a part of its time.
    """

    def __init__(self, device: torch.device, *, ahead: bool) -> None:
        size = max(FLUSH_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)
        self._cycles = 4_000_000 if ahead else 0  # about two milliseconds

    def __call__(self, work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if self._cycles:
            torch.cuda._sleep(self._cycles)
        start.record()
        result = work()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device, *, ahead: bool = False) -> Clock:
    return DeviceClock(device, ahead=ahead) if device.type == "cuda" else WallClock()


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    warmup: calls of each contender that do not count.
    rounds: that count, where they fit into `seconds`; at least `least`.
    """

    rounds: int = 7
    warmup: int = 1
    seconds: float = 1e9
    least: int = 3


def take_turns(
    works: Mapping[str, Work],
    clock: Clock,
    effort: Effort,
    on_round: OnRound = lambda done, total: None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round; all have as many."""
    one_round = 0.0
    for work in works.values():
        for _ in range(effort.warmup - 1):
            work()
        one_round += clock(work) if effort.warmup else 0.0
    rounds = effort.rounds
    if one_round:
        rounds = min(rounds, max(effort.least, int(effort.seconds / one_round)))
    found: dict[str, list[float]] = {name: [] for name in works}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            on_round(done, rounds)
            gc.collect(0)  # of what the last round left; all would take as long as a step
            for name, work in works.items():
                found[name].append(clock(work))
    finally:
        if collecting:
            gc.enable()
    on_round(rounds, rounds)
    return found


def relative_rms(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """|found - expected| / |expected| in Frobenius norms; infinity where a value is not finite.

    least: a norm that counts where that of expected is smaller, as it is where terms cancel.
    Where both are zero: zero if found is too, else infinity.
    """
    found, expected = found.detach().double(), expected.detach().double()
    error, size = torch.linalg.vector_norm(found - expected), torch.linalg.vector_norm(expected)
    if not (error.isfinite() and size.isfinite()):
        return float("inf")
    size = size.clamp(min=least)
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / size)


def gate(found: Tensor, expected: Tensor, allowed: float, against: str) -> Gate:
    """Whether `found` is as near to `expected` as it must be before anything is timed."""
    error = relative_rms(found, expected)
    finite = error < float("inf")
    return Gate(
        against=against,
        error=float(f"{error:.2g}") if finite else None,
        allowed=allowed,
        passed=error <= allowed,
    )
