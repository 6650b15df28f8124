"""Where the time of one call goes: attention, linear layers, the rest (Amdahl's split).

The profiler sees ops on the host and what each launched on the device. What counts is the outermost
op that is an attention of a sequence with itself, or a matrix product; everything else, between
them too, is the rest. Code that Inductor generates is no op, and is therefore in the rest.
"""

from __future__ import annotations

import gzip
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType

from fpsc.bench.record import Kernel, Memory, Split, rounded

ATTENTION, LINEAR, REST = "attention", "linear", "rest"
_ATTENTION = (
    "fpsc::attention",
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_efficient_attention",
    "flash_attn",
    "sageattn",
    "flex_attention",
)
_LINEAR = (
    "aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::matmul",
    "aten::_scaled_mm", "mkldnn::_linear", "aten::mkldnn_linear", "mkl::_mkl_linear",
    "aten::_addmm_activation", "aten::convolution", "aten::conv3d",
)  # fmt: skip
TOP = 12
NAME = 120

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # else each profile writes two lines to the terminal


def kind_of(name: str, shapes: Any = ()) -> str:
    """What an op is. shapes: of its inputs; an attention over another sequence is the rest."""
    if name.startswith(_ATTENTION):
        sizes = [shape for shape in shapes or () if len(shape) == 4][:2]
        crossing = len(sizes) == 2 and name.startswith("aten::") and sizes[0][2] != sizes[1][2]
        return REST if crossing else ATTENTION
    return LINEAR if name.startswith(_LINEAR) else REST


def split(work: Callable[[], object], device: torch.device, trace: Path | None = None) -> Split:
    """Profile one call. trace: a file for ui.perfetto.dev to write, ending in .json.gz."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        result = work()
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    del result
    if trace is not None:
        write_trace(profile, trace)
    parts, top = _parts(profile.events(), cuda)
    if cuda:
        seconds = sum(parts.values())
    known = parts[ATTENTION] + parts[LINEAR]
    return Split(
        attention=rounded(parts[ATTENTION]),
        linear=rounded(parts[LINEAR]),
        rest=rounded(max(0.0, seconds - known)),
        top=tuple(top),
        trace=trace.name if trace is not None else None,
    )


def write_trace(profile: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    plain = beside.with_suffix("")  # the profiler writes .json
    try:
        profile.export_chrome_trace(str(plain))
        with gzip.open(beside, "wb") as packed:
            packed.write(plain.read_bytes())
        os.replace(beside, path)
    finally:
        plain.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)


def _parts(events: Any, cuda: bool) -> tuple[dict[str, float], list[Kernel]]:
    """Seconds by kind, and the ops that take most."""
    parts: dict[str, float] = defaultdict(float)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)

    def add(name: str, kind: str, microseconds: float, called: int = 1) -> None:
        parts[kind] += microseconds / 1e6
        seconds[name[:NAME], kind] += microseconds / 1e6
        calls[name[:NAME], kind] += called

    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        kind = kind_of(event.name, event.input_shapes)
        above = _kind_above(event)
        if cuda:
            for kernel in event.kernels:  # launched by this op itself
                add(kernel.name, above or kind, kernel.duration)
        elif kind != REST and not above:
            add(event.name, kind, event.time_range.elapsed_us())
        elif kind == REST and not above and event.name.startswith(("aten::", "fpsc::")):
            own = event.self_cpu_time_total
            seconds[event.name[:NAME], REST] += own / 1e6
            calls[event.name[:NAME], REST] += 1
    longest = sorted(seconds, key=lambda key: -seconds[key])[:TOP]
    top = [
        Kernel(name=name, kind=kind, seconds=rounded(seconds[name, kind]), calls=calls[name, kind])
        for name, kind in longest
    ]
    return parts, top


def _kind_above(event: Any) -> str:
    """The kind of the outermost op around an event that has one, "" where none has."""
    found, parent = "", event.cpu_parent
    while parent is not None:
        kind = kind_of(parent.name, parent.input_shapes)
        found = kind if kind != REST else found
        parent = parent.cpu_parent
    return found


def peak(work: Callable[[], object], device: torch.device) -> Memory:
    """Bytes that one call has at its peak, beside what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        del result
        return Memory(
            peak=torch.cuda.max_memory_allocated(device), before=before, source="allocator"
        )
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = work()
        del result
    now = most = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return Memory(peak=most, before=0, source="allocator, of the call alone")


def shares(split: Split) -> str:
    """For people."""
    total = split.total or 1.0
    parts = ((ATTENTION, split.attention), (LINEAR, split.linear), (REST, split.rest))
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts)
