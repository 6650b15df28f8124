"""The policies that are measured: one keep everywhere, everything dense, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fpsc.policy import Policy

DTYPES = {"fp8": "fp8", "input": "bf16"}
"""Of cells: FP8, or computed in the input's dtype."""


def constant(keep: float, dtype: str = "fp8", tile: Sequence[int] | None = None) -> Policy:
    """One mode at every noise level, layer and head, for videos of any length.

    keep: `near` with this fraction of the key tiles; 1 is dense.
    dtype: `fp8` or `bf16`, as in a policy file.
    """
    pattern = "near" if keep < 1 else "dense"
    mode: dict[str, Any] = {"pattern": pattern, "keep": keep, "dtype": dtype}
    return Policy.from_dict(
        {
            "fpsc": 1,
            "name": f"{pattern} {keep:g} {dtype}",
            "tile": list(tile) if tile else "auto",
            "modes": {"only": mode},
            "schedule": [{"noise": "1..0", "use": "only"}],
            "limits": {"min_tokens": 0},
        }
    )


def identity() -> Policy:
    """Everything through the op, dense and in the input's dtype: changes nothing but rounding."""
    return constant(1.0, "bf16")
