"""Variant: one way to compile a kernel. What is compiled ahead of time is a list of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

Product = Literal["fp8", "bf16", "fp16", "fp32"]
Role = Literal["forward", "backward", "prologue", "epilogue"]

CAPABILITIES = (80, 89, 90, 100, 120)
FP8_CAPABILITIES = CAPABILITIES[1:]  # Ampere has no e4m3


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with the types, constants and options of one launch.

    name             names the row of the table; another GPU may have another of the same name
    signature        for each argument a type ("*bf16:16", "i32", "fp32"; ":16" where a pointer or
                     number is divisible by 16), or the value of a constexpr
    options          num_warps, num_stages, maxnreg, ...: what the launch passes to Triton
    product          type of the operands of its (first) matrix product; None where it has none.
                     Those of fp32 are exact, and so not on tensor cores
    keys             keys that one iteration of the hot loop takes, of dk and dv queries; None where
                     there is no such loop
    specialised      warps with roles of their own: some load, others compute
    language         what the kernel is written in
    capabilities     the GPUs that it is launched on
    """

    name: str
    kernel: JITFunction[Any]
    signature: Mapping[str, Any]
    options: Mapping[str, int]
    role: Role
    head_dim: int
    product: Product | None = None
    keys: int | None = None
    specialised: bool = False
    language: Literal["triton", "gluon"] = "triton"
    capabilities: tuple[int, ...] = CAPABILITIES

    def __post_init__(self) -> None:
        if self.product == "fp8" and min(self.capabilities) < min(FP8_CAPABILITIES):
            raise ValueError(
                f"{self.name}: expected capabilities of at least {min(FP8_CAPABILITIES)} for an "
                f"fp8 product, found {self.capabilities}: pass capabilities=FP8_CAPABILITIES"
            )
