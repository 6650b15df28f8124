"""Where a run comes from: libraries, sources, machine, and the state that the device is in."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from fpsc.bench.record import Device, Environment

PACKAGES = (
    "torch", "triton", "diffusers", "torchao", "flash-attn", "flash-attn-3", "sageattention",
    "xformers",
)  # fmt: skip
FOLDER = Path(__file__).resolve().parents[1]
"""The package fpsc, installed or in a checkout."""

STATE = (
    "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,"
    "clocks_event_reasons.active"
)


def environment(device: torch.device) -> Environment:
    """The fingerprint of this process."""
    return Environment(
        time=now(),
        fpsc=version("fpsc"),
        commit=commit(),
        source=source_hash(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={name: version(name) for name in PACKAGES} | {"torch": torch.__version__},
        cpu=cpu(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=described(device),
        load=load(),
    )


def described(device: torch.device) -> Device:
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return Device(kind="cpu", name=cpu(), capability=capability, memory=memory(device)[1])
    properties = torch.cuda.get_device_properties(device)
    driver = _nvidia_smi(device, "driver_version")
    return Device(
        kind="cuda",
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory=properties.total_memory,
        driver=driver[0] if driver else None,
        state=state(device),
    )


def state(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature now, as far as they can be read. Reads only."""
    if device.type == "cuda":
        values = _nvidia_smi(device, STATE)
        return dict(zip(STATE.split(","), values, strict=True)) if values else {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return {"clock": f"{sum(clocks) / len(clocks):.0f} MHz"} if clocks else {}


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free, and in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {name: int(rest.split()[0]) * 1024 for name, rest in (x.split(":") for x in lines)}
        return values["MemAvailable"], values["MemTotal"]
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total


def load() -> float | None:
    """Of the machine over the last minute: processes that want a core."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


@cache
def source_hash() -> str:
    """A hash of every source of the package: the same for a checkout and what is installed of it.

    The benchmarks themselves count too: a change in how is a change in what is measured.
    """
    digest = hashlib.sha256()
    found = (
        Path(folder, name)
        for folder, _, names in os.walk(FOLDER, followlinks=True)  # of a checkout, kernels/ is one
        for name in names
        if name.endswith(".py")
    )
    for file in sorted(found):
        digest.update(str(file.relative_to(FOLDER)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def commit() -> str | None:
    """The git revision, with a plus where a source was changed; None where fpsc is no checkout."""
    if _output("git", "rev-parse", "--show-toplevel") != str(FOLDER.parent):
        return None  # a repository around the environment that it is installed into
    revision = _output("git", "log", "-1", "--format=%h")
    changed = _output("git", "status", "--porcelain", "--", ".", "../kernels", "../passes")
    return revision + ("+" if changed else "") if revision else None


def _nvidia_smi(device: torch.device, names: str) -> list[str]:
    index = device.index if device.index is not None else torch.cuda.current_device()
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    identity = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    text = _output("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", "-i", identity)
    values = [value.strip() for value in text.splitlines()[0].split(",")] if text else []
    return values if len(values) == names.count(",") + 1 else []


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
