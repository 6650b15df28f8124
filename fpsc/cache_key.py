"""What compiled code depends on besides its graph, so that stale code is never taken from a cache.

Inductor's and AOTAutograd's caches know a custom op by its name only: not its fake, its backward or
its kernels. A pass of our own whose identity hashes all of them, and the policy's structure, closes
that gap. A policy's numbers are run-time tensors and stay out of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

_SOURCES = ("fpsc.kernels.ops", "fpsc.passes.manager", "fpsc.grid", "fpsc.launch")
"""A module of every package, or a single file, that decides what compiled code does."""

HOOK = "post_grad_custom_pre_pass"


@cache
def source_hash() -> str:
    """Hash of all our sources that compiled code depends on, as they are on disk at first use."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        path = Path(str(import_module(name).__file__))
        package = name.count(".") > 1  # fpsc.kernels.ops stands for all of fpsc.kernels
        files = sorted(path.parent.rglob("*.py")) if package else [path]
        for file in files:
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


class CacheKey(CustomGraphPass):
    """A pass that changes nothing and identifies our code; runs the user's own hook, if there is
    one.

    Args:
        structure: what the policy fixes at compile time.
        inner: the user's own pass for the same hook of Inductor.
    """

    def __init__(self, structure: str, inner: Callable[[Graph], None] | None = None) -> None:
        self.structure = structure
        self.inner = inner

    def __call__(self, graph: Graph) -> None:
        if self.inner is not None:
            self.inner(graph)

    def uuid(self) -> Any:
        """Identity for the caches; None, which bypasses them, when the user's hook has none."""
        if self.inner is None:
            return ("fpsc", source_hash(), self.structure)
        inner = self.inner.uuid() if isinstance(self.inner, CustomGraphPass) else None
        return None if inner is None else ("fpsc", source_hash(), self.structure, inner)
