"""`fpsc::noise_rows`: from a model's timestep to the row of the policy table, on the device.

Noise is a level in [0, 1], 1 for pure noise. Every model's timestep is normalised to it by a
convention:

| convention | noise | models |
|---|---|---|
| `flow` | t / 1000 | flow matching and DDPM schedules that count from 1000 down to 0 |
| `reversed` | 1 - t / 1000 | models that are given 1000 - t |
| `unit` | t | timesteps that already lie in [0, 1] |
| `sigma` | t / (1 + t) | EDM noise levels: sigma against unit data |
| `log-sigma` | s / (1 + s), s = exp(4 t) | EDM's c_noise = ln(sigma) / 4 |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "flow": lambda t: t / 1000,
    "reversed": lambda t: 1 - t / 1000,
    "unit": lambda t: t,
    "sigma": lambda t: t / (1 + t),
    "log-sigma": lambda t: torch.sigmoid(4 * t),  # exp(x) / (1 + exp(x))
}

EDGE_TOLERANCE = 1e-6
"""A noise level this close above an edge counts as on it: timesteps are rounded to fp32."""


def noise_level(timestep: Tensor, convention: str) -> Tensor:
    """Noise of every batch element, float32 [B], B = 1 for a scalar timestep.

    Args:
        timestep: [], [B], or [B, ...] with one value per token or frame, any number type. The
            noisiest token of an element decides: clean conditioning frames carry 0.
        convention: a key of `CONVENTIONS`.

    Raises:
        ValueError: unknown convention.
    """
    if convention not in CONVENTIONS:
        known = ", ".join(CONVENTIONS)
        raise ValueError(f"timestep convention: expected one of {known}, found {convention!r}")
    noise = CONVENTIONS[convention](timestep.to(torch.float32))
    noise = noise.reshape(1) if noise.ndim == 0 else noise.reshape(noise.shape[0], -1).amax(1)
    return noise.clamp(0, 1)


def row_index(noise: Tensor, edges: Tensor) -> Tensor:
    """int32 [B]: the row of each noise level [B] in [0, 1], given the `edges` [ROWS] of a table.

    The row is the number of edges that the level does not exceed: row 0 is the noisiest, and a
    level on an edge belongs to the cleaner row. Unused edges are -1 and never count.
    """
    level = noise.to(torch.float32).clamp_min(0)[:, None]
    return (level <= edges + EDGE_TOLERANCE).sum(1, dtype=torch.int32)


@torch.library.custom_op("fpsc::noise_rows", mutates_args=())
def noise_rows(timestep: Tensor, edges: Tensor, convention: str) -> Tensor:
    """Row of the policy table for every batch element: int32 [B].

    Args:
        timestep, convention: as for `noise_level`.
        edges: float32 [ROWS], the lower end of every row but the last, descending; -1 where unused.
    """
    return row_index(noise_level(timestep, convention), edges)


@noise_rows.register_fake
def _(timestep: Tensor, edges: Tensor, convention: str) -> Tensor:
    batch = timestep.shape[0] if timestep.ndim else 1
    return timestep.new_empty(batch, dtype=torch.int32)
