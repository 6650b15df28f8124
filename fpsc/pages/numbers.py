"""How numbers are written for people: the same in pages, tables and documents."""

from __future__ import annotations

import math


def seconds(value: float, like: float | None = None) -> str:
    """Three digits, in the unit that suits it, or `like` where that is given."""
    suits = value if like is None else like
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if 0 < suits < limit:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value)} s"


def size(value: int) -> str:
    """Bytes, in the binary unit that suits."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{_digits(value / 1024**power)} {unit}"
    return f"{value} B"


def times(value: float) -> str:
    """A ratio of speeds."""
    return f"{value:.2f}×" if value < 99.995 else f"{value:,.0f}×"


def error(value: float) -> str:
    """A relative error."""
    return f"{value:.2g}" if value == 0 or value >= 0.1 else f"{value:.1e}"


def percent(value: float) -> str:
    """A share."""
    return f"{value:.0%}" if value >= 0.0995 or value == 0 else f"{value:.1%}"


def plain(value: float) -> str:
    """A number without a unit, four digits."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def whole(value: int) -> str:
    """A count."""
    return f"{value:,}"


def decibel(value: float) -> str:
    """A PSNR; of equal pictures it is infinite."""
    return "∞ dB" if math.isinf(value) else f"{value:.2f} dB"


def _digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= value < 999.5 else f"{value:,.0f}"
