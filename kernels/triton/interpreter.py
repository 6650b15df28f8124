"""Triton's interpreter (TRITON_INTERPRET=1) with its casts repaired: kernels run on a CPU, slowly.

In Triton 3.6.0 the interpreter's conversions from float32 to e4m3, e5m2 and bfloat16 differ from
every GPU's: the mantissa's carry is lost (1.95 becomes 1.0), numbers beyond the range wrap around
(500 becomes 256), subnormals and bfloat16 are truncated. And with NumPy 2.4 and later it cannot use
a loaded number as the end of a range. Repaired, conversions are torch's: to nearest even,
saturating where the format has no infinity, as PTX's `cvt.rn.satfinite` does.
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

_CASTS = {
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, 448.0),
    tl.float8e5: (torch.float8_e5m2, np.uint8, 57344.0),
    tl.bfloat16: (torch.bfloat16, np.uint16, None),
}


def repair() -> None:
    """Repair the interpreter of this process, once. Nothing where kernels are compiled."""
    if not ACTIVE:
        return
    from triton.runtime import interpreter

    if getattr(interpreter, "_repaired_by_fpsc", False):
        return
    original = interpreter._convert_float

    def convert(x: np.ndarray, from_type: Any, to_type: Any, rounding: Any) -> np.ndarray:
        if from_type != tl.float32 or to_type not in _CASTS:
            return original(x, from_type, to_type, rounding)
        torch_type, bits, largest = _CASTS[to_type]
        values = torch.from_numpy(np.ascontiguousarray(x).view(np.float32).copy())
        if largest is not None:  # clamp keeps NaN
            values = values.clamp(-largest, largest)
        as_bits = torch.uint8 if bits is np.uint8 else torch.int16
        return values.to(torch_type).view(as_bits).numpy().view(bits).reshape(x.shape)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            self.create_fp_to_fp(x, tl.float32, None) if x.dtype == tl.bfloat16 else x
            for x in (a, b)
        )
        return original_dot(self, a, b, *rest)

    original_dot = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
    original_patch = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original_patch(tensor, *scope)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch
    interpreter._repaired_by_fpsc = True
