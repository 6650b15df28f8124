"""Which implementation serves a call: a query that answers with a reason, never by trying."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = range(16, 257)
KERNELS = ("cpu", "triton", "gluon", "hopper", "reference")
"""Names of the implementations; "auto" stands for the best one that serves a call."""

PACKING = ("triton", "gluon", "hopper")
"""Those that first pack their operands in tile order: norms and rotations in front cost them
nothing more, and for fp8 cells they leave a `Saved`, with which backward needs no q, k and v."""

TRITON_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)
OLDEST_TRITON = (3, 6)
GLUON_CAPABILITY = (9, 0)
GLUON_TRITON = ((3, 6), (3, 8))
"""Oldest and newest whose Gluon the kernel is written for: it is experimental, and changes."""
GLUON_HEAD_DIMS = range(33, 129)  # those that pad to 64 and 128

Version = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """name: one of `KERNELS`, or None where none serves; reason: why, for people."""

    name: str | None
    reason: str


def select(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    fp8: bool,
    kernel: str = "auto",
    capability: Version | None = None,
) -> Choice:
    """The implementation for q, k, v of this device, dtype and head_dim.

    Args:
        fp8: whether fp8 cells may occur.
        kernel: "auto", or the only implementation that may be chosen.
        capability: compute capability of the device, where it is not to be asked.

    Raises:
        ValueError: no implementation has that name.
    """
    check_kernel(kernel)
    device = torch.device(device)
    if dtype not in DTYPES:
        return Choice(None, f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if head_dim not in HEAD_DIMS:
        return Choice(
            None, f"head_dim {head_dim} is not within {HEAD_DIMS.start}..{HEAD_DIMS.stop - 1}"
        )
    if kernel == "reference":
        return Choice("reference", "the specification, which is slow; named explicitly")
    rounding = "; fp8 cells emulate e4m3 rounding, which costs time here" if fp8 else ""
    if device.type == "cpu" and kernel in ("auto", "cpu"):
        return Choice("cpu", f"the CPU kernel{rounding}")
    lacking = None if kernel == "cpu" else _triton_lacks(device, dtype, fp8, capability)
    if kernel in ("gluon", "hopper"):
        lacking = _gluon_lacks(device, head_dim, capability) or lacking
    if kernel not in ("auto", "cpu") and lacking is not None:
        return Choice(None, f'kernel "{kernel}" was named, but {lacking}')
    if kernel == "gluon":
        return Choice(
            "gluon", f"the Gluon kernel for fp8 cells, Triton's for the rest, on {device}"
        )
    if kernel != "cpu" and lacking is None:
        both = fp8 and kernel == "auto" and _gluon_lacks(device, head_dim, capability) is None
        if kernel == "hopper" or both:
            why = "fp8 cells by Gluon's where the first call measures it to be faster"
            return Choice("hopper", f"the Triton kernels, on {device}; {why}")
        where = "Triton's interpreter" if device.type == "cpu" else str(device)
        return Choice("triton", f"the Triton kernels, on {where}")
    why = "named explicitly" if lacking is None else lacking
    return Choice(
        "cpu",
        f"{why}: the torch operators of the CPU kernel run on {device.type} tensors, and read the "
        f"lists from the host{rounding}",
    )


def fp8_support(device: torch.device | str, capability: Version | None = None) -> tuple[bool, str]:
    """Whether fp8 cells run as such on a device, and why, for people.

    capability: compute capability of the device, where it is not to be asked.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return True, f"e4m3 rounding is emulated on {device.type}"
    found = capability or _capability(device)
    if found is None:
        return False, f"the compute capability of {device} is not known"
    has = f"{device} has compute capability {_dotted(found)}"
    if found < FP8_CAPABILITY:
        return False, f"{has}, and e4m3 needs {_dotted(FP8_CAPABILITY)}"
    return True, f"{has}, with tensor cores for e4m3"


def check_kernel(kernel: str) -> None:
    """Raises: ValueError, if no implementation has that name."""
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of auto, {', '.join(KERNELS)}, found {kernel!r}")


def _triton_lacks(
    device: torch.device, dtype: torch.dtype, fp8: bool, capability: Version | None
) -> str | None:
    """Why the Triton kernels do not serve a device; None where they do."""
    version = _triton_version()
    if version is None:
        return "triton is not installed"
    if version < OLDEST_TRITON:
        return f"triton {_dotted(version)} is older than {_dotted(OLDEST_TRITON)}"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "on CPU tensors it runs in Triton's interpreter alone: set TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"there are no Triton kernels for {device.type}"
    found = capability or _capability(device)
    if found is None:
        return f"the compute capability of {device} is not known"
    if found < TRITON_CAPABILITY:
        return (
            f"{device} has compute capability {_dotted(found)}, older than "
            f"{_dotted(TRITON_CAPABILITY)}"
        )
    if dtype == torch.float32:
        return "tensor cores have no float32 product: cast q, k and v to bfloat16 or float16"
    supported, reason = fp8_support(device, found)
    if fp8 and not supported:
        return f"{reason}: compute fp8 cells in the input's dtype there (kinds=1)"
    return None


def _gluon_lacks(device: torch.device, head_dim: int, capability: Version | None) -> str | None:
    """What the Gluon kernel asks for beside what Triton's do, and is not there."""
    if device.type != "cuda":
        return f"the Gluon kernel runs on a GPU alone, not on {device.type}"
    found, wanted = capability or _capability(device), _dotted(GLUON_CAPABILITY)
    if found is None:
        return f"the compute capability of {device} is not known"
    if found != GLUON_CAPABILITY:
        has = f"{device} has compute capability {_dotted(found)}"
        return f"{has}, and the Gluon kernel is for {wanted}"
    if head_dim not in GLUON_HEAD_DIMS:
        first, last = GLUON_HEAD_DIMS.start, GLUON_HEAD_DIMS.stop - 1
        return f"the Gluon kernel takes a head_dim within {first}..{last}, not {head_dim}"
    version, (oldest, newest) = _triton_version(), GLUON_TRITON
    if version is None:
        return "triton is not installed"
    if not oldest <= version <= newest:
        known = f"{_dotted(oldest)} to {_dotted(newest)}"
        return f"the Gluon kernel is written for Triton {known}, and this is {_dotted(version)}"
    return None


def _capability(device: torch.device) -> Version | None:
    """Of an NVIDIA device of this machine."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


@cache
def _triton_version() -> Version | None:
    try:
        import triton
    except ImportError:
        return None
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
