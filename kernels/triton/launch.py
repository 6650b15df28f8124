"""How a kernel is launched: on the tensors' device, with memory for its tensor descriptors."""

from __future__ import annotations

import contextvars
from typing import Any

import torch
from torch import Tensor

import triton
from fpsc.kernels.triton import interpreter

interpreter.repair()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors; nothing where the grid is empty.

    A kernel that makes tensor descriptors asks Triton for memory, through an allocator that is a
    setting of the caller's context. It is set in a copy of that context, so that the caller's own
    stays.
    """
    if 0 in grid:
        return
    device = next(x for x in args if isinstance(x, Tensor)).device
    if interpreter.ACTIVE:
        for name in ("num_warps", "num_stages", "maxnreg"):
            options.pop(name, None)
        kernel[grid](*args, **options)
        return

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run() -> None:
        triton.set_allocator(allocate)
        with torch.cuda.device(device):
            kernel[grid](*args, **options)

    contextvars.copy_context().run(run)
