"""`fpsc::attention` on Hopper with the Gluon kernel for FP8 cells; all else is Triton's.

By name ("gluon") it computes every FP8 cell. `fpsc.kernels.hopper` leaves it to the tuner.
"""

from __future__ import annotations

from functools import partial

from fpsc.kernels.triton import attention

forward = partial(attention.forward, fp8_kernel="fp8_gluon")
backward = attention.backward
