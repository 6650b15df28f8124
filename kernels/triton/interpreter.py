"""Triton's interpreter (TRITON_INTERPRET=1) with its casts repaired: kernels run on a CPU, slowly.

In Triton 3.6 to 3.8 the interpreter's conversions from and to e4m3, e5m2 and bfloat16 differ from
every GPU's: the mantissa's carry is lost (1.95 becomes 1.0), numbers beyond the range wrap around
(500 becomes 256), subnormals and bfloat16 are truncated, and the NaN of e4m3 becomes 480. And with
NumPy 2.4 and later 3.6 cannot use a loaded number as the end of a range. Repaired, conversions are
torch's: to nearest even, to a finite number in formats of 8 bits, as PTX's `cvt.rn.satfinite` does.
A product of bfloat16 is one of numbers, not of the integers that hold their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import triton
import triton.language as tl

ACTIVE = bool(triton.knobs.runtime.interpret)
"""Whether kernels are interpreted; decided when they are defined, as Triton does."""

_TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


def repair() -> None:
    """Repair the interpreter of this process, once. Nothing where kernels are compiled.

    Raises: RuntimeError where this Triton's interpreter has not what is repaired.
    """
    if not ACTIVE:
        return
    from triton.runtime import interpreter

    if getattr(interpreter, "_repaired_by_fpsc", False):
        return
    try:
        original = interpreter._convert_float
        original_dot = interpreter.InterpreterBuilder.create_dot
        original_patch = interpreter._patch_lang_tensor
    except AttributeError as error:
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} cannot be repaired ({error}); its "
            "casts would be wrong: unset TRITON_INTERPRET, or install Triton 3.6 to 3.8"
        ) from error

    def convert(x: np.ndarray, from_type: Any, to_type: Any, rounding: Any) -> np.ndarray:
        if from_type not in _TYPES or to_type not in _TYPES:
            return original(x, from_type, to_type, rounding)
        bits = np.dtype(f"int{from_type.primitive_bitwidth}")
        values = torch.from_numpy(np.array(x, order="C").view(bits)).view(_TYPES[from_type])
        if to_type in _LARGEST:  # clamp keeps NaN
            values = values.float().clamp(-_LARGEST[to_type], _LARGEST[to_type])
        width = to_type.primitive_bitwidth
        found = values.to(_TYPES[to_type]).view(getattr(torch, f"int{width}"))
        return found.numpy().view(f"uint{width}").reshape(x.shape)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            self.create_fp_to_fp(x, tl.float32, None) if x.dtype == tl.bfloat16 else x
            for x in (a, b)
        )
        return original_dot(self, a, b, *rest)

    def patch(tensor: Any, *scope: Any) -> None:
        original_patch(tensor, *scope)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch
    interpreter._repaired_by_fpsc = True
