"""What the gates allow, as relative root mean square errors.

Two implementations of one formula differ in the order of their sums, and where they round.
"""

from __future__ import annotations

OP = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
"""An op against the specification, on the same numbers."""

OP_FP8 = {"float32": 5e-4, "bfloat16": 5e-3, "float16": 5e-3}
"""The same in FP8 cells: a value near the middle of two numbers rounds either way."""

SAGE = 0.1
"""SageAttention, which rounds to int8, against what does not."""

MODEL = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 1e-2}
"""A model through the dense policy against the model as it is: the identity."""

MODEL_FP8 = {"float32": 6e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""A model with sparse cells against the same with the reference op."""
