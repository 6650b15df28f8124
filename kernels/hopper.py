"""`fpsc::attention` on Hopper: Triton's kernels, and Gluon's for FP8 cells where it is faster.

Which one is, the first call measures (`fpsc.kernels.triton.tune`). Where it may not, Triton's run.
"""

from __future__ import annotations

from functools import partial

from fpsc.kernels.triton import attention

forward = partial(attention.forward, fp8_kernel="fp8_hopper")
backward = attention.backward
