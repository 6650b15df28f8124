"""What the tests of this folder share: a policy with a row for each layer, and both ways to
compile."""

from __future__ import annotations

from typing import Any

import torch

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

NO_RECOMPILE = torch._dynamo.config.patch(error_on_recompile=True)
TIMESTEPS = (950.0, 600.0, 100.0)


def compiled(
    model: Any, way: str, policy: str, *, dynamic: bool | None = None, **options: Any
) -> Any:
    """The model compiled as users do: `whole`, or `blocks` one by one."""
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": dynamic}
    settings["options"] = {"policy": policy, **options}
    if way == "blocks":
        model.compile_repeated_blocks(backend="fpsattn", **settings)
        return model
    return torch.compile(model, backend="fpsattn", **settings)
