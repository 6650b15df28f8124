"""Which implementation serves a call: a query that answers with a reason, never by trying."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = range(16, 257)


@dataclass(frozen=True)
class Choice:
    """name: the implementation ("cpu"), or None where no one serves; reason: why, for people."""

    name: str | None
    reason: str


def select(device: torch.device | str, dtype: torch.dtype, head_dim: int, fp8: bool) -> Choice:
    """The implementation for q, k, v of this device, dtype and head_dim; fp8: fp8 cells occur."""
    device = torch.device(device)
    if dtype not in DTYPES:
        return Choice(None, f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if head_dim not in HEAD_DIMS:
        return Choice(
            None, f"head_dim {head_dim} is not within {HEAD_DIMS.start}..{HEAD_DIMS.stop - 1}"
        )
    rounding = "; fp8 cells emulate e4m3 rounding, which costs time here" if fp8 else ""
    if device.type == "cpu":
        return Choice("cpu", f"the CPU kernel{rounding}")
    return Choice(
        "cpu",
        f"no kernel for {device.type} in this version: the torch operators of the CPU kernel run "
        f"on {device.type} tensors, and read the lists from the host{rounding}",
    )
