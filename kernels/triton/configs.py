"""Block sizes, stages and warps of each kernel: a few candidates, the first of them the default.

Why so few: a tile is a block of 128 rows, whose scale and list are the kernel's; smaller blocks
only give registers or shared memory room. What the machine code says decides the rest (`python
bench/sass.py`): no candidate for Hopper spills registers at head dims 64 and 128.

This module knows no torch, so that the kernels can be compiled ahead of time without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

BLOCK = 128

COMMON = 12
"""Largest factor that programs and items of a head may share: 132 and the 600 of 720p have it."""


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled.

    Attributes:
        BM, BN: rows of a block of queries and of keys; at most a tile, or BN two of them.
        warps, stages: of a program, and buffers in flight in its loop.
        specialise: one warp group loads for two that compute (Hopper; 4 warps each).
        persistent: one program a multiprocessor takes item after item.
        reorder: FP8 cells copy the rows of K in an order in which P needs no exchange between
            lanes. Specialised, Triton compiles that from `REORDERS` on.
        gluon: by `fpsc.kernels.gluon`, specialised and persistent by itself; warps are those of
            each of its two consumers.
    """

    BM: int
    BN: int
    warps: int
    stages: int
    specialise: bool = False
    persistent: bool = False
    reorder: bool = False
    gluon: bool = False

    @property
    def name(self) -> str:
        name = f"{self.BM}x{self.BN}-w{self.warps}-s{self.stages}"
        name += "-specialised" * self.specialise + "-persistent" * self.persistent
        name += "-reordered" * self.reorder
        return name + "-gluon" * self.gluon

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a launch of any kernel with products."""
        return {
            "BM": self.BM,
            "BN": self.BN,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def launch(self) -> dict[str, int]:
        """Options of a launch of the Gluon kernel."""
        return {"num_warps": self.warps, "maxnreg": GLUON_REGISTERS}

    def schedule(self) -> dict[str, bool]:
        """Further ones, of the forward kernel."""
        return {
            "SPECIALISE": self.specialise,
            "PERSISTENT": self.persistent,
            "REORDERED": self.reorder,
        }


FORWARD = ("fp8", "input")
GLUON = ("fp8_gluon", "fp8_hopper")
"""FP8 cells by the Gluon kernel alone, or by it where it is faster than any other candidate."""
BACKWARD = ("query_gradients", "key_gradients")
FP8_BACKWARD = ("query_gradients_fp8", "key_gradients_fp8")

INTERPRETED = Config(128, 128, 4, 1)


def pack_warps(dp: int, two: bool = False) -> int:
    """Warps of a kernel that holds a tile in float32 registers, or two, as where it is rotated."""
    return min(max(dp // 16, 4) * (4 if two else 1), 32)


def permutes_v(capability: tuple[int, int]) -> bool:
    """Whether V of FP8 cells is stored permuted, so that P needs no exchange between lanes.

    It saves 50 of 580 instructions a tile; with specialised warps, on Hopper, it would spill.
    """
    return capability != (9, 0)


def programs(multiprocessors: int, items: int) -> int:
    """Of a persistent kernel that takes every n-th item, where each head has so many.

    If they were a multiple of n, the same program would have the first item of every head: a tile
    of text, if there is any, ten times as long as others (`bench/l2.py`). A few programs less then
    cost less.
    """
    few = range(multiprocessors, max(multiprocessors - 8, 0), -1)
    return next((n for n in few if math.gcd(n, items) <= COMMON), multiprocessors)


def candidates(
    kernel: str,
    capability: tuple[int, int],
    dp: int,
    *,
    permuted: bool | None = None,
) -> tuple[Config, ...]:
    """Configurations of a kernel: "fp8" or "input", which is forward for one kind of cell, or one
    of `GLUON`, `BACKWARD` and `FP8_BACKWARD`.

    dp: padded head_dim; permuted: V is stored so, None for what `permutes_v` says. They serve
    bfloat16 and float16 alike.
    """
    if kernel in GLUON:
        fits = capability == (9, 0) and not permuted
        gluon = HOPPER_GLUON.get(dp, ()) if fits else ()
        if kernel == "fp8_gluon":
            return gluon
        return candidates("fp8", capability, dp, permuted=permuted) + gluon
    found = _candidates(kernel, capability, dp)
    if kernel == "fp8" and any(c.specialise for c in found):
        permuted = permutes_v(capability) if permuted is None else permuted
        found = tuple(c for c in found if c.specialise != permuted)
    return found


HOPPER_FORWARD = (
    Config(128, 128, 4, 2, specialise=True, persistent=True),
    Config(128, 128, 4, 2, specialise=True),
    Config(128, 128, 8, 2),
)

# FP8 cells with K reordered, one tile at a time and two; the last of the candidates. Where two are
# taken of 128 channels, what a persistent loop carries would spill.
HOPPER_REORDERED = {
    64: (
        Config(128, 128, 4, 2, specialise=True, persistent=True, reorder=True),
        Config(128, 256, 4, 2, specialise=True, persistent=True, reorder=True),
    ),
    128: (
        Config(128, 128, 4, 2, specialise=True, persistent=True, reorder=True),
        Config(128, 256, 4, 2, specialise=True, reorder=True),
    ),
}
REORDERS = (3, 7)
"""The oldest Triton that specialises warps around what gives columns other names."""

# Four stages, because a consumer holds two of them and asks for a third. Two tiles at a time spill
# at head_dim 64, where more stands beside the scores.
HOPPER_GLUON = {
    64: (Config(128, 128, 4, 4, gluon=True),),
    128: (Config(128, 128, 4, 4, gluon=True), Config(128, 256, 4, 4, gluon=True)),
}
GLUON_HEAD_DIMS = tuple(HOPPER_GLUON)  # padded
GLUON_REGISTERS = 168
"""Of a thread at the launch: of 12 warps, before consumers take those that the producer gives."""


@cache
def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


ROOMY = ((8, 0), (9, 0), (10, 0))
"""Capabilities with shared memory for the buffers of two stages in the widest loops."""


def _candidates(kernel: str, capability: tuple[int, int], dp: int) -> tuple[Config, ...]:
    hopper, roomy = capability == (9, 0), capability in ROOMY
    if kernel in FORWARD and hopper and dp <= 128:
        reorders = kernel == "fp8" and _triton_version() >= REORDERS
        return HOPPER_FORWARD + (HOPPER_REORDERED.get(dp, ()) if reorders else ())
    if kernel == "fp8":
        if dp > 128:
            return (Config(64, 64, 8, 2), Config(64, 128, 8, 2))
        return (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 2))
    if kernel == "input":
        if dp > 128:
            return (Config(128, 64, 8, 2),) if roomy else (Config(64, 32, 4, 2),)
        return (Config(128, 64, 8, 2), Config(128, 32, 4, 2), Config(64, 64, 4, 2))
    if kernel in FP8_BACKWARD:
        return _fp8_backward(kernel, capability, dp)
    if dp > 128:
        return (Config(64, 32, 8, 1),) if kernel == "query_gradients" else (Config(16, 64, 8, 1),)
    if kernel == "query_gradients":
        if dp > 64 and not roomy:
            return (Config(64, 32, 4, 2), Config(128, 32, 8, 1))
        return (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 64, 4, 2))
    if dp > 64:
        if not roomy:
            return (Config(32, 64, 4, 1), Config(16, 128, 8, 1))
        return (Config(32, 128, 8, 2), Config(32, 64, 4, 2))
    return (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(64, 64, 4, 2))


def _fp8_backward(kernel: str, capability: tuple[int, int], dp: int) -> tuple[Config, ...]:
    roomy = capability in ROOMY
    if dp > 128:
        if kernel == "query_gradients_fp8":
            return (Config(64, 32, 8, 1),)
        # With one stage, Triton 3.8 would need more tensor memory than there is.
        return (Config(32, 64, 8, 2 if capability == (10, 0) else 1),)
    if kernel == "query_gradients_fp8":
        if dp > 64 and not roomy:
            return (Config(64, 64, 4, 2), Config(128, 32, 8, 2))
        return (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 2))
    if dp > 64:
        if not roomy:
            return (Config(32, 64, 4, 2), Config(32, 128, 8, 1))
        return (Config(32, 128, 8, 2),)
    return (Config(64, 128, 8, 2), Config(64, 64, 4, 2))
