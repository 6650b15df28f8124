"""The modes that a calibration measures: pattern x keep x dtype x granularity of scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fpsc.errors import UserError
from fpsc.grid import TokenGrid, tile_grid
from fpsc.policy import Policy
from fpsc.policy.patterns import fraction, pattern_of
from fpsc.policy.schema import MODES, Mode

Candidates = dict[str, dict[str, Any]]
"""Modes by name, spelled as in a policy."""

DENSE = "dense"
"""The mode that changes nothing. Every set of candidates begins with it."""

DENSE_FP8 = "dense-fp8"

PATTERNS = ("near", "frame", "column", "radial")
"""Patterns that `keep` alone describes, so that they mean the same on another grid."""

MIN_TOKENS = 4096
"""`limits.min_tokens` of what is tuned on a video of at least so many: shorter ones stay dense."""


def candidate(pattern: str, keep: float, dtype: str, scales: str = "tile") -> Candidates:
    """One mode with its name: {"near-0.25-fp8-coarse": {...}}."""
    mode: dict[str, Any] = {"pattern": pattern, "keep": keep, "dtype": dtype}
    name = f"{pattern}-{keep:g}" if keep < 1 else DENSE
    if keep == 1:
        mode = {"keep": 1.0, "dtype": dtype}
    if dtype == "fp8":
        name += "-fp8"
        if scales != "tile":
            name += f"-{scales}"
            mode["scales"] = {"qk": scales}
    return {name.replace(".", "_"): mode}


def product(
    patterns: Sequence[str],
    keeps: Sequence[float],
    dtypes: Sequence[str] = ("bf16", "fp8"),
    scales: Sequence[str] = ("tile",),
) -> Candidates:
    """All combinations, behind the dense modes. Scales are of FP8 alone.

    Raises:
        UserError: more than a policy may hold.
    """
    found = candidate("dense", 1.0, "bf16")
    if "fp8" in dtypes:
        found |= candidate("dense", 1.0, "fp8")
    for pattern in patterns:
        for keep in keeps:
            for dtype in dtypes:
                for scale in scales if dtype == "fp8" else ("tile",):
                    found |= candidate(pattern, keep, dtype, scale)
    if len(found) > MODES:
        raise UserError(
            f"{len(patterns)} patterns x {len(keeps)} values of keep x {len(dtypes)} dtypes make "
            f"{len(found)} modes with the dense ones; a policy holds {MODES} at most: leave some "
            "out"
        )
    return found


def default() -> Candidates:
    """30 modes: those of the presets `generic`, `generic-tuned` and `demo` among them."""
    found = product((), ())
    for keep in (0.0625, 0.125, 0.1875, 0.25, 0.35, 0.5, 0.75):
        found |= candidate("near", keep, "bf16")
    for pattern in ("frame", "column", "radial"):
        for keep in (0.125, 0.25, 0.5):
            found |= candidate(pattern, keep, "bf16")
        for keep in (0.25, 0.5):
            found |= candidate(pattern, keep, "fp8")
    for keep in (0.125, 0.25, 0.35, 0.5):
        found |= candidate("near", keep, "fp8")
    found |= candidate("near", 0.125, "fp8", "coarse")
    return found | candidate("near", 0.1875, "fp8", "intermediate")


def policy(
    candidates: Mapping[str, Any],
    schedule: Sequence[tuple[float, float, str]] = ((1.0, 0.0, DENSE),),
    *,
    tile: Sequence[int] | str = "auto",
    min_tokens: int = 0,
) -> Policy:
    """A policy that has all candidates as its modes. Everything is dense without a `schedule` of
    (from, to, mode).

    All policies of one set have one structure: a compiled model takes any in place of another.

    Raises:
        PolicyError: a candidate is none that a policy may have.
    """
    return Policy.from_dict(
        {
            "fpsc": 1,
            "name": "candidates",
            "tile": tile if isinstance(tile, str) else list(tile),
            "modes": dict(candidates),
            "schedule": [
                {"noise": f"{hi:.5f}..{lo:.5f}", "use": name} for hi, lo, name in schedule
            ],
            "limits": {"min_tokens": min_tokens},
        }
    )


def _scales(mode: Mode) -> object:
    """Of Q and K; `fine` is another word for `tile`."""
    return "tile" if mode.scales.qk == "fine" else mode.scales.qk


def min_tokens(grid: Sequence[int]) -> int:
    """`limits.min_tokens` of what is tuned on a grid."""
    t, y, x = grid
    return MIN_TOKENS if t * y * x >= MIN_TOKENS else 0


def find(mode: Mode, among: Policy) -> str | None:
    """The candidate that does what a mode of another policy does, or None."""
    for name, other in among.modes.items():
        same = pattern_of(mode) == pattern_of(other) and mode.dtype == other.dtype
        if same and (mode.dtype == "bf16" or _scales(mode) == _scales(other)):
            return name
    return None


def references(among: Policy, grid: Sequence[int]) -> tuple[str, str]:
    """The candidates with which it is measured how far an error is carried: half of the tiles and a
    quarter, or what is nearest to that; unquantised where there is a choice."""
    tiles = tile_grid(TokenGrid(*grid), among.tile_for(grid))

    def nearest(keep: float) -> str:
        def distance(name: str) -> tuple[float, bool]:
            mode = among.modes[name]
            return abs(fraction(pattern_of(mode), tiles) - keep), mode.dtype == "fp8"

        return min(among.modes, key=distance)

    return nearest(0.5), nearest(0.25)
