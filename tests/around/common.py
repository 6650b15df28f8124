"""What the tests of this folder share: a policy with a row for each layer, and both ways to
compile."""

from __future__ import annotations

from typing import Any

from tests.compiled import compile_blocks, compile_whole
from tests.wan import PHASES

POLICY = {
    **PHASES,
    "name": "around",
    "except": [
        {"layers": [1], "noise": "0.90..0.40", "use": "window"},
        {"layers": [0], "heads": [0], "noise": "0.40..0.00", "use": "near"},
    ],
}
"""Every layer differs from the others in every phase but the first."""

TIMESTEPS = (950.0, 600.0, 100.0)


def compiled(
    model: Any, way: str, policy: str, *, dynamic: bool | None = None, **options: Any
) -> Any:
    """The model compiled as users do: `whole`, or `blocks` one by one."""
    compile_ = {"whole": compile_whole, "blocks": compile_blocks}[way]
    return compile_(model, dynamic=dynamic, policy=policy, **options)
