"""The memory of the process."""

from __future__ import annotations

import ctypes
import platform
import sys


def keep_memory() -> None:
    """Have glibc keep freed memory: page faults on fresh activations cost more than the sums."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX: the arenas of other threads always give memory back
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
