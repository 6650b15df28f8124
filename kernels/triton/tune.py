"""Which configuration a kernel runs with: found by timing once, and kept on disk.

The first call of a kernel on a device times its candidates (`fpsc.kernels.triton.configs`) on that
call's own tensors and keeps the fastest, in memory and in a file. The file is keyed by what the
answer depends on: device, Triton, sources of the kernels. Nothing is timed at import, inside the
recording of a CUDA graph (the default candidate runs), or where FPSC_AUTOTUNE=0 says not to.

FPSC_CACHE_DIR names the folder of the file; by default $XDG_CACHE_HOME/fpsc, or ~/.cache/fpsc.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

import triton
from fpsc.kernels.triton import configs, interpreter
from fpsc.kernels.triton.configs import Config

log = logging.getLogger("fpsc")

ROUNDS = 5
"""Timed runs of each candidate, in turns; the median counts."""

PERMUTE_V: bool | None = None
"""For measurements: overrides `permutes_v`. Forward and backward must see the same value."""

ONLY: Config | None = None
"""For measurements: runs wherever it is a candidate, and nothing is timed there."""

_chosen: dict[str, Config] = {}

Run = Callable[[Config], None]


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; of the interpreter, that of Hopper."""
    if device.type != "cuda":
        return (9, 0)
    return torch.cuda.get_device_capability(device)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def permutes_v(device: torch.device) -> bool:
    """Whether V of FP8 cells is stored permuted on a device."""
    if PERMUTE_V is not None:
        return PERMUTE_V
    return configs.permutes_v(capability(device))


def choose(kernel: str, device: torch.device, dtype: torch.dtype, dp: int, run: Run) -> Config:
    """The configuration for a call; `run` launches it with one, and may be called several times.

    Raises: RuntimeError where no candidate can be launched, with what each of them said.
    """
    if interpreter.ACTIVE:
        return configs.INTERPRETED
    permuted = permutes_v(device)
    found = configs.candidates(kernel, capability(device), dp, permuted=permuted)
    if ONLY in found:
        return ONLY
    if len(found) == 1:
        return found[0]
    key = f"{kernel} {dtype} {dp} {permuted} {_identity(device)}"
    if key not in _chosen:
        answer = _read().get(key)
        stored = answer.get("config") if isinstance(answer, dict) else None
        known = next((c for c in found if asdict(c) == stored), None)
        if known is None:
            if os.environ.get("FPSC_AUTOTUNE") == "0" or torch.cuda.is_current_stream_capturing():
                return found[0]
            known = _fastest(key, found, run)
        _chosen[key] = known
    return _chosen[key]


def cache_file() -> Path:
    """Where the answers are kept."""
    folder = os.environ.get("FPSC_CACHE_DIR")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "fpsc" / "tuned.json"
    return Path(folder) / "tuned.json"


def _fastest(key: str, found: Sequence[Config], run: Run) -> Config:
    times: dict[Config, list[float]] = {}
    said: list[str] = []
    for config in found:
        try:
            run(config)
            torch.cuda.synchronize()
            times[config] = []
        except Exception as error:  # not enough shared memory, or a compiler that cannot do it
            said.append(f"{config}: {type(error).__name__}: {str(error)[:200]}")
    if not times:
        raise RuntimeError(f"no configuration of {key} can be launched:\n" + "\n".join(said))
    for line in said:
        log.info("fpsc: left out a configuration: %s", line)
    for _ in range(ROUNDS):
        for config, taken in times.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(config)
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
    medians = {config: statistics.median(taken) for config, taken in times.items()}
    best = min(medians, key=medians.__getitem__)
    timed = [{"config": asdict(c), "milliseconds": ms} for c, ms in medians.items()]
    _write(key, {"config": asdict(best), "timed": timed})
    return best


@cache
def _identity(device: torch.device) -> str:
    """What an answer depends on beside the kernel and its types."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for folder in (here, here.parent / "gluon"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    name = torch.cuda.get_device_name(device)
    return f"{name} | triton {triton.__version__} | {digest.hexdigest()[:16]}"


def _read() -> dict[str, Any]:
    path = cache_file()
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("fpsc: cannot read %s (%s); its answers are found again", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _write(key: str, answer: dict[str, Any]) -> None:
    """Add an answer to the file, which is never seen half written."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _read() | {key: answer}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            written = Path(file.name)
            try:
                json.dump(content, file, indent=1)
                file.close()
                os.replace(written, path)
            except OSError:
                written.unlink()
                raise
    except OSError as error:
        log.warning("fpsc: cannot write %s (%s); kernels are timed again next time", path, error)
