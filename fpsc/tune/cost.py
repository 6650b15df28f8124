"""What a mode costs: its pairs of query and key counted, or a line fitted to times (`timing`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from fpsc.policy import Policy

FP8_PAIR = 0.5
"""What a pair costs in FP8 where costs are counted: tensor cores have twice the throughput."""


class Line(BaseModel):
    """Seconds of one layer: overhead + factor * fraction of all pairs visited.

    points: (fraction, seconds) that it was fitted to. worst: largest relative error there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    overhead: float
    factor: float
    points: tuple[tuple[float, float], ...]
    worst: float


class Cost(BaseModel):
    """What every candidate costs in one head of one layer in one forward.

    Attributes:
        kind: `pairs` where it is counted, in units of the dense head; `measured` in seconds.
        heads: by candidate.
        rest: seconds of all else in a forward; 0 where it was not measured.
        lines: the fits, by dtype.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["pairs", "measured"]
    heads: tuple[float, ...]
    rest: float = 0.0
    lines: dict[str, Line] = {}


def counted(candidates: Policy, pairs: Sequence[float]) -> Cost:
    """By visited pairs alone: the same on every machine."""
    modes = candidates.modes.values()
    factors = [FP8_PAIR if mode.dtype == "fp8" else 1.0 for mode in modes]
    heads = tuple(float(p * f) for p, f in zip(pairs, factors, strict=True))
    return Cost(kind="pairs", heads=heads)


def of_times(
    candidates: Policy,
    pairs: Sequence[float],
    points: Mapping[str, Sequence[tuple[float, float]]],
    heads: int,
    layers: int,
    forward_seconds: float,
) -> Cost:
    """The cost that timed points (fraction of pairs, seconds of a layer) lead to, by dtype."""
    lines = {kind: fit(found) for kind, found in points.items()}
    seconds = []
    for mode, fraction in zip(candidates.modes.values(), pairs, strict=True):
        line = lines.get(mode.dtype, lines["bf16"])
        seconds.append((line.overhead + line.factor * fraction) / heads)
    attention = layers * (lines["bf16"].overhead + lines["bf16"].factor)
    rest = max(forward_seconds - attention, 0.0)
    return Cost(kind="measured", heads=tuple(seconds), rest=rest, lines=lines)


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """overhead + factor * x of least relative squares, neither of them negative."""
    x, y = (np.array(column, np.float64) for column in zip(*points, strict=True))
    columns = np.stack([1 / y, x / y], axis=1)
    (overhead, factor), *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
    if overhead < 0 or factor < 0:  # the best that one of them does alone
        alone = [float(c.sum() / (c * c).sum()) for c in columns.T]
        errors = [float(((a * c - 1) ** 2).sum()) for a, c in zip(alone, columns.T, strict=True)]
        overhead, factor = (alone[0], 0.0) if errors[0] < errors[1] else (0.0, alone[1])
    worst = float(np.abs((overhead + factor * x) / y - 1).max())
    return Line(
        overhead=float(overhead),
        factor=float(factor),
        points=tuple((float(a), float(b)) for a, b in points),
        worst=worst,
    )
