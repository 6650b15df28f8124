"""How cost grows, and where a sparse attention begins to pay."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from fpsc.bench.record import BreakEven, Case, Fit, Point, Role, rounded

AXES = ("tokens", "keep", "batch")
PAIRS = "visited pairs"
LEAST = 3
"""Points of a fit."""

EXPONENTS = np.linspace(0.0, 3.0, 601)


def fits_of(cases: Sequence[Case]) -> list[Fit]:
    """Of every contender along every axis that at least three cases differ in."""
    found = []
    for (axis, contender), points in sorted(points_of(cases).items()):
        points = sorted(points, key=lambda point: point.x)
        if len({point.x for point in points}) >= LEAST:
            found.append(fit(axis, contender, points))
    return found


def points_of(cases: Sequence[Case]) -> dict[tuple[str, str], list[Point]]:
    """By axis and contender. Along `keep`, all of fpsattn's contenders are one line; along `visited
    pairs` too, over all cases."""
    found: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for case in cases:
        p, axis = case.problem, axis_of(case)
        pairs = p.batch * p.heads * p.tokens**2
        for result in case.measured if axis else ():
            if result.seconds is None:
                continue
            seconds, ours = result.seconds.median, result.role is Role.fpsattn
            places: list[tuple[str, str, float]] = []
            if axis in ("tokens", "batch"):
                x = float(p.tokens if axis == "tokens" else p.batch)
                places.append((axis, result.name, x))
            if ours and result.visited:
                places.append((PAIRS, "fpsattn", result.visited * pairs))
                if axis == "keep":
                    places.append((axis, "fpsattn", result.visited))
            for where, name, x in places:
                found[where, name].append(Point(x=rounded(x), seconds=seconds, case=case.name))
    return found


def axis_of(case: Case) -> str:
    """What the points of its series differ in, "" for a case of no series: SERIES/AXIS/POINT."""
    parts = case.name.split("/")
    return parts[1] if len(parts) == 3 and parts[1] in AXES else ""


def fit(axis: str, contender: str, points: Sequence[Point]) -> Fit:
    """overhead + factor x ** exponent, the relative errors of the points minimised."""
    x, y = (np.array([getattr(p, name) for p in points]) for name in ("x", "seconds"))
    exponent, factor, overhead = _solve(x, y)
    left_out = [
        _solve(np.delete(x, i), np.delete(y, i))[0]
        for i in range(len(x))
        if len(set(np.delete(x, i))) >= LEAST
    ]
    logs = np.log(y)
    residual = logs - np.log(overhead + factor * x**exponent)
    spread = float(((logs - logs.mean()) ** 2).sum())
    dominated = (overhead / factor) ** (1 / exponent) if factor and exponent and overhead else None
    return Fit(
        axis=axis,
        contender=contender,
        points=tuple(points),
        exponent=rounded(exponent),
        exponent_range=(rounded(min(left_out)), rounded(max(left_out))) if left_out else None,
        factor=rounded(factor),
        overhead=rounded(overhead),
        r2=rounded(1 - float((residual**2).sum()) / spread) if spread else 1.0,
        dominated_below=rounded(dominated) if dominated else None,
    )


def _solve(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(exponent, factor, overhead), the latter two not negative.

    For a given exponent the model is linear; exponents are tried on a grid.
    """
    best = (math.inf, 0.0, 0.0, float(y.mean()))
    scale = x.max()
    ones = 1 / y
    for exponent in EXPONENTS:
        power = (x / scale) ** exponent / y
        for columns in ((power, ones), (power,), (ones,)):
            matrix = np.stack(columns, axis=1)
            solved, *_ = np.linalg.lstsq(matrix, np.ones_like(y), rcond=None)
            if (solved < 0).any():
                continue
            error = float(((matrix @ solved - 1) ** 2).sum())
            factor = float(solved[0]) if columns[0] is power else 0.0
            overhead = float(solved[-1]) if columns[-1] is ones else 0.0
            # The simpler model wins a tie.
            if error < best[0] * (1 - 1e-9):
                best = (error, float(exponent), factor / scale**exponent, overhead)
    return best[1:]


def break_evens(cases: Sequence[Case]) -> list[BreakEven]:
    """Where each of fpsattn's contenders crosses the best dense one, along tokens; and along keep,
    where all of them do."""
    found = []
    crossing: dict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
    for case in cases:
        dense = case.of(case.best)
        if dense is None or dense.seconds is None:
            continue
        for result in case.measured:
            if result.role is not Role.fpsattn or result.seconds is None:
                continue
            speedup = dense.seconds.median / result.seconds.median
            if axis_of(case) == "tokens":
                point = (float(case.problem.tokens), speedup, dense.name)
                crossing["tokens", result.name].append(point)
            if axis_of(case) == "keep" and result.visited is not None:
                crossing["keep", "fpsattn"].append((result.visited, speedup, dense.name))
    for (axis, name), points in sorted(crossing.items()):
        if len(points) > 1:
            found.append(break_even(axis, name, sorted(points)))
    return found


def break_even(axis: str, contender: str, points: Sequence[tuple[float, float, str]]) -> BreakEven:
    """Of (x, speedup, against), ascending in x: the last crossing of 1, between logarithms."""
    against = points[-1][2]
    wins = [speedup > 1 for _, speedup, _ in points]
    if all(wins) or not any(wins):
        faster = "always" if all(wins) else "never"
        return BreakEven(axis=axis, contender=contender, against=against, at=None, faster=faster)
    last = max(i for i in range(len(wins) - 1) if wins[i] != wins[i + 1])
    (x0, s0, _), (x1, s1, _) = points[last], points[last + 1]
    part = math.log(s0) / (math.log(s0) - math.log(s1))
    at = math.exp(math.log(x0) + part * (math.log(x1) - math.log(x0)))
    return BreakEven(
        axis=axis,
        contender=contender,
        against=against,
        at=rounded(at),
        faster="above" if wins[last + 1] else "below",
    )
