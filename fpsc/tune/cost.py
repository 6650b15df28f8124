"""What a mode costs: its pairs of query and key counted, or seconds by `fpsc.cost`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from fpsc.cost import DeviceCost, Dtype, Heads, load_of
from fpsc.policy import Policy

if TYPE_CHECKING:  # it brings the compiler, which solving does not wait for
    from fpsc.bench.op import Shape

FP8_PAIR = 0.5
"""What a pair costs in FP8 where costs are counted: tensor cores have twice the throughput."""


class Cost(BaseModel):
    """What every candidate costs in one head of one layer in one forward.

    Attributes:
        kind: `pairs` where it is counted, in units of the dense head; `measured` in seconds.
        heads: by candidate.
        rest: seconds of all else in a forward; 0 where it was not measured.
        device: what the seconds are predicted by; None where they are counted.
        refused: why they are counted though they were measured; "" where they were not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["pairs", "measured"]
    heads: tuple[float, ...]
    rest: float = 0.0
    device: DeviceCost | None = None
    refused: str = ""


def counted(candidates: Policy, pairs: Sequence[float], *, refused: str = "") -> Cost:
    """By visited pairs alone: the same on every machine."""
    modes = candidates.modes.values()
    factors = [FP8_PAIR if mode.dtype == "fp8" else 1.0 for mode in modes]
    heads = tuple(float(p * f) for p, f in zip(pairs, factors, strict=True))
    return Cost(kind="pairs", heads=heads, refused=refused)


def on_device(
    candidates: Policy,
    visits: Sequence[np.ndarray],
    device: DeviceCost,
    shape: Shape,
    *,
    element: int,
    layers: int,
    forward_seconds: float,
) -> Cost:
    """The cost that a device's model gives: of a layer whose heads all have one mode, a head's
    share. What a mixture of modes gains by filling each other's gaps is not in it.

    Args:
        visits: by candidate, the length of every query tile's list.
        shape: of one layer's attention. element: bytes of a number in it.
        forward_seconds: of one dense forward, of which `layers` dense attentions are a part.
    """
    of_all = shape.batch * shape.heads

    def layer(dtype: Dtype, lengths: np.ndarray) -> float:
        where = dtype if dtype in device.kinds else "bf16"  # so does what the device runs
        heads = [Heads(where, lengths, of_all)]
        return device.seconds(load_of(heads, shape.tokens, shape.head_dim, element))

    found = [
        layer(mode.dtype, lengths) / shape.heads
        for mode, lengths in zip(candidates.modes.values(), visits, strict=True)
    ]
    tiles = max(len(lengths) for lengths in visits)
    dense = layer("bf16", np.full(tiles, tiles))
    rest = max(forward_seconds - layers * dense, 0.0)
    return Cost(kind="measured", heads=tuple(found), rest=rest, device=device)
