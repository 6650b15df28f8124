"""The machine: what it lacks for the suite, and what a result must say of where it came from."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from importlib import util
from pathlib import Path
from typing import Any

import torch

from fpsc.kernels.select import fp8_support

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("fpsc", "kernels", "passes", "bench/gpu", "bench/gpu_suite.py")
"""What the results depend on, beside the libraries."""

IDENTITY = ("device", "driver", "torch", "triton", "python", "source")
"""Records that differ in one of these do not belong into one file."""


def missing() -> list[str]:
    """What this machine lacks, in words; empty where the suite can run."""
    lacking = []
    if not torch.cuda.is_available():
        lacking.append(
            f"a CUDA device that torch sees (torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda or 'never'})"
        )
    elif not fp8_support("cuda")[0]:
        lacking.append(f"a device that computes fp8 cells: {fp8_support('cuda')[1]}")
    lacking += [
        f"the package {name}"
        for name in ("triton", "diffusers", "pydantic", "ruamel.yaml", "rich")
        if not _importable(name)
    ]
    return lacking


def environment() -> dict[str, Any]:
    """Fingerprint of device, libraries and sources, and the state in which the device is."""
    found: dict[str, Any] = {
        "device": platform.machine(),
        "driver": None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "source": source_hash(),
        "commit": commit(),
        "time": now(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        state = device_state()
        found |= {"driver": state.pop("driver_version", None), "state": state}
    return found


def device_state() -> dict[str, str]:
    """Clocks, power and temperature now. Reads only."""
    names = (
        "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
        "temperature.gpu,clocks_event_reasons.active"
    )
    text = _output("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", "-i", "0")
    values = [value.strip() for value in text.splitlines()[0].split(",")] if text else []
    if len(values) != names.count(",") + 1:
        return {"nvidia-smi": text or "gave no answer"}
    return dict(zip(names.split(","), values, strict=True))


def source_hash() -> str:
    """A hash of every source that the results depend on: the same in a copy without git."""
    digest = hashlib.sha256()
    for name in MEASURED:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The git revision, with a plus where a source was changed; None in a copy without git."""
    revision = _output("git", "log", "-1", "--format=%h")
    changed = "+" if _output("git", "status", "--porcelain", "--", *MEASURED) else ""
    return revision + changed if revision else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _importable(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except ImportError:
        return False


def _version(name: str) -> str | None:
    if not _importable(name):
        return None
    return str(getattr(__import__(name), "__version__", "unknown"))
