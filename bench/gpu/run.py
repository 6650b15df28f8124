"""Runs the cases of one part before a deadline, and keeps a file of records that is always whole.

A run that is cut, by a deadline or from outside, loses nothing: the file is rewritten after every
case, through a temporary name, and says which case was running.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu import device
from fpsc.kernels.select import select

OK, WRONG, ERROR, CUT = "ok", "wrong", "error", "cut"
DONE = (OK, WRONG)
"""What `--resume` does not run again; errors and cut cases come after the others."""

Record = dict[str, Any]
Case = tuple[str, Callable[[], Record]]


@dataclass(frozen=True)
class Setup:
    """device: where everything runs; smoke: sizes for a test of the suite itself."""

    device: torch.device
    smoke: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def kernel(self) -> str:
        """The implementation by name, which never falls back; only a smoke test takes any.

        It is the one that "auto" stands for where it can be, and else Triton's.
        """
        if not self.cuda:
            return "auto"
        return "hopper" if self.gluon else "triton"

    @property
    def gluon(self) -> bool:
        """Whether the Gluon kernel serves this device; at other head dims it may still not."""
        return self.serves("gluon", torch.bfloat16, 128)

    def serves(self, kernel: str, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether an implementation computes fp8 cells here."""
        return select(self.device, dtype, head_dim, fp8=True, kernel=kernel).name == kernel


class Document:
    """The records of one part: {"part", "environment", "records", "skipped", "running"}.

    Args:
        resume: keep the records of an earlier run in the same environment.

    Raises:
        ValueError: the earlier run was in another environment.
    """

    def __init__(
        self, path: Path, part: str, environment: dict[str, Any], *, resume: bool = False
    ) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "part": part,
            "environment": environment,
            "records": [],
            "skipped": [],
            "running": None,
        }
        if resume and path.exists():
            self._take(json.loads(path.read_text()))
        self.save()

    def _take(self, before: dict[str, Any]) -> None:
        changed = [
            f"{name} (was {before['environment'].get(name)}, is {value})"
            for name, value in self.data["environment"].items()
            if name in device.IDENTITY and before["environment"].get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{self.path} was written in another environment: {', '.join(changed)}; "
                "name another folder with --out, or leave --resume out to start again"
            )
        self.data["records"] = before["records"]
        self.data["running"] = before["running"]
        self.close_running()

    def close_running(self) -> None:
        """A case that was running when the process ended gets a record that says so."""
        if self.data["running"]:
            self.put({"name": self.data["running"], "status": CUT, "at": device.now()})

    def status(self, name: str) -> str | None:
        return next((r["status"] for r in self.data["records"] if r["name"] == name), None)

    def put(self, record: Record) -> None:
        """Add a record in place of an earlier one of this name."""
        others = [r for r in self.data["records"] if r["name"] != record["name"]]
        self.data |= {"records": [*others, record], "running": None}
        self.save()

    def start(self, name: str) -> None:
        self.data["running"] = name
        self.save()

    def skip(self, names: list[str]) -> None:
        self.data["skipped"] = names
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)


def run(cases: Iterable[Case], document: Document, deadline: float) -> None:
    """Runs what is not done yet, in order, until the deadline (of `time.monotonic`)."""
    waiting = list(_waiting(cases, document))
    for position, (name, measure) in enumerate(waiting):
        if time.monotonic() >= deadline:
            left = [name for name, _ in waiting[position:]]
            document.skip(left)
            say(f"skipped for time: {'; '.join(left)}")
            return
        document.start(name)
        document.put(_measured(name, measure))
        lost = _lost_device()
        if lost:
            left = [name for name, _ in waiting[position + 1 :]]
            document.skip(left)
            say(f"the device does not answer after {name} ({lost}); skipped: {'; '.join(left)}")
            return


def _waiting(cases: Iterable[Case], document: Document) -> Iterator[Case]:
    """Cases that are not done; those that failed before come last."""
    failed = []
    for case in cases:
        status = document.status(case[0])
        if status is None:
            yield case
        elif status not in DONE:
            failed.append(case)
        else:
            say(f"{case[0]}: {status}, kept")
    yield from failed


def _measured(name: str, measure: Callable[[], Record]) -> Record:
    start = time.monotonic()
    try:
        found = measure()
        status = WRONG if found.get("problems") else OK
    except Exception as error:  # one case that fails is a finding, not the end of the run
        found = {
            "problems": [f"{type(error).__name__}: {str(error)[:600]}"],
            "traceback": traceback.format_exc()[-4000:],
        }
        status = ERROR
    record = {"name": name, "status": status, **found}
    record |= {"seconds": round(time.monotonic() - start, 2), "at": device.now()}
    say(f"{name}: {status}, {record['seconds']} s{''.join(f'; {p}' for p in _few(found))}")
    _free()
    return record


def _few(found: Record) -> list[str]:
    problems = found.get("problems", [])
    return [*problems[:3], *([f"and {len(problems) - 3} more"] if len(problems) > 3 else [])]


def _free() -> None:
    """Memory and compiled code of one case must not weigh on the next."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        gc.collect()
        with suppress(RuntimeError):  # reported by `_lost_device`
            torch.cuda.empty_cache()


def _lost_device() -> str:
    """Why the device cannot be used any more, or "": an illegal access stays for ever."""
    if not torch.cuda.is_available():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def say(text: str) -> None:
    print(text, flush=True)


def close_cut(path: Path) -> str:
    """Close the file of a process that was ended; the name of the case that was running."""
    if not path.exists():
        return "its start"
    data = json.loads(path.read_text())
    document = Document(path, data["part"], data["environment"], resume=True)
    document.skip(data["skipped"])
    return data["running"] or "its end"
