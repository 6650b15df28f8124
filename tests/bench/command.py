"""Runs bench/sass.py as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(
    checkout: Path, *arguments: str | Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Never under Triton's interpreter, whose functions cannot be compiled.

    path: a folder to import from, beside the checkout.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        (sys.executable, *arguments),
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )


def sass(
    checkout: Path, *arguments: str | Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return python(checkout, checkout / "bench" / "sass.py", *arguments, path=path)
