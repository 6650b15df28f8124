"""What ran on the device, by kernel, and what the host called to make it run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType

NAME = 120
"""Longest name of a kernel in a result: those of templates fill pages."""


@dataclass(frozen=True)
class Kernel:
    """One execution: start and length in microseconds."""

    name: str
    start: float
    length: float


@contextmanager
def profiled(cuda: bool) -> Iterator[Any]:
    """A torch profiler around the block; None where there is no CUDA."""
    if not cuda:
        yield None
        return
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        yield profile
        torch.cuda.synchronize()


def executions(profile: Any) -> list[Kernel]:
    """Kernels, copies and fills on the device, in the order in which they started."""
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def kernels(profile: Any) -> dict[str, float]:
    """Milliseconds on the device by kernel."""
    total: dict[str, float] = defaultdict(float)
    for kernel in executions(profile):
        total[kernel.name[:NAME]] += kernel.length / 1e3
    return {name: round(ms, 4) for name, ms in total.items()}


def calls(profile: Any) -> dict[str, int]:
    """How often the host called what of CUDA's interface to launch, record or replay."""
    names = Counter(event.name for event in profile.events())
    return {
        name: n
        for name, n in sorted(names.items())
        if name.startswith("cu") and ("Launch" in name or "Capture" in name or "Instant" in name)
    }
